"""Who may talk to the server, and how much at once: checked before a request is looked at.

A server on the loopback is open to every page in the user's browser. A page cannot read answers without CORS headers,
which are never sent, but by DNS rebinding its own name may come to mean 127.0.0.1: so the Host header must be an
address or a name of this machine. Pages of other sites are refused, too, where the browser says where they are from.
"""

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.serve.refusal import Refusal, refuse

# Given without the key: whoever watches over a machine has none, and the page is what asks for it.
OPEN_PATHS, OPEN_FOLDER = ("/health", "/"), "/page/"


class Guard:
    """The application behind these checks. `host` is what the server listens on; `body_limit` is in bytes."""

    def __init__(self, app: ASGIApp, *, host: str, api_key: str | None, body_limit: int) -> None:
        self.app = app
        self.names = {"localhost", host.casefold(), socket.gethostname().casefold()}
        self.api_key = api_key
        self.body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_origin(headers)
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
        except Refusal as refusal:
            return await refuse(scope["path"], refusal)(scope, receive, send)
        await self.app(scope, _again(body, receive), send)

    def _check_origin(self, headers: dict[str, str]) -> None:
        if not self._is_ours(f"//{headers.get('host', '')}"):
            remedy = "Call it by its address, as http://127.0.0.1."
            raise Refusal(403, f"Host {headers.get('host', '')!r} is no name of this server. {remedy}", code="bad_host")
        origin = headers.get("origin", "")
        if origin.startswith(("http:", "https:")) and not self._is_ours(origin):
            raise Refusal(403, f"Pages of {origin} may not use this server.", code="bad_origin")

    def _is_ours(self, url: str) -> bool:
        """Whether the host in `url` is an address, which nobody can rebind, or a name of this machine."""
        try:
            name = (urlsplit(url).hostname or "").casefold()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names or name.removesuffix(".local") in self.names
        return True

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if self.api_key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.casefold() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            message = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`."
            raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises Refusal as soon as it is known to be too large."""
        announced = headers.get("content-length", "0")
        self._require_small(int(announced) if announced.isdecimal() else 0)
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            self._require_small(len(body))
            more = message.get("more_body", False)
        return bytes(body)

    def _require_small(self, size: int) -> None:
        if size > self.body_limit:
            message = f"The request is larger than {self.body_limit:,} bytes."
            raise Refusal(413, message, code="request_too_large", headers={"connection": "close"})


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` as it was before the body was read."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Message:
        return waiting.pop() if waiting else await receive()

    return first_the_body
