"""OpenAI's /v1/responses, without memory: every request brings its whole conversation as items."""

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from hybrid.chat.bodies import read_messages, refuse_media
from hybrid.chat.forms import answer_grammar, held_to
from hybrid.chat.message import CallPiece, Message, Text, Think, ToolCall
from hybrid.chat.switch import wanted_thinking
from hybrid.chat.wishes import Positive, Sampled
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.reply import Reply
from hybrid.serve.asked import Asked, Turn, effective_thinking, params
from hybrid.serve.job import Event, Job
from hybrid.serve.refusal import Refusal, failure, to_json, unsupported

NEEDS_MEMORY = ("previous_response_id", "conversation", "background", "prompt")


class Effort(BaseModel):
    model_config = ConfigDict(extra="ignore")

    effort: str | None = None


class ResponseRequest(Sampled, Asked):
    """`input` is a text, or items: messages, reasoning, function_call and function_call_output."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: Effort | None = None
    text: dict[str, Any] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = None
    store: bool | None = Field(None, description="`false`: nothing of this stays on the server's disk.")
    prompt: Any = None


class ItemUsage(TypedDict):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ItemAnswer(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    usage: ItemUsage | None


def to_turn(kimi: Kimi, body: ResponseRequest) -> Turn:
    """Raises Refusal and BadField for what is not there, each by its name."""
    for name in NEEDS_MEMORY:
        if getattr(body, name):
            raise unsupported(name, "Nothing is kept between requests: send the whole conversation as `input`.")
    effort = body.reasoning.effort if body.reasoning else None
    thinking = effective_thinking(kimi, wanted_thinking({"reasoning_effort": effort}))
    answer = answer_grammar((body.text or {}).get("format"))
    tools, grammar = held_to([_tool(tool) for tool in body.tools or ()], body.tool_choice, answer)
    sampling = params(kimi, body, thinking, max_tokens=body.max_output_tokens)
    return Turn(_messages(body), sampling, tools, thinking, grammar=grammar, keep=body.store is not False)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A flat function as chat/completions writes it."""
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise unsupported("tools", f"The tool {tool.get('type')!r} is not here: tools are functions with a name.")
    keys = ("name", "description", "parameters")
    return {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}


def _messages(body: ResponseRequest) -> list[Message]:
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        _add(turns, item, f"input[{number}]")
    return read_messages(turns, "input")  # of which several items may be one message


def _add(turns: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """What an item says; the reasoning, text and calls of one answer become one message."""
    match item.get("type", "message"):
        case "message" if item.get("role") == "assistant":
            _assistant(turns)["content"] += _text(item.get("content"), where)
        case "message":
            turns.append({"role": item.get("role"), "content": _text(item.get("content"), where)})
        case "reasoning":
            _assistant(turns)["reasoning_content"] += _text(item.get("content") or [], where)
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            _assistant(turns)["tool_calls"].append({"id": item.get("call_id"), "function": function})
        case "function_call_output":
            content = _text(item.get("output"), where)
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        case kind:
            raise unsupported(where, f"Items of type {kind!r} are not read here.")


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that the last turns belong to, a new one if none has begun."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
    return turns[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{where} has no content.", param=where)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("input_text", "output_text", "reasoning_text", "text"):
            refuse_media(str(kind), str(part.get("image_url") or "") if isinstance(part, Mapping) else "", where)
    return "".join(str(part.get("text", "")) for part in content)


class ItemForm:
    """A reply as this API's objects, whole or in events."""

    def __init__(self, kimi: Kimi, body: ResponseRequest, reply: Reply) -> None:
        self._reply = reply
        self._model = kimi.name
        self._body = body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # what the last item is: its kind, or the id of a call
        self._number = 0

    async def whole(self, job: Job) -> ItemAnswer:
        async for event in job.events():
            if isinstance(event, ToolCall):
                event = CallPiece(event.id, event.name, event.arguments)
            for _ in self._told_as(event):
                pass  # the items that the events tell of are the answer
        self._close_quietly()
        return self._response(self._status())

    async def stream(self, job: Job, keep_alive_s: float) -> AsyncIterator[str]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._response("in_progress")})
        try:
            async for event in job.events(keep_alive_s):
                if event is None:
                    yield ": keep-alive\n\n"
                for told in self._told_as(event):
                    yield self._event(told)
        except KimiError as error:
            facts = {"code": "server_error", "message": failure(error).message}
            yield self._event({"type": "response.failed", "response": self._response("failed", error=facts)})
            return
        for told in self._close():
            yield self._event(told)
        status = self._status()
        yield self._event({"type": f"response.{status}", "response": self._response(status)})

    def _status(self) -> Literal["completed", "incomplete"]:
        return "completed" if self._reply.finish_reason in ("stop", "tool_calls") else "incomplete"

    def _response(self, status: Any, error: dict[str, str] | None = None) -> ItemAnswer:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [] if status == "in_progress" else self._items,
            "parallel_tool_calls": True,
            "tool_choice": self._body.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": False, **tool} for tool in self._body.tools or ()],
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> ItemUsage:
        stats = self._reply.stats
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": stats.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        }

    def _told_as(self, event: Event | None) -> Iterable[dict[str, Any]]:
        match event:
            case Think(text):
                yield from self._enter("reasoning", {"type": "reasoning", "summary": [], "content": []})
                yield from self._say("reasoning_text", text)
            case Text(text):
                yield from self._enter("message", {"type": "message", "role": "assistant", "content": []})
                yield from self._say("output_text", text)
            case CallPiece(call_id, name, arguments):
                call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                yield from self._enter(call_id, call)
                self._items[-1]["arguments"] += arguments
                yield self._about("response.function_call_arguments.delta", delta=arguments)

    def _enter(self, what: str, item: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if self._open == what:
            return
        yield from self._close()
        self._open = what
        self._items.append({"id": f"item_{uuid.uuid4().hex}", "status": "in_progress", **item})
        yield self._item_event("added")

    def _say(self, kind: str, text: str) -> Iterable[dict[str, Any]]:
        """A text's next piece, in the only part that an item has."""
        content = self._items[-1]["content"]
        if not content:
            content.append(_part(kind))
            yield self._about("response.content_part.added", content_index=0, part=_part(kind))
        content[0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._about(f"response.{kind}.delta", content_index=0, delta=text, **more)

    def _close(self) -> Iterable[dict[str, Any]]:
        if self._open is None:
            return
        item, self._open = self._items[-1], None
        item["status"] = "completed"
        if item["type"] == "function_call":
            yield self._about("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._about(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._about("response.content_part.done", content_index=0, part=part)
        yield self._item_event("done")

    def _close_quietly(self) -> None:
        for _ in self._close():
            pass

    def _item_event(self, what: str) -> dict[str, Any]:
        index = len(self._items) - 1
        return {"type": f"response.output_item.{what}", "output_index": index, "item": self._items[-1]}

    def _about(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, **more}

    def _event(self, event: dict[str, Any]) -> str:
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\ndata: {to_json(numbered)}\n\n"


def _part(kind: str) -> dict[str, Any]:
    return {"type": kind, "text": ""} | ({"annotations": []} if kind == "output_text" else {})
