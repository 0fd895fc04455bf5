"""Who is being served: a bounded number of jobs, and what was counted of those that ended."""

import threading
from collections import defaultdict

from hybrid.kimi import Kimi
from hybrid.serve.job import Job, StartReply
from hybrid.serve.refusal import Refusal

HELP = {
    "requests_total": "Answers begun.",
    "requests_refused_total": "Requests refused because the queue was full.",
    "prompt_tokens_total": "Tokens of prompts.",
    "prompt_cached_tokens_total": "Those of them found in the cache.",
    "prompt_seconds_total": "Seconds spent on prompts.",
    "tokens_predicted_total": "Tokens made, with reasoning.",
    "tokens_drafted_total": "Tokens guessed and computed ahead.",
    "tokens_accepted_total": "Those of them that were right.",
    "tokens_predicted_seconds_total": "Seconds spent making them.",
    "request_seconds_total": "Seconds from first token to last, and the prompt's, of ended answers.",
    "requests_processing": "Answers being made.",
    "requests_deferred": "Answers waiting for their turn.",
}


class Desk:
    """Takes at most `parallel` requests to work on and `queue` to wait; more are refused with 429."""

    def __init__(self, kimi: Kimi, parallel: int, queue: int) -> None:
        self.kimi = kimi
        self.room = parallel + queue
        self._parallel = parallel
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
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
        """Everything counted, in Prometheus' text format."""
        with self._lock:
            running = sum(job.running for job in self._jobs)
            gauges = {"requests_processing": running, "requests_deferred": len(self._jobs) - running}
            values = {name: gauges.get(name, self._totals[name]) for name in HELP}
        lines = []
        for name, value in values.items():
            kind = "gauge" if name in gauges else "counter"
            full = f"kimi_local:{name}"
            lines += [f"# HELP {full} {HELP[name]}", f"# TYPE {full} {kind}", f"{full} {value}"]
        return "\n".join(lines) + "\n"

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
            self._totals["tokens_predicted_total"] += stats.generated_tokens
            self._totals["tokens_drafted_total"] += stats.drafted
            self._totals["tokens_accepted_total"] += stats.accepted
            for name, seconds in (("prompt", stats.prefill_s), ("tokens_predicted", stats.decode_s)):
                self._totals[f"{name}_seconds_total"] += seconds
            self._totals["request_seconds_total"] += stats.prefill_s + stats.decode_s
