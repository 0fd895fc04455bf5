"""Every kind of damage ends in one line that names the file, with exit code 4, before any weight is used."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.check import check_headers
from hybrid.checkpoint.header import read_header
from hybrid.checkpoint.write import INDEX
from hybrid.errors import CheckpointError
from tests.checkpoint import damage

SHARD = damage.SHARD
O_PROJ = "language_model.model.layers.0.self_attn.o_proj.weight"
PACKED = "language_model.model.layers.1.mlp.experts.2.up_proj.weight_packed"

Damage = Callable[[Path], None]


def truncate(size: int) -> Damage:
    def apply(model: Path) -> None:
        with (model / SHARD).open("r+b") as file:
            file.truncate(size if size >= 0 else (model / SHARD).stat().st_size + size)

    return apply


def patch(offset: int, data: bytes) -> Damage:
    return lambda model: damage.overwrite(model / SHARD, offset, data)


def header(change: Callable[[dict], None]) -> Damage:
    return lambda model: damage.rewrite_header(model / SHARD, change)


def entry(name: str, **values: object) -> Damage:
    return header(lambda content: content[name].update(values))


def remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def write(name: str, text: str) -> Damage:
    return lambda model: (model / name).write_text(text) and None


def shift(content: dict) -> None:
    content[O_PROJ]["data_offsets"] = [offset + 2**40 for offset in content[O_PROJ]["data_offsets"]]


def overlap(content: dict) -> None:
    content["language_model.model.norm.weight"]["data_offsets"] = content[
        "language_model.model.layers.0.input_layernorm.weight"
    ]["data_offsets"]


def duplicate(model: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)


def second_spelling(content: dict) -> None:
    """The same tensor under two prefixes."""
    content["model.norm.weight"] = content.pop("language_model.model.layers.0.input_layernorm.weight")


CASES: dict[str, tuple[Damage, str]] = {
    "missing shard": (remove(SHARD), f"lacks the shard {SHARD}"),
    "missing config": (remove("config.json"), "no config.json"),
    "config is not JSON": (write("config.json", '{"model_type": '), "config.json is damaged: it is not JSON"),
    "config is a list": (write("config.json", "[]"), "config.json is damaged: it is not a JSON object"),
    "deeply nested config": (write("config.json", "[" * 100_000), "config.json is damaged"),
    "no index, no single file": (remove(INDEX), "neither model.safetensors.index.json nor model.safetensors"),
    "index without map": (write(INDEX, "{}"), "has no weight_map"),
    "index pointing outside": (write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'), "outside its directory"),
    "empty shard": (truncate(0), "its header claims 0 bytes in a file of 0"),
    "header cut short": (truncate(100), "its header claims"),
    "data cut short": (truncate(-1), f"{SHARD} is damaged: it is cut short at"),
    "trailing bytes": (lambda model: damage.append(model / SHARD, b"xy"), "2 stray bytes follow"),
    "enormous header length": (patch(0, struct.pack("<Q", 2**62)), "header claims 4,611,686,018,427,387,904 bytes"),
    "zero header length": (patch(0, struct.pack("<Q", 0)), "header claims 0 bytes"),
    "header is not JSON": (patch(8, b"}"), "the header is not JSON"),
    "header is not text": (patch(9, b"\xff\xfe"), "the header is not JSON"),
    "header names twice": (duplicate, "the header names a twice"),
    "unknown dtype": (entry(O_PROJ, dtype="F4"), "has the unknown dtype 'F4'"),
    "negative shape": (entry(O_PROJ, shape=[-128, -64]), "has shape [-128, -64]"),
    "shape is text": (entry(O_PROJ, shape="ab"), "has shape ['a', 'b']"),
    "no offsets": (header(lambda content: content[O_PROJ].pop("data_offsets") and None), "o_proj.weight is malformed"),
    "entry is a list": (header(lambda content: content.update({O_PROJ: [1]})), "o_proj.weight is malformed"),
    "offsets past the end": (header(shift), "stray bytes lie before"),
    "size does not match": (entry(O_PROJ, shape=[128, 65]), "BF16 [128, 65] needs 16,640"),
    "wrong shape": (entry(O_PROJ, shape=[64, 128]), "o_proj.weight has shape [64, 128], not [128, 64]"),
    "wrong dtype": (entry(PACKED, dtype="F32"), "up_proj.weight_packed has dtype F32, not I32"),
    "tensors overlap": (header(overlap), "overlaps"),
    "missing tensor": (
        header(lambda content: content.update({"language_model.model.layers.0.x": content.pop(O_PROJ)})),
        "no tensor layers.0.self_attn.o_proj.weight",
    ),
    "one name twice": (header(second_spelling), "norm.weight is also in"),
    "generation_config": (write("generation_config.json", "no"), "generation_config.json is damaged"),
}


@pytest.mark.parametrize("case", CASES)
def test_opening_a_damaged_model_names_the_damage(tmp_path: Path, tiny: Path, case: str) -> None:
    apply, message = CASES[case]
    model = damage.copy(tiny, tmp_path / "model")
    apply(model)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert message in caught.value.message
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.remedy and caught.value.exit_code == 4


@pytest.mark.parametrize("case", CASES)
def test_doctor_finds_the_same_damage(tmp_path: Path, tiny: Path, case: str) -> None:
    apply, _ = CASES[case]
    model = damage.copy(tiny, tmp_path / "model")
    apply(model)
    try:
        findings = check_headers(model)
    except CheckpointError:
        assert "config" in case  # only a model that cannot be told apart is refused as a whole
        return
    errors = [finding for finding in findings if finding.severity == "error"]
    assert 1 <= len(errors) <= 3, [str(finding) for finding in findings]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("moonshotai/Kimi-K2.5", "kimi-local pull moonshotai/Kimi-K2.5"),
        ("/nowhere/at/all", "kimi-local pull"),
        ("./models/x", "kimi-local pull"),
    ],
)
def test_an_absent_model_shows_how_to_get_one(name: str, remedy: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert f"no model directory {name} here" in caught.value.message
    assert remedy in caught.value.remedy


def test_a_file_is_not_a_model(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, not a model directory"):
        open_checkpoint(tiny / "config.json")


def test_unsupported_architectures_are_refused_before_shards_are_read(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")
    (model / SHARD).unlink()
    (model / "config.json").write_text('{"architectures": ["KimiK3ForCausalLM"], "model_type": "kimi_k3"}')
    with pytest.raises(CheckpointError, match="not supported: config.json says KimiK3ForCausalLM, kimi_k3"):
        open_checkpoint(model)


def test_several_missing_shards_are_counted(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")
    damage.rewrite_json(model / INDEX, lambda index: index["weight_map"].update(a="b.safetensors", c="d.safetensors"))
    with pytest.raises(CheckpointError, match=r"lacks the shard b.safetensors and 1 more"):
        open_checkpoint(model)


def test_no_flipped_header_byte_gets_past_as_something_else(tmp_path: Path, tiny: Path) -> None:
    """Any one-byte change in the header is either refused in one line or leaves a header that holds together."""
    model = damage.copy(tiny, tmp_path / "model")
    shard = model / SHARD
    whole = shard.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for offset in range(0, size, 37):
        damage.overwrite(shard, offset, bytes([whole[offset] ^ 0x04]))
        try:
            header = read_header(shard)
        except CheckpointError as error:
            refused += 1
            assert str(shard) in str(error) and "\n" not in str(error)
        else:
            assert max(e.end for e in header.entries.values()) == len(whole)
        damage.overwrite(shard, offset, whole[offset : offset + 1])
    assert refused > size / 37 / 4
