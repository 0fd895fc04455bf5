"""Answers held to a form: a grammar says which tokens may come next. Reasoning, which comes first, stays free."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hybrid.chat.parser import CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, THINK_END
from hybrid.chat.tokenizer import NUM_SPECIALS, SPLIT_PATTERN
from hybrid.errors import KimiError, MissingExtra
from hybrid.kimi import Kimi
from hybrid.serve.refusal import Refusal, unsupported

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = Callable[[Sequence[int]], Tensor | None]
ANY_OBJECT = {"type": "object"}
BLANKS = r"\n? {0,40}"


def answer_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """The rule of an answer in that format, in Lark; None where any text will do. Raises Refusal."""
    match (response_format or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return _json(ANY_OBJECT)
        case "json_schema":
            given = (response_format or {}).get("json_schema", response_format)
            schema = given.get("schema") if isinstance(given, Mapping) else None
            if not isinstance(schema, dict):
                raise Refusal(400, "json_schema has no `schema` object.", param="response_format")
            return _json(schema)
        case kind:
            known = "text, json_object and json_schema"
            raise unsupported("response_format", f"Answers of type {kind!r} are not here: {known} are.")


def calls_grammar(tools: Sequence[Mapping[str, Any]], name: str | None, param: str = "tool_choice") -> str:
    """The rule of an answer that calls these tools; of one call of the tool `name` if that is given. Raises Refusal."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    chosen = [function for function in functions if name is None or function.get("name") == name]
    if not chosen:
        what = "There are no tools to call." if name is None else f"There is no tool {name!r}."
        raise Refusal(400, what, param=param)
    calls = " | ".join(f"( {_call(function)} )" for function in chosen)
    return f"{SECTION_BEGIN[0]} ( {calls} ){'+' if name is None else ''} {SECTION_END[0]}"


def _call(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters")
    schema = parameters if isinstance(parameters, dict) and parameters else ANY_OBJECT
    prefix = json.dumps(f"functions.{function.get('name')}:")
    return f"{CALL_BEGIN} {prefix} /[0-9]{{1,3}}/ {CALL_ARGUMENTS} {_json(schema)} {CALL_END}"


def _json(schema: Mapping[str, Any]) -> str:
    """A rule for values of `schema`, with room for layout, but not for blanks without end."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANKS}})


def either(*rules: str | None) -> str | None:
    """The grammar of an answer that follows one of `rules`; None where there are none."""
    found = [rule for rule in rules if rule is not None]
    return "start: " + " | ".join(f"( {rule} )" for rule in found) if found else None


class Grammars:
    """Masks for one model's answers. Its vocabulary is prepared once, which takes a second for a large one."""

    def __init__(self, kimi: Kimi) -> None:
        self._kimi = kimi
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def mask(self, grammar: str, thinking: bool) -> Mask:
        """For a reply that reasons first if `thinking`. Raises Refusal for a schema that cannot be kept to.

        Raises MissingExtra where llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            remedy = "The server needs: pip install 'kimi-local[grammar]'."
            raise MissingExtra("llguidance is not installed.", remedy) from error
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            why = matcher.get_error().splitlines()[0]
            raise Refusal(400, f"The schema cannot be kept to: {why}.", code="unsupported_schema")
        return _Held(matcher, self._kimi, thinking)

    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        with self._lock:
            if self._prepared is None:
                tokenizer, size = self._kimi.tokenizer, self._kimi.config.vocab_size
                ranks = range(tokenizer.vocab_size - NUM_SPECIALS)
                self._prepared = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
                    encoder={tokenizer.token_bytes(rank): rank for rank in ranks},
                    special_tokens={name: token for name, token in tokenizer.specials.items() if token < size},
                    pattern=SPLIT_PATTERN,
                    eos_token=sorted(self._kimi.stop_ids),
                    n_vocab=size,
                )
            return self._prepared


class _Held:
    """One answer's mask: until the reasoning has ended anything but the end of the answer is allowed."""

    def __init__(self, matcher: "LLMatcher", kimi: Kimi, thinking: bool) -> None:
        self._matcher = matcher
        self._size = kimi.config.vocab_size
        specials = kimi.tokenizer.specials
        self._think_end = specials.get(THINK_END)
        self._section = specials.get(SECTION_BEGIN[0])
        self._free = thinking and self._think_end is not None
        self._seen = 0
        self._goes_on = torch.ones(self._size, dtype=torch.bool)
        self._goes_on[list(kimi.stop_ids)] = False
        if self._section is not None:
            self._goes_on[self._section] = False

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """bool [vocab]: what may come after `ids`, all of the answer so far."""
        for token in ids[self._seen :]:
            if self._free:
                self._free = token != self._think_end
            elif not self._matcher.consume_token(token):
                raise KimiError("The answer has left the form it was to have.", "Ask again, or without a form.")
        self._seen = len(ids)
        if self._free:
            return self._goes_on
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._size, bitorder="little")
        return torch.from_numpy(allowed.astype(bool))
