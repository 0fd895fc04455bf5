"""Log-probabilities of tokens in the shapes of OpenAI's two APIs. A token may be part of a letter: its bytes tell."""

from collections.abc import Sequence

from typing_extensions import TypedDict

from hybrid.chat.tokenizer import Tokenizer
from hybrid.engine.request import TokenLogprobs


class Likely(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLikelihood(Likely):
    top_logprobs: list[Likely]


class Logprobs(TypedDict):
    """Of every token made, reasoning included, before penalties and temperature."""

    content: list[TokenLikelihood]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(made: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[TokenLikelihood]:
    return [
        {
            **_likely(tokenizer, each.token, each.logprob),
            "top_logprobs": [_likely(tokenizer, token, logprob) for token, logprob in each.top],
        }
        for each in made
    ]


def text_logprobs(made: Sequence[TokenLogprobs | int], tokenizer: Tokenizer) -> TextLogprobs:
    """A bare id stands for a token before which nothing was said, so that nothing is known of its likelihood."""
    shape: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = 0
    for each in made:
        token, logprob, top = (each, None, None) if isinstance(each, int) else (each.token, each.logprob, each.top)
        text = token_text(tokenizer, token)
        shape["tokens"].append(text)
        shape["token_logprobs"].append(logprob)
        shape["top_logprobs"].append(None if top is None else {token_text(tokenizer, i): value for i, value in top})
        shape["text_offset"].append(offset)
        offset += len(text)
    return shape


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special=False)


def _likely(tokenizer: Tokenizer, token: int, logprob: float) -> Likely:
    raw = tokenizer.token_bytes(token, skip_special=False)
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(raw)}
