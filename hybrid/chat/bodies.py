"""Bodies of OpenAI's two older APIs, whole: what is said, beside what is wished of the answer (`wishes`).

Read in one way over HTTP and in a file. What is wrong is named: by pydantic's ValidationError, which `wishes.explained`
puts into words, or by BadField.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from hybrid.chat.forms import BadField
from hybrid.chat.message import Message
from hybrid.chat.tokenizer import Tokenizer
from hybrid.chat.wishes import ChatWishes, TextWishes
from hybrid.errors import KimiError

MESSAGES = "messages[{}]"
TokenId = Annotated[int, Field(ge=0)]
PromptText = str | list[int]


def _prompts(given: Any) -> list[PromptText]:
    """The prompts in `given`, which is one or several: each a text or ids."""
    if _is_prompt(given):
        return [given]
    if not isinstance(given, list) or not all(map(_is_prompt, given)):
        raise PydanticCustomError("prompt", "Input should be a text, a list of token ids, or a list of either")
    return given


def _is_prompt(given: Any) -> bool:
    if isinstance(given, list):
        return bool(given) and all(type(token) is int and token >= 0 for token in given)
    return isinstance(given, str)


Spelling = str | list[str] | list[TokenId] | list[list[TokenId]]
Prompts = Annotated[Any, PlainValidator(_prompts, json_schema_input_type=Spelling)]


class ChatMessage(BaseModel):
    """`content` may be a list of text parts; `reasoning_content` (also `reasoning`) is what was thought before it."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ChatBody(ChatWishes):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage]

    def said(self) -> list[Message]:
        """The conversation. Raises BadField for pictures and for other shapes."""
        return read_messages(message.model_dump() for message in self.messages)


class TextBody(TextWishes):
    """Of /v1/completions. `prompt`: text, in which names of control tokens are ordinary text, or ids, or a list of
    either."""

    prompt: Prompts

    def prompts(self) -> Sequence[PromptText]:
        """One or more, none of them empty. Raises BadField."""
        if not self.prompt or not all(self.prompt):
            raise BadField("There is an empty prompt, which nothing can follow.", "prompt")
        return list(self.prompt)


def read_messages(messages: Iterable[Mapping[str, Any]], place: str = MESSAGES) -> list[Message]:
    """Messages in OpenAI's shape as the template wants them; `place` is what a body calls the one of that number.

    Raises BadField for pictures and for other shapes, and if there are none.
    """
    found = []
    for number, message in enumerate(messages):
        where = place.format(number)
        _refuse_media(message.get("content"), where)
        try:
            found.append(Message.from_dict(message))
        except KimiError as error:
            raise BadField(f"{where}: {error}", where) from error
    if not found:
        raise BadField("There are no messages.", place.partition("[")[0])
    return found


def _refuse_media(content: Any, where: str) -> None:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in ("text", None):
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, Mapping) else image
            refuse_media(str(kind), str(url or ""), where)


def refuse_media(kind: str, url: str, where: str) -> None:
    """Raise the BadField of content that is not text: whatever it names is neither fetched nor opened."""
    scheme = url.partition(":")[0].casefold()
    if scheme in ("http", "https"):
        why = "Pictures are not fetched from addresses: no request leads to others."
    elif scheme == "file":
        why = "Files of this machine are not read because a request names them."
    else:
        why = "Only text is read at the moment."
    raise BadField(f"{where}: {kind} is refused. {why}", where, f"unsupported_{kind}")


def prompt_ids(tokenizer: Tokenizer, prompt: PromptText, size: int) -> list[int]:
    """`prompt` as ids of a model that has `size` tokens. Raises BadField for ids that are none of these."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    require_ids(prompt, size, "prompt")
    return list(prompt)


def require_ids(ids: Sequence[int], size: int, param: str) -> None:
    """Raise BadField for an id that is none of `size`."""
    if ids and max(ids) >= size:
        raise BadField(f"Token {max(ids)} does not exist: there are {size:,}.", param)
