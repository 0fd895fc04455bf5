"""Anthropic's /v1/messages: the same conversations in blocks."""

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from hybrid.chat.bodies import read_messages, refuse_media
from hybrid.chat.forms import held_to
from hybrid.chat.message import CallPiece, Message, Text, Think, ToolCall
from hybrid.chat.wishes import Positive, Sampled, ThinkingSwitch, stops
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.reply import Reply
from hybrid.serve.asked import Asked, Turn, effective_thinking, params
from hybrid.serve.job import Event, Job
from hybrid.serve.refusal import ANTHROPIC, Refusal, envelope, failure, to_json, unsupported
from hybrid.stats import Stats

Blocks = str | list[dict[str, Any]]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class BlockMessage(BaseModel):
    """Content is text, or blocks: text, thinking, tool_use and tool_result."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Blocks


class Conversation(Sampled, Asked):
    """What the prompt is made from."""

    messages: list[BlockMessage]
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingSwitch | None = None


class MessagesRequest(Conversation):
    """Without `thinking` the model does not reason, as this API has it."""

    max_tokens: Positive
    stop_sequences: list[str] | None = None


class BlockUsage(TypedDict):
    """`input_tokens` without those found in the cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class BlockAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: BlockUsage


class TokenCount(TypedDict):
    input_tokens: int


def to_turn(kimi: Kimi, body: MessagesRequest) -> Turn:
    """Raises Refusal and BadField for what is not there, each by its name."""
    messages, tools, thinking = conversation(kimi, body)
    tools, grammar = held_to(tools, _choice(body), None)
    sampling = params(kimi, body, thinking, max_tokens=body.max_tokens, stop=stops(body.stop_sequences))
    budget = body.thinking.budget_tokens if body.thinking else None
    return Turn(messages, sampling, tools, thinking, budget, grammar)


def _choice(body: Conversation) -> str | dict[str, Any]:
    """tool_choice as chat/completions has it."""
    choice = body.tool_choice or {}
    kind = choice.get("type", "auto")
    return {"name": choice.get("name")} if kind == "tool" else {"any": "required"}.get(str(kind), str(kind))


def conversation(kimi: Kimi, body: Conversation) -> tuple[Sequence[Message], list[dict[str, Any]] | None, bool]:
    """Messages, tools and whether to reason."""
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        turns += _turns(message, f"messages[{number}]")
    thinking = effective_thinking(kimi, body.thinking is not None and body.thinking.type != "disabled")
    tools = None if _choice(body) == "none" else [_tool(tool) for tool in body.tools or ()] or None
    return read_messages(turns, "messages"), tools, thinking


def _turns(message: BlockMessage, where: str) -> Iterable[dict[str, Any]]:
    """One message in OpenAI's shape, after one for each result of a tool that it brings."""
    blocks = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
    turn: dict[str, Any] = {"role": message.role, "content": "", "tool_calls": []}
    for block in blocks:
        match block.get("type"):
            case "text":
                turn["content"] += str(block.get("text", ""))
            case "thinking":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + str(block.get("thinking", ""))
            case "redacted_thinking":
                pass  # nobody here can read it
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                turn["tool_calls"].append({"id": block.get("id"), "function": function})
            case "tool_result":
                content = _text(block.get("content") or "", where)
                yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            case kind:
                _refuse_block(kind, block, where)
    if turn["content"] or turn["tool_calls"] or message.role == "assistant" or not blocks:
        yield turn


def _text(content: Blocks, where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.get("type") != "text":
            _refuse_block(block.get("type"), block, where)
    return "".join(str(block.get("text", "")) for block in content)


def _refuse_block(kind: Any, block: Mapping[str, Any], where: str) -> None:
    source = block.get("source")
    refuse_media(str(kind), str(source.get("url") or "") if isinstance(source, Mapping) else "", where)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise unsupported("tools", f"The tool {kind!r} would run at Anthropic and is not here.")
    if not isinstance(tool.get("name"), str):
        raise Refusal(400, "A tool has no name.", param="tools")
    function = {"name": tool["name"], "parameters": tool.get("input_schema") or {}}
    return {"type": "function", "function": function | {key: tool[key] for key in ("description",) if tool.get(key)}}


def usage(stats: Stats) -> BlockUsage:
    return {
        "input_tokens": stats.prefilled_tokens,
        "cache_read_input_tokens": stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": stats.generated_tokens,
    }


class BlockForm:
    """A reply as this API's objects, whole or in events."""

    def __init__(self, kimi: Kimi, reply: Reply) -> None:
        self._reply = reply
        self._model = kimi.name
        self._id = f"msg_{uuid.uuid4().hex}"
        self._index = -1
        self._open: str | None = None  # what the open block is: its kind, or the id of a call

    async def whole(self, job: Job) -> BlockAnswer:
        parts = [event async for event in job.events() if isinstance(event, Think | Text | ToolCall)]
        message = Message.from_parts(parts)
        blocks: list[dict[str, Any]] = []
        if message.reasoning_content:
            blocks.append({"type": "thinking", "thinking": message.reasoning_content, "signature": ""})
        if message.content:
            blocks.append({"type": "text", "text": message.content})
        blocks += [_call_block(call.id, call.name, parsed(call.arguments)) for call in message.tool_calls]
        return self._message(blocks, self._stop())

    async def stream(self, job: Job, keep_alive_s: float) -> AsyncIterator[str]:
        yield _event({"type": "message_start", "message": self._message([], {})})
        try:
            async for event in job.events(keep_alive_s):
                for told in [{"type": "ping"}] if event is None else self._told_as(event):
                    yield _event(told)
        except KimiError as error:
            yield _event(envelope(ANTHROPIC, failure(error)))
            return
        for told in self._close():
            yield _event(told)
        yield _event({"type": "message_delta", "delta": self._stop(), "usage": usage(self._reply.stats)})
        yield _event({"type": "message_stop"})

    def _message(self, blocks: list[dict[str, Any]], stop: Mapping[str, Any]) -> BlockAnswer:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": stop.get("stop_reason"),
            "stop_sequence": stop.get("stop_sequence"),
            "usage": usage(self._reply.stats),
        }

    def _stop(self) -> dict[str, Any]:
        found = self._reply.stop_string
        reasons: dict[str, StopReason] = {"stop": "stop_sequence" if found else "end_turn", "tool_calls": "tool_use"}
        reason = reasons.get(self._reply.finish_reason, "max_tokens")
        return {"stop_reason": reason, "stop_sequence": found or None}

    def _told_as(self, event: Event) -> Iterable[dict[str, Any]]:
        match event:
            case Think(text):
                yield from self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case Text(text):
                yield from self._enter("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case CallPiece(call_id, name, arguments):
                yield from self._enter(call_id, _call_block(call_id, name, {}))
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _enter(self, what: str, block: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if self._open == what:
            return
        yield from self._close()
        self._open = what
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self) -> Iterable[dict[str, Any]]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _call_block(call_id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def parsed(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; what the model wrote instead of one stands in it as it is."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _event(event: Mapping[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {to_json(event)}\n\n"
