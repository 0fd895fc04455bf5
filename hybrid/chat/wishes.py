"""What a body of OpenAI's APIs asks of an answer: sampling, form, reasoning. It means the same over HTTP and in a file.

Input is read tolerantly: unknown fields are ignored, nulls count as absent. What is known and cannot be done is refused
by name, so that no answer quietly differs from what was asked for: by pydantic's ValidationError, which `explained`
puts into words, or by BadField.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from hybrid.chat.forms import UNSUPPORTED, BadField, answer_grammar, held_to
from hybrid.chat.switch import wanted_thinking
from hybrid.errors import KimiError

MOST_LIKELY = 20  # ids that are told of for every token
GREEDY = 1e-3  # a temperature below which logits divided by it would overflow, and which is greedy anyway
SEEDS = 1 << 63
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
SWITCHES = ("thinking", "chat_template_kwargs", "enable_thinking", "reasoning_effort")
_ID = re.compile("[0-9]{1,9}")
# Field -> the values that ask for nothing beyond what is done anyway, and what to tell whoever asks for more.
_LIMITS: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "One answer per request is made here. Send the request several times."),
    "best_of": ((1,), "One answer per prompt is made here."),
    "suffix": (("",), "This model was not trained to fill in."),
    "functions": (([],), "`functions` is an old spelling. Send `tools`."),
    "modalities": (([], ["text"]), "Answers are text."),
    "audio": ((), "Answers are text."),
}


def stops(given: Any) -> tuple[str, ...] | None:
    """The strings that end an answer; empty ones, which some programs send, end nothing."""
    strings = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise PydanticCustomError("stop", "Input should be a text or a list of texts")
    return tuple(string for string in strings if string) or None


def _biases(given: Any) -> tuple[tuple[int, float], ...] | None:
    """What is added to the logits of ids; whether the model has these ids is not known here."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [] if given is None else [("", 0)]
    if not all(isinstance(key, str) and _ID.fullmatch(key) and _is_bias(value) for key, value in pairs):
        raise PydanticCustomError("logit_bias", "Input should give ids of tokens numbers between -100 and 100")
    return tuple((int(key), value) for key, value in pairs) or None


def _is_bias(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 100


def _anything(given: Any) -> Any:
    return given


class Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class ThinkingSwitch(Tolerant):
    """`{"type": "enabled" | "disabled"}`, as Moonshot and Anthropic write it."""

    type: str
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


Positive = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Likeliest = Annotated[int, Field(ge=0, le=MOST_LIKELY)]
Stop = Annotated[Any, PlainValidator(stops, json_schema_input_type=str | list[str] | None)]
Biases = Annotated[Any, PlainValidator(_biases, json_schema_input_type=dict[str, float] | None)]
Choice = Annotated[Any, PlainValidator(_anything, json_schema_input_type=str | dict[str, Any] | None)]
Switch = Annotated[Any, PlainValidator(_anything, json_schema_input_type=ThinkingSwitch | bool | str | None)]


class Sampled(Tolerant):
    """What every API has."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = Field(None, description="0: no limit.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None

    def sampling(self) -> dict[str, Any]:
        """What is given, by the names of `SamplingParams`."""
        given = {name: getattr(self, name, None) for name in SAMPLING}
        if self.temperature is not None and self.temperature < GREEDY:
            given["temperature"] = 0
        if self.seed is not None:
            given["seed"] = self.seed % SEEDS
        return known(given)


class Penalised(Sampled):
    """What OpenAI's two older APIs have beyond that."""

    stop: Stop = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: Biases = None
    n: int | None = None

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | known({"stop": self.stop, "logit_bias": self.logit_bias})

    @model_validator(mode="after")
    def _can_be_done(self) -> "Penalised":
        """Raises BadField, which is no error of pydantic's."""
        for name, (harmless, why) in _LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and value not in harmless:
                raise BadField(f"{name}: {why}", name, UNSUPPORTED)
        return self


class TextWishes(Penalised):
    """Of /v1/completions."""

    max_tokens: Positive | None = None
    logprobs: Likeliest | None = None
    suffix: str | None = None
    best_of: int | None = None

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | known({"max_tokens": self.max_tokens, "logprobs": self.logprobs})


class ChatWishes(Penalised):
    """Of /v1/chat/completions. Whether to reason can be said as `thinking`, `chat_template_kwargs`, `enable_thinking`
    or `reasoning_effort`."""

    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = Field(None, description="Counts before `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice = None
    response_format: dict[str, Any] | None = None
    thinking: Switch = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: Positive | None = Field(None, description="End the reasoning after so many tokens.")
    store: bool | None = Field(None, description="`false`: nothing of this stays on disk.")
    functions: Any = None
    modalities: list[str] | None = None
    audio: Any = None

    def sampling(self) -> dict[str, Any]:
        told = (self.top_logprobs or 0) if self.logprobs else None
        longest = self.max_completion_tokens or self.max_tokens
        return super().sampling() | known({"max_tokens": longest, "logprobs": told})

    def form(self) -> tuple[list[dict[str, Any]] | None, str | None]:
        """The tools to declare, and the grammar that the answer is held to. Raises BadField."""
        return held_to(self.tools, self.tool_choice, answer_grammar(self.response_format))

    def reasoning(self) -> bool | None:
        """Whether to reason; None leaves it to the model. Raises BadField."""
        try:
            return wanted_thinking({name: getattr(self, name) for name in SWITCHES})
        except KimiError as error:
            raise BadField(str(error), "thinking") from error

    def budget(self) -> int | None:
        """The most tokens of reasoning. Raises BadField."""
        nested = self.thinking.get("budget_tokens") if isinstance(self.thinking, Mapping) else None
        if nested is not None and (type(nested) is not int or nested < 1):
            raise BadField("thinking: budget_tokens should be 1 or more.", "thinking")
        return self.thinking_budget or nested


def known(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without what is None."""
    return {name: value for name, value in given.items() if value is not None}


def require_tokens(sampling: Mapping[str, Any], size: int) -> None:
    """Raise BadField for a bias of an id that is none of `size`."""
    wrong = [token for token, _ in sampling.get("logit_bias", ()) if token >= size]
    if wrong:
        raise BadField(f"logit_bias names {wrong[0]}, and there are {size:,} tokens.", "logit_bias")


def explained(errors: Sequence[Any], above: Iterable[str] = ()) -> tuple[str, str | None]:
    """(message, field) of the first of pydantic's `errors`, its path without a step that is `above` the body."""
    first = errors[0]
    field = ".".join(str(step) for step in first["loc"] if step not in above) or None
    return f"{field or 'The body is no JSON object'}: {first['msg']}.", field
