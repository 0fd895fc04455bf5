"""`Attached`: a model that a `kimi-local serve` has loaded, talked to over HTTP as one would talk to a `Kimi`."""

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from hybrid.attached_reply import AttachedReply
from hybrid.chat.message import Message
from hybrid.errors import ContextExceeded, KimiError
from hybrid.progress import OnProgress, ignore

CONNECT_S = 10.0
SILENCE_S = 90.0  # the server sends a sign of life every few seconds
FIGURES_S = 5.0  # what is only told beside an answer is not worth a longer wait
KEY_REMEDY = "Give it with --api-key or as KIMI_LOCAL_API_KEY, or load the model here with --attach never."


@dataclass(frozen=True)
class Sampling:
    """The settings of an answer that a conversation can change; `hybrid.SamplingParams` without its weight."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Shape:
    """What is known of the model's configuration."""

    num_hidden_layers: int
    n_routed_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int  # the server's context: only starting it anew gives it another


class Link:
    """Requests to one server. Every request has a connection of its own, so that closing it stops the work for it."""

    def __init__(self, address: str, api_key: str | None) -> None:
        """Raises KimiError for what is no address."""
        self.address = address.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KimiError(f"{address} is no server's address.", "It looks like http://127.0.0.1:8080.")
        self._host, self._port = parts.hostname, parts.port
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"content-type": "application/json", "connection": "close"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, patience: float = SILENCE_S
    ) -> dict[str, Any]:
        """The JSON object of the answer. Raises KimiError for a refusal, for a server that is gone, and for one that
        is silent for `patience` seconds."""
        with self.open(method, path, body, patience) as exchange:
            return exchange.json()

    def open(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, patience: float = SILENCE_S
    ) -> "Exchange":
        """An answer whose body is to be read. Raises as `ask`."""
        connection = self._kind(self._host, self._port, timeout=min(CONNECT_S, patience))
        try:
            connection.connect()
            connection.sock.settimeout(patience)
            exchange = Exchange(connection, self.gone)
            exchange.send(method, path, None if body is None else json.dumps(body), self._headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.gone(error) from error
        if exchange.status >= 400:
            with exchange:
                raise self._refusal(exchange)
        return exchange

    def gone(self, error: Exception | None = None) -> KimiError:
        """What to tell when there is no answer, or no more of it."""
        reason = getattr(error, "strerror", None)
        why = f" ({reason})" if reason else ""
        remedy = "Start it again (kimi-local serve) and repeat the question, or chat with --attach never."
        return KimiError(f"The server at {self.address} is gone{why}.", remedy)

    def _refusal(self, exchange: "Exchange") -> KimiError:
        if exchange.status == 401:
            known = "does not take this API key" if "authorization" in self._headers else "wants an API key"
            return KimiError(f"The server at {self.address} {known}.", KEY_REMEDY)
        try:
            error = exchange.json().get("error")
        except KimiError:
            error = None
        if not isinstance(error, dict):
            return Refused(exchange.status, None, f"The server at {self.address} answers {exchange.status}.")
        message, code = str(error.get("message", "")), error.get("code")
        if code == "context_length_exceeded":
            return ContextExceeded(message)
        return Refused(exchange.status, code, message)


class Refused(KimiError):
    """The server's refusal: `status` is HTTP's, `code` its word for programs."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Exchange:
    """One request and the answer to it; a context that closes the connection."""

    def __init__(self, connection: http.client.HTTPConnection, gone: Callable[..., KimiError]) -> None:
        self._connection = connection
        self._socket = connection.sock  # http.client forgets it as soon as the answer begins
        self.gone = gone

    def send(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> None:
        self._connection.request(method, path, body, dict(headers))
        self._response = self._connection.getresponse()

    @property
    def status(self) -> int:
        return self._response.status

    def json(self) -> dict[str, Any]:
        """The whole body. Raises KimiError if it is no JSON object."""
        try:
            value = json.loads(self._response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self.gone(error) from error
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise KimiError("The server's answer cannot be understood.", "Is it a kimi-local of this version?")
        return value

    def lines(self) -> Iterator[bytes]:
        """The body, line by line, until it ends or is cut off. Raises KimiError when the server is silent."""
        try:
            yield from self._response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.gone(error) from error

    def cut(self) -> None:
        """End `lines`, also while they are waited for; may be called from a signal or another thread."""
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()
        self._response.close()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Counter:
    """Text to ids, as far as a chat needs it: to count them."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def encode(self, text: str) -> list[int]:
        return self._link.ask("POST", "/tokenize", {"prompt": text})["tokens"]


class Attached:
    """What a chat uses of `hybrid.Kimi`, from the server at `address`. Closing it leaves the server as it is."""

    def __init__(self, address: str, *, api_key: str | None = None, path: str | Path | None = None) -> None:
        """`path` is the model's directory, where it is known. Raises KimiError for a server that is not there, wants
        another key, or is none of ours."""
        self._link = Link(address, api_key)
        self.address = self._link.address
        card = self._card()
        meta = card["meta"]
        self.name: str = card["id"]
        self.ctx: int = card["max_model_len"]
        self.path = None if path is None else Path(path)
        self.default_thinking: bool = meta["thinking"]
        self.generation_config: dict[str, Any] = meta["generation_config"]
        self.config = Shape(meta["layers"], meta["experts"], meta["experts_per_token"], self.ctx)
        self.tokenizer = _Counter(self._link)
        self._sampling = {name == "thinking": Sampling(**values) for name, values in meta["sampling"].items()}

    def _card(self) -> dict[str, Any]:
        models = self._link.ask("GET", "/v1/models").get("data")
        card = models[0] if isinstance(models, list) and models else None
        if not isinstance(card, dict) or "sampling" not in card.get("meta", {}):
            raise KimiError(f"The server at {self.address} is no kimi-local of this version.", "Attach to another.")
        return card

    def default_params(self, thinking: bool) -> Sampling:
        """Sampling as the server does it where a request says nothing."""
        return self._sampling[thinking]

    def count_tokens(self, messages: Sequence[Message], tools: Any = None, thinking: bool | None = None) -> int:
        """Tokens of the prompt that `reply` would send."""
        body = {"messages": [message.to_dict() for message in messages], "tools": tools, "thinking": thinking}
        return self._link.ask("POST", "/tokenize", body)["count"]

    def reply(
        self,
        messages: Sequence[Message],
        params: Sampling | None = None,
        *,
        thinking: bool | None = None,
        think_budget: int | None = None,
        keep: bool = True,
        on_progress: OnProgress | None = None,
    ) -> AttachedReply:
        """The next turn of a conversation, as `Kimi.reply` gives it. Raises ContextExceeded and KimiError."""
        thinking = self.default_thinking if thinking is None else thinking
        params = params or self.default_params(thinking)
        body = {
            "messages": [message.to_dict() for message in messages],
            **params.to_dict(),
            "thinking_budget": think_budget,
            "chat_template_kwargs": {"thinking": thinking},
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            "store": keep,
        }
        exchange = self._link.open("POST", "/v1/chat/completions", body)
        limits = params.max_tokens, self.ctx
        return AttachedReply(exchange, self._hurry, self._figures, limits, on_progress or ignore)

    def expert_report(self) -> dict[str, Any]:
        """`layers` and `counts` as of `Kimi.expert_report`, since the server has begun."""
        report = self._link.ask("GET", "/v1/kimi/experts?counts=true")
        return {name: report[name] for name in ("layers", "counts", "tier", "cache")}

    def ram_ceiling_gbps(self) -> float | None:
        """Read bandwidth of the server's memory in GB/s; None if it was never measured there."""
        try:
            server = self._link.ask("GET", "/v1/kimi/server", patience=FIGURES_S)
        except KimiError:
            return None
        return server.get("machine", {}).get("ram_ceiling_gbps")

    def close(self) -> None:
        """There is nothing to let go of."""

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _figures(self, name: str) -> dict[str, Any]:
        """What the server measured of the answer `name`; nothing if it does not tell."""
        try:
            return self._link.ask("GET", f"/v1/kimi/answers/{name}", patience=FIGURES_S)
        except KimiError:
            return {}

    def _hurry(self, name: str) -> None:
        """End the reasoning of the answer `name`; one that has ended needs none of it."""
        try:
            self._link.ask("POST", "/v1/kimi/answer-now", {"id": name})
        except Refused as error:
            if error.status == 404 and error.code != "not_found":
                why = "This server cannot end the reasoning early."
                raise KimiError(why, "It is older than this program.") from error
            if error.status != 404:
                raise
