"""`Attached` beside the `Kimi` that its server has: the same parts, figures and ends."""

from __future__ import annotations

import dataclasses
import platform
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.attached import Attached, Link
from hybrid.chat.message import Message, Text, Think, ToolCall, join_parts
from hybrid.errors import ContextExceeded, KimiError
from hybrid.memory.remembered import remember
from hybrid.progress import Progress
from tests.answering import answering
from tests.serve.conftest import CTX, ScriptedKimi, serving

THINKING = "say:let me think</think>the answer"
CALL = (
    "say:</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "sky"}<|tool_call_end|><|tool_calls_section_end|>'
)


@pytest.fixture(scope="module")
def attached(address: str) -> Attached:
    return Attached(address)


def greedy(kimi: Any, **more: Any) -> Any:
    return dataclasses.replace(kimi.default_params(True), temperature=0, **more)


def asked(text: str) -> list[Message]:
    return [Message("system", "be brief"), Message("user", text)]


def test_what_is_known_of_the_model(attached: Attached, kimi: ScriptedKimi) -> None:
    assert (attached.name, attached.ctx, attached.path) == (kimi.name, CTX, None)
    assert attached.default_thinking == kimi.default_thinking
    assert attached.generation_config == kimi.generation_config
    for name in ("num_hidden_layers", "n_routed_experts", "num_experts_per_tok"):
        assert getattr(attached.config, name) == getattr(kimi.config, name)
    for thinking in (True, False):
        sampling = attached.default_params(thinking)
        assert sampling.to_dict().items() <= vars(kimi.default_params(thinking)).items()
    assert attached.tokenizer.encode("some text") == kimi.tokenizer.encode("some text")
    messages = [*asked("question"), Message("assistant", "answer", "thought"), Message("user", "more")]
    for thinking in (True, False):
        assert attached.count_tokens(messages, thinking=thinking) == kimi.count_tokens(messages, thinking=thinking)
    report = kimi.expert_report()
    assert attached.expert_report() == {name: report[name] for name in ("layers", "counts", "tier", "cache")}


@pytest.mark.parametrize("text", ["hello", THINKING, CALL])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_same_answer(attached: Attached, kimi: ScriptedKimi, text: str, thinking: bool) -> None:
    replies = []
    for model in (kimi, attached):
        reply = model.reply(asked(text), greedy(model, max_tokens=60), thinking=thinking)
        replies.append((join_parts(reply), reply))
    (expected, there), (parts, here) = replies
    assert parts == expected
    assert here.finish_reason == there.finish_reason
    assert here.message == Message.from_parts(expected)
    for count in ("prompt_tokens", "thinking_tokens", "answer_tokens"):
        assert getattr(here.stats, count) == getattr(there.stats, count)
    assert here.stats.first_token_s > 0 and here.stats.decode_tokens_per_s > 0 and here.stats.ram_gbps > 0
    if text == CALL:
        kinds = [type(part) for part in parts]
        assert ToolCall in kinds and here.message.tool_calls[0].arguments == '{"at": "sky"}'


def test_nothing_is_kept_of_what_is_not_to_be(
    attached: Attached, kimi: ScriptedKimi, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reply = [], ScriptedKimi.reply

    def spy(self: ScriptedKimi, *arguments: Any, **more: Any) -> Any:
        seen.append(more["keep"])
        return reply(self, *arguments, **more)

    monkeypatch.setattr(ScriptedKimi, "reply", spy)
    for keep in (True, False):
        list(attached.reply(asked("hello"), greedy(attached, max_tokens=2), keep=keep))
    responses = Link(attached.address, None)
    for store in (None, False, True):
        responses.ask("POST", "/v1/responses", {"input": "hello", "max_output_tokens": 2, "store": store})
    assert seen == [True, False, True, False, True]


def test_a_think_budget_and_the_end_of_the_context(attached: Attached) -> None:
    reply = attached.reply(asked("hello"), greedy(attached, max_tokens=30), thinking=True, think_budget=5)
    thoughts = [part for part in reply if isinstance(part, Think)]
    assert thoughts and reply.stats.thinking_tokens <= 6 and reply.finish_reason == "length"
    full = attached.reply(asked("word " * 300), greedy(attached), thinking=True)
    for _ in full:
        pass
    assert full.finish_reason in ("context", "stop")


def test_a_prompt_that_does_not_fit_is_refused(attached: Attached) -> None:
    with pytest.raises(ContextExceeded, match="2,048"):
        attached.reply(asked("word " * 3000))


def test_the_prompt_is_reported(attached: Attached) -> None:
    seen: list[Progress] = []
    reply = attached.reply(
        asked("slow: " + "a long story " * 100), greedy(attached, max_tokens=1), on_progress=seen.append
    )
    for _ in reply:
        pass
    assert len(seen) > 1 and all(each.stage == "prefill" and each.total == seen[0].total for each in seen)
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert reply.stats.prompt_tokens == seen[0].total and reply.stats.prefill_s > 0


def test_stopping_reaches_the_server(attached: Attached, idle: Callable[[float], None]) -> None:
    reply = attached.reply(asked("hello"), greedy(attached), thinking=True)
    taken = [next(reply) for _ in range(3)]
    threading.Timer(0.1, reply.stop).start()  # while the next part is waited for
    taken += reply
    assert reply.finish_reason == "interrupted" and reply.message.interrupted
    assert Message.from_parts(taken, interrupted=True) == reply.message
    idle(5)
    early = attached.reply(asked("slow: " + "another long story " * 100), greedy(attached))
    early.stop()
    assert list(early) == [] and early.finish_reason == "interrupted"
    idle(5)


def test_answer_now_ends_the_reasoning(attached: Attached) -> None:
    reply = attached.reply(asked("hello"), greedy(attached, max_tokens=400), thinking=True)
    reply.answer_now()  # before anything is known of it
    kinds: list[type] = []
    for part in reply:
        kinds.append(type(part))
        if len(kinds) == 5:
            reply.answer_now()
    assert kinds[:5] == [Think] * 5 and Text in kinds
    reply.answer_now()  # it has ended: nothing to do


def test_what_an_answer_read_from_disk_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = []
    for _ in range(2):
        with ScriptedKimi.load(tiny, ctx=CTX, kv_disk=1 << 28) as own:
            own.asked = []
            with serving(own) as address:
                attached = Attached(address)
                reply = attached.reply(asked("word " * 300), greedy(attached, max_tokens=4))
                list(reply)
                told.append(reply.stats)
    assert told[0].disk_tokens == 0 < 256 <= told[1].disk_tokens <= told[1].cached_tokens


def test_what_the_servers_memory_can_do(attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert attached.ram_ceiling_gbps() is None, "it was never measured"
    known = {f"{platform.node()} {torch.get_num_threads()}": 25.5}
    remember(tmp_path / "kimi-local" / "bandwidth.json", known)
    assert attached.ram_ceiling_gbps() == 25.5


def test_an_error_of_the_engine_is_told(attached: Attached) -> None:
    reply = attached.reply(asked("fail: now"), greedy(attached))
    with pytest.raises(KimiError, match="not numbers. Run doctor"):
        list(reply)


def test_the_server_ends_in_the_middle(kimi: ScriptedKimi, tiny: Any) -> None:
    with ScriptedKimi.load(tiny, ctx=CTX) as own:
        own.asked = []
        with serving(own) as address:
            attached = Attached(address + "/v1/")
            reply = attached.reply(asked("hello"), greedy(attached), thinking=True)
            taken = [next(reply) for _ in range(3)]
        taken += reply
        assert reply.finish_reason == "interrupted" and reply.message == Message.from_parts(taken, interrupted=True)
    with pytest.raises(KimiError, match=r"is gone .*refused.*kimi-local serve"):
        attached.reply(asked("hello"))


def test_keys(tiny: Any) -> None:
    with ScriptedKimi.load(tiny, ctx=CTX) as own:
        own.asked = []
        with serving(own, api_key="secret") as address:
            with pytest.raises(KimiError, match="wants an API key. Give it with --api-key or as KIMI_LOCAL_API_KEY"):
                Attached(address)
            with pytest.raises(KimiError, match="does not take this API key"):
                Attached(address, api_key="wrong")
            assert Attached(address, api_key="secret").name == own.name


class _Other(BaseHTTPRequestHandler):
    """Some other server: it lists models as OpenAI does, and ends its one answer in the middle."""

    def do_GET(self) -> None:
        self._answer(200, b'{"object": "list", "data": [{"id": "x", "object": "model"}]}')

    def do_POST(self) -> None:
        chunk = b'data: {"id": "a", "choices": [{"delta": {"content": "begun"}, "finish_reason": null}]}\n\n'
        self._answer(200, b": keep-alive\n\n" + chunk + b"data: {")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def other() -> Iterator[str]:
    with answering(_Other) as address:
        yield address


def test_another_server_is_told_apart(other: str) -> None:
    with pytest.raises(KimiError, match="is no kimi-local"):
        Attached(other)
    with pytest.raises(KimiError, match="no server's address"):
        Link("localhost:8080", None)


def test_an_answer_cut_off_is_an_error(other: str, attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_link", Link(other, None))
    began = time.monotonic()
    reply = attached.reply(asked("hello"), greedy(attached))
    assert next(reply) == Text("begun")
    with pytest.raises(KimiError, match="is gone"):
        next(reply)
    assert reply.finish_reason == "interrupted" and time.monotonic() - began < 10
