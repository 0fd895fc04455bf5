"""A job from prompts to lines on the disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import Any, NamedTuple

from torch import Tensor

from hybrid.batch.jobs import Answer, Job, Prompts
from hybrid.batch.records import answer_record, reading
from hybrid.batch.state import Output
from hybrid.chat.parser import THINK_END
from hybrid.chat.reading import Reading
from hybrid.engine.request import Request, no_notice
from hybrid.engine.sampler import SamplingParams
from hybrid.grammar import Grammars, Mask
from hybrid.kimi import Kimi


class Answered(NamedTuple):
    """A line that is done, with the tokens of its prompt and its answer.

    It is on the disk, unless the output is ordered and a line before it is missing.
    """

    custom_id: str
    prompt_tokens: int
    new_tokens: int


def params_of(kimi: Kimi, job: Job) -> SamplingParams:
    """The model's own settings for the mode, changed by what the job asks for."""
    given = {name: value for name, value in job.sampling.items() if value is not None}
    return replace(kimi.default_params(job.thinking), **given | {"max_tokens": job.longest})


def answers(kimi: Kimi, jobs: Sequence[Job], batch: int) -> Iterator[Answer]:
    """Every job's answer as it ends, up to `batch` made at once."""
    prompts, params = [job.prompt for job in jobs], [params_of(kimi, job) for job in jobs]
    grammars = Grammars(kimi.tokenizer, kimi.config.vocab_size, kimi.stop_ids)

    def prepare(index: int, request: Request) -> None:
        job = jobs[index]
        if job.asked.grammar is not None:
            request.mask = _Later(grammars, job.asked.grammar, job.thinking)
        request.keep = job.asked.keep
        if request.params.stop or job.asked.think_budget:
            enough = kimi.tokenizer.specials.get(THINK_END)
            request.on_token = _watched(request, reading(job, kimi.tokenizer), enough)

    for index, ids, request in kimi.finish_many(prompts, params, batch=batch, prepare=prepare):
        request.mask, request.on_token = None, no_notice  # what they hold is not needed until the last answer ends
        yield Answer(index, ids, request.finish_reason, request.cached_tokens, request.logprobs)


class _Later:
    """A mask that is made when its answer begins: thousands of lines may wait."""

    def __init__(self, grammars: Grammars, grammar: str, thinking: bool) -> None:
        self._make = lambda: grammars.mask(grammar, thinking)
        self._mask: Mask | None = None

    def __call__(self, ids: Sequence[int]) -> Tensor | None:
        self._mask = self._mask or self._make()
        return self._mask(ids)


def _watched(request: Request, reading: Reading, enough: int | None) -> Callable[[int], None]:
    """What ends `request` at the first of its stop strings, and its reasoning by `enough` when its budget is spent."""

    def note(token: int) -> None:
        if token in request.params.stop_ids:
            return
        reading.feed(token)
        if reading.stopped:
            request.finish_reason = "stop"
        elif reading.spent and enough is not None and not request.forced:
            request.forced.append(enough)

    return note


def write_answers(
    ended: Iterable[Answer], jobs: Sequence[Job], output: Output, prompts: Prompts, *, ordered: bool = False
) -> Iterator[Answered]:
    """Put every answer on the disk as it comes, or, if `ordered`, as soon as all before it in `jobs` are there."""
    held: dict[int, dict[str, Any]] = {}
    written = 0
    for answer in ended:
        job = jobs[answer.index]
        held[answer.index] = answer_record(job, answer, prompts)
        ready = list(takewhile(held.__contains__, count(written))) if ordered else [answer.index]
        output.answer([held.pop(each) for each in ready])
        written += len(ready)
        yield Answered(job.custom_id, len(job.prompt), len(answer.ids))
