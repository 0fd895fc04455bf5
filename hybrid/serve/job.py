"""One reply made on a thread of its own, its events awaited on the event loop, which never waits for the model."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hybrid.chat.message import Part
from hybrid.progress import OnProgress, Progress
from hybrid.reply import Reply

StartReply = Callable[[OnProgress], Reply]
T = TypeVar("T")


@dataclass(frozen=True)
class Prefill:
    """So many tokens of the prompt are done, `cached` of which were found in the cache; `seconds` since it began."""

    done: int
    total: int
    cached: int
    seconds: float


Event = Part | Prefill


class Job:
    """Made on the event loop's thread. `running` is true from the first work on the prompt to the end of the answer."""

    def __init__(self, start: StartReply, on_end: Callable[["Job"], None]) -> None:
        self._start = start
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | Reply | Exception | None] = asyncio.Queue()
        self._reply: Reply | None = None
        self._stopped = False
        self._begun = time.perf_counter()
        self._cached = 0
        self._lock = threading.Lock()
        self._early: list[Prefill] | None = []  # what is done of the prompt before anybody knows of the reply
        self.running = False
        self.name = ""  # what its client knows it by
        self._thread = threading.Thread(target=self._run, name="reply", daemon=True)
        self._thread.start()

    async def started(self) -> Reply:
        """The reply, before it is made. Raises what `start` raises, ContextExceeded above all."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, Reply), item
        return item

    async def events(self, patience: float | None = None) -> AsyncIterator[Event | None]:
        """What happens until the answer ends; None whenever nothing has happened for `patience` seconds.

        Raises what making the answer raised.
        """
        while True:
            try:
                item = await asyncio.wait_for(self._queue.get(), patience)
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            assert not isinstance(item, Reply)
            yield item

    def stop(self) -> None:
        """End within a layer of the prompt or a token of the answer; may be called from anywhere, any time."""
        self._stopped = True
        if self._reply is not None:
            self._reply.stop()

    def join(self, timeout: float) -> None:
        """Wait so many seconds for the thread's end."""
        self._thread.join(timeout)

    @property
    def reply(self) -> Reply | None:
        """The reply, if it could be begun."""
        return self._reply

    def _run(self) -> None:
        last: Exception | None = None
        try:
            self._reply = self._start(self._note)
            with self._lock:
                for item in (self._reply, *(self._early or ())):
                    self._tell(item)
                self._early = None
            if self._stopped:
                self._reply.stop()
            for part in self._reply:
                self.running = True
                self._tell(part)
        except Exception as error:  # raised again where the events are awaited: nothing is swallowed
            last = error
        self.running = False
        self._on_end(self)
        self._tell(last)

    def _note(self, progress: Progress) -> None:
        if not self.running:
            self.running, self._begun, self._cached = True, time.perf_counter(), progress.done
        done = Prefill(progress.done, progress.total, self._cached, time.perf_counter() - self._begun)
        with self._lock:  # the model may have begun while `start` still returns
            if self._early is None:
                self._tell(done)
            else:
                self._early.append(done)

    def _tell(self, item: Event | Reply | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server has ended, nobody listens
            self.stop()


async def unless_gone(receive: Receive, jobs: Iterable[Job], work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None if the client leaves before that. Either way the jobs are over then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for job in jobs:
            job.stop()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response of server-sent events, which ends, and with it the job if there is one, when the client leaves."""

    def __init__(self, job: Job | None, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        self._jobs = [job] if job is not None else []
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await unless_gone(receive, self._jobs, self._write(send))

    async def _write(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
