"""A listening socket, and the server behind it from its first request to its last."""

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.serve.app import Settings, create_app
from hybrid.serve.desk import Desk

LAST_WORDS_S = 5  # what stopped answers get to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 picks a free one. Raises KimiError where that is impossible."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise KimiError(f"{host} is no address of this machine: {error.strerror}.", "Choose another --host.") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # binding alone would let a second server have the same port
    except OSError as error:
        bound.close()
        remedy = "Choose another with --port, or stop what uses it."
        raise KimiError(f"Port {port} of {host} cannot be used: {error.strerror}.", remedy) from error
    return bound


def url(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """`run` serves until `leave` is called, or a signal comes in the main thread: answers then end where they are."""

    def __init__(self, kimi: Kimi, settings: Settings, on_ready: Callable[[], None]) -> None:
        kimi.share(batch=settings.parallel)
        self._desk = Desk(kimi, settings.parallel, settings.queue)
        self._on_ready = on_ready
        app = create_app(kimi, self._desk, settings)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=LAST_WORDS_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def leave(self) -> None:
        """End; called a second time, without waiting for anything."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._desk.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.leave()
