"""What a chat uses of a model, be it loaded in this process (`hybrid.Kimi`) or in a server's (`hybrid.Attached`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hybrid.chat.message import Message, Part
    from hybrid.progress import OnProgress
    from hybrid.stats import Stats


class Reply(Protocol):
    """One answer being made; see `hybrid.reply.Reply`."""

    stats: Stats

    @property
    def finish_reason(self) -> str: ...

    @property
    def message(self) -> Message: ...

    def __iter__(self) -> Iterator[Part]: ...

    def stop(self) -> None: ...

    def answer_now(self) -> None: ...


class Shape(Protocol):
    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def n_routed_experts(self) -> int: ...

    @property
    def num_experts_per_tok(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...


class Encoder(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...


class Model(Protocol):
    """Its sampling (`default_params`) is a dataclass with the fields of `cli.settings.SAMPLING`."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    @property
    def ctx(self) -> int: ...

    @property
    def config(self) -> Shape: ...

    @property
    def tokenizer(self) -> Encoder: ...

    @property
    def default_thinking(self) -> bool: ...

    @property
    def generation_config(self) -> Mapping[str, Any]: ...

    def default_params(self, thinking: bool) -> Any: ...

    def count_tokens(self, messages: Sequence[Message], *, thinking: bool | None = None) -> int: ...

    def reply(
        self,
        messages: Sequence[Message],
        params: Any = None,
        *,
        thinking: bool | None = None,
        think_budget: int | None = None,
        keep: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Reply: ...

    def expert_report(self) -> dict[str, Any]: ...

    def ram_ceiling_gbps(self) -> float | None: ...

    def __enter__(self) -> Model: ...

    def __exit__(self, *error: Any) -> None: ...
