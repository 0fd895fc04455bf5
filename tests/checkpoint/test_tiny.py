"""The tiny checkpoint: reproducible, complete, readable by the tokenizer, and not degenerate."""

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.check import check_headers
from hybrid.checkpoint.tiny import make_tiny

VISION = {
    "patch_size": 14,
    "vt_num_hidden_layers": 2,
    "vt_hidden_size": 64,
    "vt_num_attention_heads": 4,
    "vt_intermediate_size": 96,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
    "merge_kernel_size": [2, 2],
}


def test_same_seed_same_files(tmp_path: Path, tiny: Path) -> None:
    again, other = make_tiny(tmp_path / "again"), make_tiny(tmp_path / "other", seed=1)
    names = sorted(path.name for path in tiny.iterdir())
    assert filecmp.cmpfiles(tiny, again, names, shallow=False) == (names, [], [])
    assert "model-00001-of-000001.safetensors" in filecmp.cmpfiles(tiny, other, names, shallow=False)[1]


@pytest.mark.parametrize("experts", ["int4", "bf16", "fp8"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model."])
def test_every_kind_passes_its_own_check(tmp_path: Path, experts: str, prefix: str) -> None:
    assert check_headers(make_tiny(tmp_path / "m", experts=experts, prefix=prefix)) == []


def test_vision_tower(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "m", config={"vision_config": VISION})
    assert check_headers(path) == []
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensor("mm_projector.proj.2.weight").shape == (128, 256)
        assert checkpoint.config.vision_config == VISION


def test_text_files_are_there_and_fit(tiny: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny)
    with open_checkpoint(tiny) as checkpoint:
        assert tokenizer.vocab_size == checkpoint.config.vocab_size
        assert tokenizer.specials["<|im_end|>"] in checkpoint.config.eos_token_ids
        assert checkpoint.config.bos_token_id == tokenizer.specials["[BOS]"]
    text = "The quick brown fox, 12345: 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" the")) == 1  # merges happen
    config = json.loads((tiny / "config.json").read_text())
    assert config["media_placeholder_token_id"] == tokenizer.specials["<|media_pad|>"]
    assert "assistant" in (tiny / "chat_template.jinja").read_text()


def test_weights_keep_activations_near_one_and_routers_decided(tiny: Path) -> None:
    rng = np.random.default_rng(0)
    with open_checkpoint(tiny) as checkpoint:
        x = torch.from_numpy(rng.standard_normal((64, 128), dtype=np.float32))
        for part in ("0.mlp.gate_proj", "1.mlp.experts.0.up_proj", "1.mlp.shared_experts.up_proj"):
            assert 0.5 < float((x @ checkpoint.linear(f"layers.{part}").float().T).std()) < 2
        scores = torch.sigmoid(x @ checkpoint.linear("layers.1.mlp.gate").float().T)
        chosen = scores.topk(4).indices
        assert len(chosen.unique()) == 8 and float(scores.std()) > 0.2
        codes = checkpoint.expert(1, 0).gate.packed
        assert len(np.unique(codes & 15)) >= 14
