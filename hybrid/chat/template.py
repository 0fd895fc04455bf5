"""Conversation -> token ids, through the checkpoint's own chat template.

Only the template can write control tokens: foreign text (messages, names, ids, arguments, tools) goes through it in
disguise (see guard.py). The rendering is split at the special tokens; only then the text between them gets its letters
back and is encoded as ordinary text.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.chat.guard import Guard
from hybrid.chat.history import prepare
from hybrid.chat.message import Message
from hybrid.chat.sandbox import compile_template
from hybrid.chat.tokenizer import Tokenizer, read_config
from hybrid.chat.tools import declare_tools, sort_keys
from hybrid.errors import CheckpointError, KimiError

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8")
DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
MEDIA_PAD = "<|media_pad|>"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A compiled chat template. `tokens` are the variables bos_token, eos_token, ... that some templates print."""

    def __init__(self, source: str, *, tokens: Mapping[str, str] | None = None, origin: str = "this model") -> None:
        self.source = source
        self._tokens = dict(tokens or {})
        self._render = compile_template(source, origin)

    @classmethod
    def from_directory(cls, path: str | Path) -> "ChatTemplate":
        """chat_template.jinja, else the chat_template of tokenizer_config.json, else Kimi K2.5's format.

        Raises CheckpointError for a template that cannot be read or compiled.
        """
        directory = Path(path)
        config = read_config(directory)
        tokens = {name: token for name in TOKEN_VARIABLES if (token := _token_text(config.get(name)))}
        return cls(_source(directory, config), tokens=tokens, origin=str(directory))

    def render(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, to look at: special tokens cannot be told from text of the same letters."""
        variables = _variables(messages, tools or ())
        return self._render({**variables, **self._settings(thinking, add_generation_prompt)})

    def render_ids(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        media_tokens: Sequence[int] = (),
    ) -> list[int]:
        """The prompt as token ids. Messages are `Message`s or dicts of OpenAI's shape.

        `media_tokens` says for each image, in order, how many ids it takes: its <|media_pad|> is repeated so often.
        Raises KimiError when there are more or fewer images, for video, and for malformed messages or tools;
        CheckpointError when the template fails.
        """
        variables = _variables(messages, tools or ())
        guard = Guard(tokenizer.prompt_specials, variables)
        text = self._render({**guard.disguise(variables), **self._settings(thinking, add_generation_prompt)})
        if VIDEO_PLACEHOLDER in text:
            raise KimiError("Video cannot be read yet.", "Send text or single images.")
        ids = tokenizer.encode_prompt(text, guard.revealed)
        return _expand_media(ids, tokenizer.specials.get(MEDIA_PAD), media_tokens)

    def _settings(self, thinking: bool, add_generation_prompt: bool) -> dict[str, Any]:
        return {**self._tokens, "thinking": thinking, "add_generation_prompt": add_generation_prompt}


def _variables(messages: Iterable[Message | Mapping[str, Any]], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the template gets from outside. `tools_ts_str` is how K2.5's template calls the declaration it expects."""
    declared = {"tools": sort_keys(tools), "tools_ts_str": declare_tools(tools)} if tools else {"tools": None}
    return {"messages": prepare(messages), **declared}


def _source(directory: Path, config: Mapping[str, Any]) -> str:
    path = directory / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Download the file again.") from error
    named = config.get("chat_template")
    if isinstance(named, list):  # several templates with names
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}.get("default")
    return named if isinstance(named, str) else DEFAULT_TEMPLATE


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _expand_media(ids: list[int], pad: int | None, counts: Sequence[int]) -> list[int]:
    found = ids.count(pad) if pad is not None else 0
    if found != len(counts):
        raise KimiError(f"The conversation holds {found} images, but {len(counts)} were prepared.")
    remaining = iter(counts)
    return [token for i in ids for token in ([i] * next(remaining) if i == pad else [i])] if counts else ids
