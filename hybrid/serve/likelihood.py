"""Log-probabilities of tokens in the shapes of OpenAI's two APIs. A token may be part of a letter: its bytes tell."""

from collections.abc import Sequence

from hybrid.chat.tokenizer import Tokenizer
from hybrid.engine.request import TokenLogprobs, token_logprobs
from hybrid.kimi import Kimi
from hybrid.serve.openai_shapes import Likely, TextLogprobs, TokenLikelihood


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


def prompt_logprobs(kimi: Kimi, prompt: Sequence[int], count: int) -> list[TokenLogprobs | int]:
    """How likely the model finds each id of `prompt` after those before it; the first one stands as it is."""
    rows = kimi.logits(prompt[:-1]) if len(prompt) > 1 else ()
    told = [token_logprobs(row, token, count) for row, token in zip(rows, prompt[1:], strict=True)]
    return [prompt[0], *told]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special=False)


def _likely(tokenizer: Tokenizer, token: int, logprob: float) -> Likely:
    raw = tokenizer.token_bytes(token, skip_special=False)
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(raw)}
