"""Text to ids and back, and what lies between: for programs that count tokens or send ids."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from hybrid.chat.bodies import ChatMessage, TokenId, read_messages, require_ids
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.serve.asked import effective_thinking
from hybrid.serve.refusal import Refusal, bad_request


class TokenizeRequest(BaseModel):
    """`prompt` (also `content`): text, in which names of control tokens are ordinary text; or `messages`."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    content: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tokens: list[TokenId]


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The same text by both names that programs look for."""

    prompt: str
    content: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    vocab_size: int
    eos_token: str
    eos_token_ids: list[int]
    bos_token: None
    special_tokens: dict[str, int]
    chat_template: str
    max_model_len: int


def tokenize(kimi: Kimi, body: TokenizeRequest) -> Tokenized:
    ids = _ids(kimi, body)
    strings = [kimi.tokenizer.decode([i], skip_special=False) for i in ids] if body.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "max_model_len": kimi.ctx, "token_strs": strings}


def _ids(kimi: Kimi, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        text = body.prompt if body.prompt is not None else body.content
        if text is None:
            raise Refusal(400, "There is no text: send `prompt` or `messages`.", param="prompt")
        return kimi.tokenizer.encode(text)
    messages = read_messages(message.model_dump() for message in body.messages)
    thinking = effective_thinking(kimi, body.thinking)
    try:
        return kimi.template.render_ids(messages, kimi.tokenizer, tools=body.tools, thinking=thinking)
    except KimiError as error:
        raise bad_request(error) from error


def detokenize(kimi: Kimi, body: DetokenizeRequest) -> Detokenized:
    require_ids(body.tokens, kimi.config.vocab_size, "tokens")
    text = kimi.tokenizer.decode(body.tokens, skip_special=False)
    return {"prompt": text, "content": text}


def tokenizer_info(kimi: Kimi) -> TokenizerInfo:
    tokenizer, stops = kimi.tokenizer, sorted(kimi.stop_ids)
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "vocab_size": kimi.config.vocab_size,
        "eos_token": tokenizer.decode(stops[:1], skip_special=False),
        "eos_token_ids": stops,
        "bos_token": None,
        "special_tokens": tokenizer.specials,
        "chat_template": kimi.template.source,
        "max_model_len": kimi.ctx,
    }
