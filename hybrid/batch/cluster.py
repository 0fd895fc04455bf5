"""A job spread over the nodes of a Ray cluster: one engine each, groups of lines to whoever is free.

Only the process that reads the input writes the output, so the promises about it are the same as on one machine. When a
worker dies its group goes to the others, and a new worker is started where it was, a few times at most.
"""

import logging
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybrid.batch.jobs import Answer, Job
from hybrid.batch.run import answers
from hybrid.errors import KimiError, MissingExtra, Retry
from hybrid.kimi import Kimi

DEATHS = 3  # of a node's workers, one after the other without an answer, until the node is given up
CONNECT_S = 5.0
ROUNDS = 4  # a group is what a worker makes at once so many times; a death costs at most a group


class Worker:
    """The engine of one node."""

    def __init__(self, load: Mapping[str, Any]) -> None:
        self._kimi = Kimi.load(**load)

    def answer(self, jobs: Sequence[Job], batch: int) -> list[Answer]:
        return list(answers(self._kimi, jobs, batch))


def spread(address: str, load: Mapping[str, Any], jobs: Sequence[Job], batch: int) -> Iterator[Answer]:
    """As `answers`, by the cluster at `address`; `load` is what `Kimi.load` gets on every node.

    Raises MissingExtra without Ray, KimiError where there is no cluster, Retry when no worker stays alive.
    """
    ray = _connect(address)
    try:
        yield from _Crew(ray, load, jobs, batch).work()
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("Clusters need Ray.", "Install it: pip install 'kimi-local[cluster]'.") from error
    try:
        _require_open(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise KimiError(f"There is no Ray cluster at {address}: {why}.", "Start one: ray start --head.") from error
    return ray


def _require_open(address: str) -> None:
    """Ray itself would go on trying for minutes. Raises OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_S).close()


class _Crew:
    """Who works on what. A worker is known by the node it is on."""

    def __init__(self, ray: Any, load: Mapping[str, Any], jobs: Sequence[Job], batch: int) -> None:
        self._ray = ray
        self._load = ray.put(dict(load))
        self._jobs = jobs
        self._batch = batch
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        self._deaths = dict.fromkeys(nodes, 0)
        self._workers = {node: self._hire(node) for node in nodes}
        size = max(1, min(batch * ROUNDS, -(-len(jobs) // len(nodes))))
        self._waiting = deque(range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size))
        self._busy: dict[Any, tuple[str, range]] = {}

    def work(self) -> Iterator[Answer]:
        """Answers as groups come back; every job exactly once."""
        while self._waiting or self._busy:
            self._hand_out()
            ready, _ = self._ray.wait(list(self._busy))
            for call in ready:
                yield from self._take(call)

    def _hire(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return self._ray.remote(Worker).options(num_cpus=0, scheduling_strategy=there).remote(self._load)

    def _hand_out(self) -> None:
        occupied = {node for node, _ in self._busy.values()}
        for node, worker in self._workers.items():
            if self._waiting and node not in occupied:
                group = self._waiting.popleft()
                call = worker.answer.remote([self._jobs[index] for index in group], self._batch)
                self._busy[call] = node, group

    def _take(self, call: Any) -> Iterator[Answer]:
        node, group = self._busy.pop(call)
        try:
            found = self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            self._waiting.appendleft(group)
            self._replace(node, error)
            return
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, KimiError) else KimiError(f"A worker failed: {error.cause}")
            raise cause from error
        self._deaths[node] = 0
        yield from (replace(answer, index=group[answer.index]) for answer in found)

    def _replace(self, node: str, error: Exception) -> None:
        """Another worker for `node`; none any more where they keep dying. Raises Retry if no node is left."""
        self._deaths[node] += 1
        if self._deaths[node] < DEATHS:
            self._workers[node] = self._hire(node)
            return
        del self._workers[node]
        if not self._workers:
            why = str(error).strip().splitlines()[-1]
            raise Retry(f"No worker of the cluster stays alive: {why}", "What is answered is kept: run it again.")
