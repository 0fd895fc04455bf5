"""A reduced KV cache rounds what attention sees, and nothing else: how rows came to be there changes no answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid import Kimi, SamplingParams
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.errors import UsageError
from hybrid.memory.kv_cache import PAGE_SIZE
from hybrid.memory.kv_format import KVFormat

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = torch.randint(3, 300, (3 * PAGE_SIZE + 7,), generator=torch.Generator().manual_seed(1)).tolist()
LONG = [*PROMPT, *PROMPT][: 5 * PAGE_SIZE + 1]  # enough to be kept on disk
EXACT = {"dtype": "float32", "activations": "float32", "threads": 1}
KINDS = ["fp8", "int8"]


def run(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], Request]:
    request = Request(list(prompt), params)
    return list(engine.stream(request)), request


@pytest.fixture(scope="module", params=KINDS)
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Kimi.load(tiny, ctx=256, cache=6 * PAGE_SIZE, kv=request.param, **EXACT) as kimi:  # type: ignore[arg-type]
        yield kimi._engine


@pytest.fixture(scope="module")
def rounded_by(tiny: Path) -> torch.Tensor:
    """The scores without rounding."""
    with Kimi.load(tiny, ctx=256, **EXACT) as kimi:  # type: ignore[arg-type]
        return kimi.logits(PROMPT)


def test_it_takes_what_it_says(engine: Engine) -> None:
    config = engine.model.config
    assert engine.kv.format == KVFormat.of(config, engine.kv.format.kind) and engine.kv.format.reduced
    assert engine.kv.rows.nbytes == config.num_hidden_layers * 6 * PAGE_SIZE * engine.kv.format.row_bytes


def test_prefill_in_any_chunks_sees_the_same_rows(engine: Engine, rounded_by: torch.Tensor) -> None:
    """A code may turn with the last bit of a sum; that weighs little beside what rounding does anyway."""
    found = {}
    for chunk in (1, 5, 1000):
        engine.prefill_chunk = chunk
        found[chunk] = engine.logits(PROMPT)
    engine.prefill_chunk = 256
    rounding = float((found[1] - rounded_by).norm())
    assert 1e-3 * rounded_by.norm() < rounding < 0.1 * rounded_by.norm()
    for chunk in (5, 1000):
        assert (found[chunk] - found[1]).norm() < 0.1 * rounding


def test_decoding_continues_as_prefilling_would(engine: Engine) -> None:
    answer, _ = run(engine, PROMPT)
    assert engine.logits(PROMPT + answer)[len(PROMPT) - 1 : -1].argmax(-1).tolist() == answer


def test_a_cached_prefix_changes_nothing(engine: Engine) -> None:
    engine.forget()
    fresh, first = run(engine, PROMPT)
    again, second = run(engine, PROMPT)
    assert (first.cached_tokens, second.cached_tokens) == (0, len(PROMPT) - 1) and again == fresh
    forked = [*PROMPT[:90], 5, 6, 7]  # a page and a part of one, which is copied
    cached, third = run(engine, forked)
    engine.forget()
    assert third.cached_tokens == 90 and run(engine, forked)[0] == cached


def test_batches_and_those_who_made_room_answer_as_alone(engine: Engine) -> None:
    prompts = [PROMPT[at : at + 60] for at in range(5)]
    params = replace(GREEDY, max_tokens=70)
    alone = []
    for prompt in prompts:
        engine.forget()
        alone.append(run(engine, prompt, params)[0])
    engine.forget()
    scheduler = engine.scheduler(4)
    added = [scheduler.add(Request(list(prompt), params)) for prompt in prompts]
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    assert scheduler.preemptions > 0 and [each.answer for each in added] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_rows_from_disk_are_those_that_were_there(
    tiny: Path, tmp_path: Path, kind: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of no other kind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = EXACT if exact else {"threads": 1}
    found = []
    for kv, disk_tokens in ((kind, 0), (kind, 5 * PAGE_SIZE), (KINDS[kind == "fp8"], 0), ("auto", 0)):
        with Kimi.load(tiny, ctx=512, kv=kv, kv_disk=1 << 28, **asked) as kimi:  # type: ignore[arg-type]
            answer, request = run(kimi._engine, LONG)
            assert request.disk_tokens == disk_tokens
            engine = kimi._engine
            pages = tuple(node.page for node in engine.cache.find(LONG).full)
            rows = [engine.kv.rows[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE].clone() for page in pages[:5]]
            found.append((answer, rows))
    (first, before), (restored, after), *_ = found
    assert restored == first and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_type_computed_in_is_part_of_a_place_on_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes look alike there, and mean what another precision computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dtype in ("float32", "bfloat16"):
        with Kimi.load(tiny, ctx=512, dtype=dtype, kv="fp8", kv_disk=1 << 28, threads=1) as kimi:
            assert run(kimi._engine, LONG)[1].disk_tokens == 0


def test_bf16_rows_of_a_model_in_float32(tiny: Path, rounded_by: torch.Tensor) -> None:
    with Kimi.load(tiny, ctx=256, kv="bf16", **EXACT) as kimi:  # type: ignore[arg-type]
        assert kimi._engine.kv.rows.dtype == torch.bfloat16
        assert 0 < (kimi.logits(PROMPT) - rounded_by).norm() < 0.02 * rounded_by.norm()
        assert len(list(kimi.generate(PROMPT, GREEDY))) == 12


def test_other_kinds_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="'int4' is no way to keep the KV cache. There are auto, bf16, fp8, int8"):
        Kimi.load(tiny, kv="int4")
