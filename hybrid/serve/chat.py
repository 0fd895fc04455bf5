"""OpenAI's /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hybrid.chat.bodies import ChatBody
from hybrid.chat.message import CallPiece, Message, Part, Text, Think, ToolCall
from hybrid.errors import KimiError
from hybrid.grammar import Grammars
from hybrid.kimi import Kimi
from hybrid.likelihood import chat_logprobs
from hybrid.progress import OnProgress
from hybrid.reply import Reply
from hybrid.serve.asked import Asked, Turn, effective_thinking, params
from hybrid.serve.figures import finish_reason, timings, usage
from hybrid.serve.job import Event, Job, Prefill
from hybrid.serve.openai_shapes import Answer, ChatCompletion
from hybrid.serve.refusal import envelope, failure, to_json


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(ChatBody, Asked):
    stream_options: StreamOptions | None = None
    return_progress: bool = Field(False, description="While streaming, tell how much of the prompt is read.")


def to_turn(kimi: Kimi, body: ChatRequest) -> Turn:
    """Raises BadField for what is not there, each by its name."""
    thinking = effective_thinking(kimi, body.reasoning())
    messages = body.said()
    tools, grammar = body.form()
    sampling = params(kimi, body, thinking)
    return Turn(messages, sampling, tools, thinking, body.budget(), grammar, body.store is not False)


def start_turn(kimi: Kimi, grammars: Grammars, turn: Turn, *, call_pieces: bool) -> Callable[..., Reply]:
    """What a Job starts."""

    def start(on_progress: OnProgress) -> Reply:
        return kimi.reply(
            turn.messages,
            turn.params,
            tools=turn.tools,
            thinking=turn.thinking,
            think_budget=turn.think_budget,
            call_pieces=call_pieces,
            mask=None if turn.grammar is None else grammars.mask(turn.grammar, turn.thinking),
            keep=turn.keep,
            on_progress=on_progress,
        )

    return start


class ChatForm:
    """A reply as this API's objects, whole or in chunks."""

    def __init__(self, kimi: Kimi, body: ChatRequest, turn: Turn, reply: Reply) -> None:
        self._kimi = kimi
        self._body = body
        self._turn = turn
        self._reply = reply
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": kimi.name}
        self._told = 0  # tokens whose logprobs are told
        self._calls: list[str] = []

    async def whole(self, job: Job) -> ChatCompletion:
        parts = [event async for event in job.events() if isinstance(event, Part)]
        return {
            **self._head,  # type: ignore[typeddict-item]
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": to_answer(Message.from_parts(parts)),
                    "logprobs": self._logprobs(),
                    "finish_reason": finish_reason(self._reply),
                }
            ],
            "usage": usage(self._reply.stats),
            "timings": timings(self._reply.stats),
            "thinking": self._turn.thinking,
        }

    async def stream(self, job: Job, keep_alive_s: float) -> AsyncIterator[str]:
        yield self._event(self._chunk({"role": "assistant", "content": ""}, thinking=self._turn.thinking))
        try:
            async for event in job.events(keep_alive_s):
                if event is None:
                    yield ": keep-alive\n\n"
                elif chunk := self._told_as(event):
                    yield self._event(chunk)
            yield self._event(self._last())
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield self._event({**self._chunk({}), "choices": [], "usage": usage(self._reply.stats)})
        except KimiError as error:
            yield self._event(envelope("", failure(error)))
        yield "data: [DONE]\n\n"

    def _told_as(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Think(text):
                return self._chunk({"reasoning_content": text})
            case Text(text):
                return self._chunk({"content": text})
            case CallPiece():
                return self._chunk({"tool_calls": [self._call_delta(event)]})
            case Prefill() if self._body.return_progress:
                progress = {"total": event.total, "cache": event.cached, "processed": event.done}
                return self._chunk({}, prompt_progress={**progress, "time_ms": round(event.seconds * 1000)})
        return None

    def _call_delta(self, piece: CallPiece) -> dict[str, Any]:
        if piece.id in self._calls:
            return {"index": self._calls.index(piece.id), "function": {"arguments": piece.arguments}}
        self._calls.append(piece.id)
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"index": len(self._calls) - 1, "id": piece.id, "type": "function", "function": function}

    def _last(self) -> dict[str, Any]:
        chunk = self._chunk({}, timings=timings(self._reply.stats))
        chunk["choices"][0]["finish_reason"] = finish_reason(self._reply)
        return chunk

    def _chunk(self, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(), "finish_reason": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}

    def _logprobs(self) -> Any:
        """Of the tokens made since the last call; None where they were not asked for."""
        if not self._body.logprobs:
            return None
        new = self._reply.logprobs[self._told :]
        self._told += len(new)
        return {"content": chat_logprobs(new, self._kimi.tokenizer)}

    def _event(self, chunk: dict[str, Any]) -> str:
        return f"data: {to_json(chunk)}\n\n"


def to_answer(message: Message) -> Answer:
    """The assistant's message; its content is null where it only calls tools."""
    answer: Answer = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning_content:
        answer["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        answer["content"] = message.content or None
        answer["tool_calls"] = [to_call(call) for call in message.tool_calls]
    return answer


def to_call(call: ToolCall) -> Any:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
