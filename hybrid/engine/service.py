"""Requests from many threads, all computed on one: nobody else calls kernels while it runs."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import numba
import torch

from hybrid.engine.engine import Engine
from hybrid.engine.request import Closed, Request
from hybrid.engine.sequence import Sequence

Item = int | Exception | None  # an id; or the end, with or without an error
T = TypeVar("T")


class Answer(Iterator[int]):
    """The ids of one request as they are made. Closing or dropping it cancels the request."""

    def __init__(self, request: Request, items: "SimpleQueue[Item]") -> None:
        self._request = request
        self._items = items
        self._over = False

    def __next__(self) -> int:
        item = None if self._over else self._items.get()
        if isinstance(item, int):
            return item
        self._over = True
        if item is not None:
            raise item
        raise StopIteration

    def close(self) -> None:
        self._over = self._request.cancelled = True

    def __del__(self) -> None:
        self.close()


@dataclass(eq=False)
class _Line:
    """From the thread that computes to the one that listens. It must not hold the `Answer`, which may be dropped."""

    request: Request
    items: "SimpleQueue[Item]" = field(default_factory=SimpleQueue)
    sequence: Sequence | None = None
    told: int = 0  # ids of prompt and answer that need no telling any more

    def tell(self) -> bool:
        """Pass on what is new; whether that was the last."""
        sequence = self.sequence
        assert sequence is not None
        for token in sequence.ids[self.told :]:
            self.items.put(token)
        self.told = len(sequence.ids)
        if sequence.ended:
            self.items.put(sequence.error)
        return sequence.ended


class Service:
    """An engine that any number of threads may ask at once. How many may wait is for whoever lets them in to say."""

    def __init__(self, engine: Engine, *, batch: int) -> None:
        """Up to `batch` requests are computed together, others wait. Until `close` nobody else uses the engine."""
        self.model = engine.model
        self._engine = engine
        self._scheduler = engine.scheduler(batch)
        self._changed = threading.Condition()  # guards what follows
        self._lines: list[_Line] = []
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closed = False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests being computed."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that are not computed yet, or not at the moment."""
        return max(0, len(self._lines) - self.running)

    def stream(self, request: Request) -> Answer:
        """The new ids of `request`, as `Engine.stream`; it is under way at once, however slowly it is listened to."""
        request.require_room(self._engine.ctx)
        request.require_known(self.model.config.vocab_size)
        line = _Line(request, told=len(request.prompt))
        with self._changed:
            self.require_open()
            self._lines.append(line)
            self._changed.notify()
        return Answer(request, line.items)

    def call(self, work: Callable[[], T]) -> T:
        """What `work` gives, called between two steps on the thread that may use the engine."""
        future: Future[T] = Future()
        with self._changed:
            self.require_open()
            self._calls.append((future, work))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Interrupt what runs or waits, and end the thread."""
        with self._changed:
            self._closed = True
            for line in self._lines:
                line.request.cancelled = True
            self._changed.notify()
        self._thread.join()

    def require_open(self) -> None:
        """Raises Closed when nothing is computed any more."""
        if self._closed:
            raise self._no_more()

    def _no_more(self) -> Closed:
        what = "The model is closed." if self._failed is None else "An error has ended the engine."
        return Closed(what, "Load the model again.")

    def _run(self) -> None:
        numba.set_num_threads(torch.get_num_threads())  # numba's is each thread's own, and torch's is everybody's
        error: Exception | None = None
        try:
            while self._take_in():
                self._engine.advance(self._scheduler)
                self._tell()
                if not self._lines:
                    self._scheduler.rest()
        except Exception as bug:  # raised again where the answers are awaited
            error = bug
        self._end(error)

    def _take_in(self) -> bool:
        """Wait until there is something to do, and do what others asked for; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._lines or self._calls)
            new = [line for line in self._lines if line.sequence is None]
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
        for future, work in calls:
            _settle(future, work)
        for line in new:
            line.sequence = self._scheduler.add(line.request)
        return not self._closed

    def _tell(self) -> None:
        ended = [line for line in list(self._lines) if line.sequence is not None and line.tell()]
        if ended:
            with self._changed:
                self._lines = [line for line in self._lines if line not in ended]

    def _end(self, error: Exception | None) -> None:
        """Nothing more is computed: tell everybody."""
        with self._changed:
            self._closed, self._failed = True, error
            lines, self._lines = self._lines, []
            calls = list(self._calls)
        self._scheduler.close()
        for line in lines:
            line.request.finish_reason = line.request.finish_reason or "interrupted"
            line.items.put(error)
        for future, _ in calls:
            future.set_exception(error or self._no_more())


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # raised again by whoever asked for it
        future.set_exception(error)
