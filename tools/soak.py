"""Clients at a server for half an hour, who come and go as they like: `python tools/soak.py MODEL --minutes 30`.

Starts `kimi-local serve` and asks it, from --clients threads, whatever its endpoints take: answers whole and streamed,
long prompts, several at once, mistakes. A third of the clients hang up, before the first token or after some. Meanwhile
/health is asked four times a second, and the server's memory is looked at.

In the end nothing may be left over: no request unanswered, every page of the KV cache free or kept as a prefix, and
memory after the last minutes no more than 2 % above that after the first fifth, by medians. Ends with 1 if not. The
last line is a JSON object.
"""

import argparse
import http.client
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

import psutil
from program import own_cache, served

HEALTH_EVERY, MEMORY_EVERY = 0.25, 2.0  # seconds
WARM = 0.2  # share of the time after which memory may grow no more
MOST_GROWTH, SLOWEST_HEALTH = 0.02, 0.2
ENDS = (b"data: [DONE]", b"event: message_stop", b"event: response.completed", b"event: response.incomplete")
PATIENCE = 120.0  # seconds without a byte after which a request is stuck
WORDS = ["time", "river", "seven", "apple", "machine", "green", "letter", "north", "window", "paper"]


@dataclass
class Seen:
    """What all threads note."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes


class Client:
    """Asks one thing after another, each over a connection of its own."""

    def __init__(self, host: str, port: int, ctx: int, seed: int, seen: Seen) -> None:
        self.address, self.ctx, self.seen = (host, port), ctx, seen
        self.rng = random.Random(seed)

    def ask(self) -> None:
        """One request of a random kind, to its end or until the client has enough of it."""
        kind: Callable[[], tuple[str, dict[str, Any], int]] = self.rng.choice(
            [self._chat, self._chat, self._long, self._text, self._item, self._message, self._several, self._mistake]
        )
        path, body, expected = kind()
        leaves = self.rng.random() < 1 / 3
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            if leaves and self.rng.random() < 0.5:
                time.sleep(self.rng.expovariate(5))
                self.seen.outcomes["left before the first byte"] += 1
                return
            response = connection.getresponse()
            if leaves:
                response.read(self.rng.randrange(1, 400))
                self.seen.outcomes["left on the way"] += 1
                return
            self._check(path, response, response.read(), expected, body)
        except (OSError, http.client.HTTPException) as error:
            self.seen.wrong.append(f"{path}: {error!r}")
        finally:
            connection.close()

    def _check(
        self, path: str, response: http.client.HTTPResponse, text: bytes, expected: int, body: dict[str, Any]
    ) -> None:
        if response.status != expected:
            if response.status == 429:
                self.seen.outcomes["429"] += 1
                return
            self.seen.wrong.append(f"{path}: {response.status} instead of {expected}: {text[:200]!r}")
        elif expected == 200 and body.get("stream") and not any(end in text for end in ENDS):
            self.seen.wrong.append(f"{path}: a stream without its end: {text[-200:]!r}")
        else:
            self.seen.outcomes[f"{path} {response.status}"] += 1

    # -- what is asked ------------------------------------------------------------------------------------------------
    def _words(self, count: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=count))

    def _common(self) -> dict[str, Any]:
        drawn = {"temperature": 1.0, "seed": self.rng.randrange(99)} if self.rng.random() < 0.5 else {"temperature": 0}
        return {"stream": self.rng.random() < 0.5, "max_tokens": self.rng.randrange(1, 96), **drawn}

    def _chat(self) -> tuple[str, dict[str, Any], int]:
        messages = [{"role": "user", "content": f"Tell me of {self._words(self.rng.randrange(1, 30))}."}]
        return "/v1/chat/completions", {"messages": messages, **self._common()}, 200

    def _long(self) -> tuple[str, dict[str, Any], int]:
        messages = [{"role": "user", "content": self._words(self.ctx // 6)}]
        return "/v1/chat/completions", {"messages": messages, **self._common(), "max_tokens": 8}, 200

    def _text(self) -> tuple[str, dict[str, Any], int]:
        return "/v1/completions", {"prompt": self._words(5), **self._common()}, 200

    def _item(self) -> tuple[str, dict[str, Any], int]:
        body = self._common()
        body["max_output_tokens"] = body.pop("max_tokens")
        return "/v1/responses", {"input": self._words(7), **body}, 200

    def _several(self) -> tuple[str, dict[str, Any], int]:
        prompts = [self._words(4) for _ in range(3)]
        return "/v1/completions", {"prompt": prompts, **self._common(), "logprobs": 2, "stream": False}, 200

    def _message(self) -> tuple[str, dict[str, Any], int]:
        return "/v1/messages", {"messages": [{"role": "user", "content": self._words(9)}], **self._common()}, 200

    def _mistake(self) -> tuple[str, dict[str, Any], int]:
        """More than fits."""
        body = {"messages": [{"role": "user", "content": self._words(2 * self.ctx)}], **self._common()}
        return "/v1/chat/completions", body, 400


# -- what is watched --------------------------------------------------------------------------------------------------
def get(host: str, port: int, path: str) -> str:
    """The body of a GET that succeeded."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, f"{path}: {response.status} {text}"
        return text
    finally:
        connection.close()


def watch_health(host: str, port: int, seen: Seen, over: threading.Event) -> None:
    while not over.wait(HEALTH_EVERY):
        start = time.perf_counter()
        try:
            get(host, port, "/health")
        except (OSError, http.client.HTTPException, AssertionError) as error:
            seen.wrong.append(f"/health: {error!r}")
        seen.health.append(time.perf_counter() - start)


def watch_memory(process: psutil.Process, seen: Seen, over: threading.Event) -> None:
    start = time.monotonic()
    while not over.wait(MEMORY_EVERY):
        seen.memory.append((time.monotonic() - start, process.memory_info().rss))


def in_work(host: str, port: int) -> int:
    """Requests that wait or are being answered."""
    gauges = re.findall(r"^kimi_local:requests_(?:processing|deferred) (\S+)$", get(host, port, "/metrics"), re.M)
    assert len(gauges) == 2, gauges
    return round(sum(map(float, gauges)))


def left_over(host: str, port: int, patience: float = 10) -> tuple[int, int]:
    """Requests still there after `patience` seconds, and pages that nobody holds who should."""
    until = time.monotonic() + patience
    while (requests := in_work(host, port)) and time.monotonic() < until:
        time.sleep(0.1)
    prefix = json.loads(get(host, port, "/v1/kimi/memory"))["prefix"]
    return requests, prefix["pages"] - prefix["free"] - prefix["kept"]


def growth(memory: Sequence[tuple[float, int]], seconds: float) -> float:
    """Of the median memory of the last tenth of the time over that of the tenth behind the warm part."""
    tenths = [[rss for at, rss in memory if low <= at / seconds < low + 0.1] for low in (WARM, 0.9)]
    first, last = (median(tenth) for tenth in tenths)
    return last / first - 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    seen, over, seconds = Seen(), threading.Event(), 60 * options.minutes
    given = [f"--ctx={options.ctx}", "--parallel=4", *([f"--threads={options.threads}"] if options.threads else [])]
    with (
        tempfile.TemporaryDirectory() as cache,
        served(options.model, *given, env=own_cache(Path(cache))) as (address, pid),
    ):
        host, port = urlsplit(address).hostname, urlsplit(address).port
        assert host and port
        clients = [Client(host, port, options.ctx, seed, seen) for seed in range(options.clients)]

        def keep_asking(client: Client) -> None:
            while not over.is_set():
                client.ask()

        threads = [threading.Thread(target=keep_asking, args=(client,)) for client in clients]
        threads.append(threading.Thread(target=watch_health, args=(host, port, seen, over)))
        threads.append(threading.Thread(target=watch_memory, args=(psutil.Process(pid), seen, over)))
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(60.0, max(0.0, end - time.monotonic())))
            rss = seen.memory[-1][1] / 1e6 if seen.memory else 0
            if not options.json:
                print(f"{sum(seen.outcomes.values()):,} requests, {len(seen.wrong)} wrong, {rss:,.0f} MB", flush=True)
        over.set()
        for thread in threads:
            thread.join()
        requests, pages = left_over(host, port)
    return {
        "minutes": options.minutes,
        "clients": options.clients,
        "outcomes": dict(sorted(seen.outcomes.items())),
        "wrong": seen.wrong[:20],
        "stuck": requests,
        "pages_lost": pages,
        "memory_growth": growth(seen.memory, seconds),
        "health_p99_s": quantiles(seen.health, n=100)[98],
        "health_asked": len(seen.health),
    }


def sound(found: dict[str, Any]) -> bool:
    """Whether nothing was left over, wrong or slow."""
    calm = found["memory_growth"] <= MOST_GROWTH and found["health_p99_s"] < SLOWEST_HEALTH
    return calm and not (found["wrong"] or found["stuck"] or found["pages_lost"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ctx", type=int, default=1024, help="tokens; small, so that pages are scarce")
    parser.add_argument("--threads", type=int, help="of the server")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    found = run(parser.parse_args(arguments))
    print(json.dumps(found))
    return 0 if sound(found) else 1


if __name__ == "__main__":
    sys.exit(main())
