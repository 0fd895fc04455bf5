"""Lines as a model gets them: ids of the prompt, settings, and how much room an answer may take."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.batch.body import Asked, Refused
from hybrid.batch.lines import Line
from hybrid.chat.bodies import prompt_ids
from hybrid.chat.forms import BadField
from hybrid.chat.template import ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.chat.wishes import require_tokens
from hybrid.checkpoint import Checkpoint
from hybrid.engine.request import TokenLogprobs
from hybrid.errors import KimiError
from hybrid.grammar import Grammars
from hybrid.memory.prefix_cache import common_prefix

LONGEST = 32768  # tokens of an answer, if neither the line nor the command says


@dataclass(frozen=True)
class Job:
    """A line ready to run: `sampling` is what was asked for, `longest` how many tokens its answer can have."""

    custom_id: str
    asked: Asked
    prompt: list[int]
    thinking: bool
    sampling: Mapping[str, Any]
    longest: int


@dataclass(frozen=True)
class Answer:
    """What became of job `index`: new ids, why they end there, and how much of its prompt was there before."""

    index: int
    ids: list[int]
    finish_reason: str
    cached_tokens: int
    logprobs: Sequence[TokenLogprobs] = ()


class Prompts:
    """What turns lines into ids and ids into words: a checkpoint's small files, no weights.

    Prompt and answer have `ctx` tokens together.
    """

    def __init__(self, checkpoint: Checkpoint, ctx: int) -> None:
        self.ctx = ctx
        self.tokenizer = Tokenizer.from_directory(checkpoint.path)
        self.stop_ids = self.tokenizer.stop_ids | frozenset(checkpoint.config.eos_token_ids)
        self.model = checkpoint.path.resolve().name
        self.template = ChatTemplate.from_directory(checkpoint.path)
        self._ids = checkpoint.config.vocab_size
        self._reasons = checkpoint.reasons
        self._grammars = Grammars(self.tokenizer, self._ids, self.stop_ids)

    def job(self, line: Line, defaults: Mapping[str, Any], thinking: bool | None) -> Job:
        """`line` with `defaults` where it says nothing. Raises Refused for what this model cannot take.

        Raises MissingExtra for an answer of a form where llguidance is not installed.
        """
        asked = line.asked
        self._require_possible(asked)
        wanted = thinking if asked.thinking is None else asked.thinking
        thinks = asked.is_chat and self._reasons and wanted is not False
        prompt = self._prompt(asked, thinks)
        room = self.ctx - len(prompt)
        if room < 1:
            message = f"The prompt has {len(prompt):,} tokens, and prompt and answer have {self.ctx:,} together."
            raise Refused(message, "context_length_exceeded", "messages" if asked.is_chat else "prompt")
        sampling = {**defaults, **asked.sampling}
        sampling["seed"] = asked.sampling.get("seed", _seed(defaults.get("seed"), line.custom_id))
        return Job(line.custom_id, asked, prompt, thinks, sampling, min(room, sampling.get("max_tokens") or LONGEST))

    def jobs(
        self, lines: Iterable[Line], defaults: Mapping[str, Any], thinking: bool | None
    ) -> tuple[list[Job], list[tuple[str, Refused]]]:
        """All lines, those refused by custom_id and why."""
        jobs: list[Job] = []
        refused = []
        for line in lines:
            try:
                jobs.append(self.job(line, defaults, thinking))
            except Refused as why:
                refused.append((line.custom_id, why))
        return jobs, refused

    def _require_possible(self, asked: Asked) -> None:
        try:
            require_tokens(asked.sampling, self._ids)
            if asked.grammar is not None:
                self._grammars.matcher(asked.grammar)
        except BadField as error:
            raise Refused(str(error), error.code or "invalid_request", error.param or "response_format") from error

    def _prompt(self, asked: Asked, thinking: bool) -> list[int]:
        try:
            if asked.prompt is not None:
                prompt = asked.prompt if isinstance(asked.prompt, str) else list(asked.prompt)
                return prompt_ids(self.tokenizer, prompt, self._ids)
            return self.template.render_ids(
                asked.messages, self.tokenizer, tools=asked.tools or None, thinking=thinking
            )
        except KimiError as error:
            raise Refused(str(error), param="messages" if asked.is_chat else "prompt") from error


def _seed(seed: int | None, custom_id: str) -> int:
    """A line's own seed: whatever runs beside it, and however often the job is begun again, it draws the same."""
    digest = hashlib.sha256(f"{seed or 0}\0{custom_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def by_prefix(jobs: Iterable[Job]) -> list[Job]:
    """Prompts that begin alike one after the other."""
    return sorted(jobs, key=lambda job: job.prompt)


def shared_tokens(jobs: Iterable[Job]) -> int:
    """Tokens of prompts that another prompt computes already; the last of each is computed in any case."""
    prompts = [job.prompt for job in by_prefix(jobs)]
    return sum(common_prefix(a, b[:-1]) for a, b in zip(prompts, prompts[1:], strict=False))
