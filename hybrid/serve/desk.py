"""Who is being served: a bounded number of jobs, and what was counted of those that ended."""

import threading
from collections import defaultdict

from hybrid.kimi import Kimi
from hybrid.serve.job import Job, StartReply
from hybrid.serve.refusal import Refusal
from hybrid.stats import Stats

HELP = {
    "requests_total": "Answers begun.",
    "requests_refused_total": "Requests refused because the queue was full.",
    "prompt_tokens_total": "Tokens of prompts.",
    "prompt_cached_tokens_total": "Those of them found in the cache.",
    "prompt_disk_tokens_total": "Those of the cache that were read from disk.",
    "prompt_seconds_total": "Seconds spent on prompts.",
    "tokens_predicted_total": "Tokens made, with reasoning.",
    "tokens_drafted_total": "Tokens guessed and computed ahead.",
    "tokens_accepted_total": "Those of them that were right.",
    "tokens_predicted_seconds_total": "Seconds spent making them.",
    "request_seconds_total": "Seconds from first token to last, and the prompt's, of ended answers.",
    "requests_processing": "Answers being made.",
    "requests_deferred": "Answers waiting for their turn.",
}


DISK = {  # of `Insight.disk`, where it keeps anything
    "used": ("kv_disk_bytes", "gauge", "Bytes of prompts kept on disk, of all models."),
    "budget": ("kv_disk_budget_bytes", "gauge", "The most there may be of them."),
    "blocks": ("kv_disk_blocks", "gauge", "Files of this model among them."),
    "dropped": ("kv_disk_dropped_total", "counter", "Files removed because they were damaged."),
}
REMEMBERED = 64  # answers whose figures can be asked for, ended ones included


class Desk:
    """Takes at most `parallel` requests to work on and `queue` to wait; more are refused with 429.

    Nothing behind it counts again: whoever is let in waits as long as it takes.
    """

    def __init__(self, kimi: Kimi, parallel: int, queue: int) -> None:
        self.kimi = kimi
        self.room = parallel + queue
        self._parallel = parallel
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._figures: dict[str, Stats] = {}
        self.stopped = False  # streams that no job ends look here
        self._totals: defaultdict[str, float] = defaultdict(float)

    def open(self, start: StartReply) -> Job:
        """The job of the reply that `start` gives, called with where to report on the prompt. Raises Refusal."""
        with self._lock:
            if len(self._jobs) >= self.room:
                self._totals["requests_refused_total"] += 1
                raise self._full()
            job = Job(start, self._note_end)
            self._jobs.add(job)
            self._totals["requests_total"] += 1
        return job

    def call(self, job: Job, name: str) -> None:
        """Let an answer that has begun be found by `name`, and its figures for a while after it."""
        assert job.reply is not None, "it has not begun"
        job.name = name
        with self._lock:
            self._figures[name] = job.reply.stats
            if len(self._figures) > REMEMBERED:
                del self._figures[next(iter(self._figures))]

    def figures(self, name: str) -> Stats | None:
        """Of the answer of that name, be it made or being made; None for one that is unknown or too long ago."""
        with self._lock:
            return self._figures.get(name)

    def find(self, name: str) -> Job | None:
        """The answer of that name, while it is being made."""
        with self._lock:
            return next((job for job in self._jobs if job.name == name), None)

    def total(self, name: str) -> float:
        """What a counter of HELP says of the answers that ended."""
        with self._lock:
            return self._totals[name]

    def stop(self) -> None:
        """End all answers where they are."""
        self.stopped = True
        for job in list(self._jobs):
            job.stop()

    def metrics(self) -> str:
        """Everything counted, in Prometheus' text format. Takes milliseconds where prompts are kept on disk."""
        with self._lock:
            running = sum(job.running for job in self._jobs)
            gauges = {"requests_processing": running, "requests_deferred": len(self._jobs) - running}
            values = {name: gauges.get(name, self._totals[name]) for name in HELP}
        kind = {name: "gauge" if name in gauges else "counter" for name in values}
        lines = [_metric(name, kind[name], HELP[name], value) for name, value in values.items()]
        kept = self.kimi.insight.disk() or {}
        lines += [_metric(*DISK[name], kept[name]) for name in DISK if kept.get(name) is not None]
        return "".join(lines)

    def _full(self) -> Refusal:
        """After `Retry-After` seconds, going by what answers took so far, there should be a place again."""
        ended = self._totals["requests_total"] - len(self._jobs)
        mean = self._totals["request_seconds_total"] / max(1, ended)
        after = str(min(600, max(1, round(mean / self._parallel))))
        message = f"All {self.room} places are taken. Try again in {after} s, or give the server a longer --queue."
        return Refusal(429, message, code="queue_full", headers={"retry-after": after})

    def _note_end(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)
            if job.reply is None:
                return
            stats = job.reply.stats
            self._totals["prompt_tokens_total"] += stats.prompt_tokens if stats.first_token_s else 0
            self._totals["prompt_cached_tokens_total"] += stats.cached_tokens
            self._totals["prompt_disk_tokens_total"] += stats.disk_tokens
            self._totals["tokens_predicted_total"] += stats.generated_tokens
            self._totals["tokens_drafted_total"] += stats.drafted
            self._totals["tokens_accepted_total"] += stats.accepted
            for name, seconds in (("prompt", stats.prefill_s), ("tokens_predicted", stats.decode_s)):
                self._totals[f"{name}_seconds_total"] += seconds
            self._totals["request_seconds_total"] += stats.prefill_s + stats.decode_s


def _metric(name: str, kind: str, help_: str, value: float) -> str:
    full = f"kimi_local:{name}"
    return f"# HELP {full} {help_}\n# TYPE {full} {kind}\n{full} {value}\n"
