"""A restarted engine reads what an earlier one computed, and nobody could tell by its answers."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.checkpoint.tiny import make_tiny
from hybrid.engine.request import Request
from hybrid.engine.service import Service
from hybrid.errors import KimiError
from hybrid.memory.kv_cache import PAGE_SIZE

ROOM = 1 << 28
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
PROMPT = torch.randint(3, 300, (5 * PAGE_SIZE + 1,), generator=torch.Generator().manual_seed(1)).tolist()
Load = Callable[..., Kimi]


@pytest.fixture
def load(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """The program, started afresh, with a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened: list[Kimi] = []

    def load(model: Path = tiny, **settings: object) -> Kimi:
        chosen = {"ctx": 512, "kv_disk": ROOM, "threads": 1} | settings
        opened.append(Kimi.load(model, **chosen))  # type: ignore[arg-type]
        return opened[-1]

    yield load
    for each in opened:
        each.close()


def run(kimi: Kimi, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], Request]:
    request = Request(list(prompt), params)
    return list(kimi._engine.stream(request)), request


def rows(kimi: Kimi, ids: list[int]) -> Tensor:
    """What the cache holds of the whole pages of `ids`."""
    engine = kimi._engine
    pages = tuple(node.page for node in engine.cache.find(ids).full)
    return torch.stack([engine.kv.read(layer, pages, len(pages) * PAGE_SIZE) for layer in range(len(engine.kv.rows))])


@pytest.mark.parametrize("kind", [{}, {"dtype": "float32", "activations": "float32"}])
def test_rows_logits_and_answers_are_the_same(load: Load, kind: dict[str, str]) -> None:
    with load(**kind) as kimi:
        first, fresh = run(kimi, PROMPT)
        again, warm = run(kimi, PROMPT)
        before = rows(kimi, PROMPT)
    with load(**kind) as kimi:
        restored, request = run(kimi, PROMPT)
        assert torch.equal(rows(kimi, PROMPT), before)
    assert first == again == restored
    assert (fresh.cached_tokens, warm.cached_tokens, request.cached_tokens) == (0, len(PROMPT) - 1, len(PROMPT) - 1)
    assert (fresh.disk_tokens, warm.disk_tokens, request.disk_tokens) == (0, 0, len(PROMPT) - 1)
    assert request.logprobs == warm.logprobs


def test_an_answer_is_kept_too_and_a_reply_says_what_was_read(load: Load) -> None:
    long = replace(GREEDY, max_tokens=2 * PAGE_SIZE)
    with load() as kimi:
        ids, _ = run(kimi, PROMPT, long)
    with load() as kimi:
        reply = kimi.complete([*PROMPT, *ids], GREEDY)
        list(reply)
        assert reply.stats.cached_tokens == reply.stats.disk_tokens == 7 * PAGE_SIZE


def test_what_changes_rows_changes_the_place(load: Load, tmp_path: Path) -> None:
    with load() as kimi:
        run(kimi, PROMPT)
    kinds = [{"dtype": "float32"}, {"activations": "float32"}, {"model": make_tiny(tmp_path / "other", seed=1)}]
    for kind in [*kinds, {"ctx": 400}]:
        with load(**kind) as kimi:
            assert run(kimi, PROMPT)[1].disk_tokens == (0 if kind in kinds else len(PROMPT) - 1)


def test_nothing_is_written_or_read_unless_asked_for(load: Load, tmp_path: Path) -> None:
    with load(kv_disk=0) as kimi:
        run(kimi, PROMPT)
    assert not (tmp_path / "kimi-local" / "kv").exists()
    with load() as kimi:
        run(kimi, PROMPT)
    with load(kv_disk=0) as kimi:
        assert run(kimi, PROMPT)[1].cached_tokens == 0


def test_a_request_may_ask_that_nothing_is_kept(load: Load) -> None:
    with load() as kimi:
        list(kimi.reply([Message("user", "word " * 100)], GREEDY, keep=False))
    with load() as kimi:
        for expected in (False, True):
            reply = kimi.reply([Message("user", "word " * 100)], GREEDY)
            list(reply)
            assert reply.stats.disk_tokens == 0 and (reply.stats.cached_tokens > 0) == expected
    with load() as kimi:
        list(reply := kimi.reply([Message("user", "word " * 100)], GREEDY))
        assert reply.stats.disk_tokens > 0


def test_many_at_once_in_little_room(load: Load) -> None:
    """Pages run out, sequences make way and come back: answers are those of one after the other, without a disk."""
    heads = [PROMPT[: 4 * PAGE_SIZE], PROMPT[1 : 1 + 4 * PAGE_SIZE]]
    prompts = [heads[at % 2] + PROMPT[at : at + 9 * at] for at in range(6)]
    exact = {"dtype": "float32", "activations": "float32", "ctx": 448}
    with load(kv_disk=0, **exact) as kimi:
        alone = [run(kimi, each, replace(GREEDY, max_tokens=70))[0] for each in prompts]
    for _ in range(2):
        with load(**exact, cache=640) as kimi:
            params = SamplingParams(temperature=0, max_tokens=70)
            found = {index: ids for index, ids, _ in kimi.generate_many(prompts, params, batch=4)}
            assert [found[index] for index in range(6)] == alone
            engine = kimi._engine
            assert sorted(engine.kv.free + engine.cache.pages) == list(range(engine.kv.num_pages))


def test_a_failed_request_leaves_nothing(load: Load) -> None:
    def refuse(answer: object) -> Tensor | None:
        raise KimiError("No.")

    with load() as kimi, pytest.raises(KimiError, match="No."):
        list(kimi._engine.stream(Request(list(PROMPT), GREEDY, mask=refuse)))
    with load() as kimi:
        assert run(kimi, PROMPT)[1].cached_tokens == 0


def test_a_step_copies_one_block_at_most(load: Load) -> None:
    """A long request ends while another goes on; then nobody waits, and the rest is copied."""
    long = [PROMPT[at % 300] for at in range(45 * PAGE_SIZE + 1)]
    with load(ctx=3200, cache=4096) as kimi:
        engine = kimi._engine
        assert engine.disk is not None
        scheduler = engine.scheduler(2)
        for prompt, tokens in ((long, 1), (PROMPT, 30)):
            scheduler.add(Request(list(prompt), replace(GREEDY, max_tokens=tokens)))
        while len(scheduler.running) != 1 or scheduler.running[0].is_prompt:
            engine.advance(scheduler)
        owed = []
        while scheduler.running:
            owed.append(len(engine.disk._owed))
            engine.advance(scheduler)
        assert owed[:3] == [2, 1, 0]
        scheduler.close()
        assert not engine.disk._owed
    with load(ctx=3200) as kimi:
        assert run(kimi, long)[1].disk_tokens == 45 * PAGE_SIZE


def test_behind_a_service(load: Load) -> None:
    with load() as kimi:
        kimi.share(batch=2)
        first = list(kimi.generate(PROMPT, GREEDY))
    with load() as kimi, closing(Service(kimi._engine, batch=2)) as service:
        request = Request(list(PROMPT), GREEDY)
        assert list(service.stream(request)) == first and request.disk_tokens == len(PROMPT) - 1


def test_damage_is_computed_anew(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with load() as kimi:
        ids, _ = run(kimi, PROMPT)
    (path,) = (tmp_path / "kimi-local" / "kv").glob("*/*.kv")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING), load() as kimi:
        again, request = run(kimi, PROMPT)
    assert again == ids and request.disk_tokens == 4 * PAGE_SIZE
    assert "page 4 of it is damaged" in caplog.text
