"""`Kimi`: a loaded model that can be talked to. Engine and chat put together, nothing else."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.template import ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.config import ModelConfig
from hybrid.device import choose_device, use_threads
from hybrid.engine.engine import Engine
from hybrid.engine.insight import Insight
from hybrid.engine.request import Mask, Request
from hybrid.engine.sampler import SamplingParams, recommended
from hybrid.engine.service import Service
from hybrid.engine.speculation import Gauge
from hybrid.errors import KimiError, UsageError
from hybrid.memory.achieved import recorded, run_file
from hybrid.memory.bandwidth import ram_ceiling_gbps
from hybrid.memory.disk_kv import open_disk_kv
from hybrid.memory.expert_store import first_formats
from hybrid.memory.kv_format import AUTO, REDUCED
from hybrid.memory.many import ManyTokens
from hybrid.memory.place import Placement
from hybrid.memory.remembered import remember
from hybrid.memory.router_stats import read_counts, save_counts, stats_file
from hybrid.memory.tiers import NvmeTier
from hybrid.model.reside import fill_card, furnish, load_bytes, reside, settle
from hybrid.model.transformer import Transformer
from hybrid.names import DEMO, model_path
from hybrid.progress import OnProgress, Progress, ignore
from hybrid.reply import Reply
from hybrid.stats import Stats

DEFAULT_CTX = 32768
PREFILL_CHUNK = 256
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KV_CHOICES = (AUTO, "bf16", *REDUCED)
REMEMBERED = 256  # last replies that the figures of a run are taken from

log = logging.getLogger(__name__)

__all__ = ["Kimi", "Message", "Reply", "SamplingParams", "Stats"]


class Kimi:
    """A model in memory. One thread at a time may use it, unless it is to `share`; a context manager, or `close` it."""

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine, tier: NvmeTier | None = None, stats_file: Path | None = None
    ) -> None:
        """Use `Kimi.load`."""
        self._checkpoint = checkpoint
        self._engine = engine
        self._tier = tier
        self._stats_file = stats_file
        self._replies: deque[Stats] = deque(maxlen=REMEMBERED)
        self._load_s = 0.0
        self._placement: Placement | None = None
        self._service: Service | None = None

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        ctx: int | None = None,
        cache: int | None = None,
        ram_budget: int | None = None,
        gpu_experts: int | None = None,
        keep_stats: bool = False,
        kv: str = AUTO,
        kv_disk: int | None = 0,
        activations: str = "int8",
        verify: bool = False,
        speculate: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        many_tokens: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> "Kimi":
        """Load a model directory, "demo" (also None: the demo model, built on first use) or "pocket".

        dtype bfloat16 (default) or float32, of the resident weights; activations int8 (default) or float32, of the
        routed experts' inputs; ctx in tokens, of prompt and answer; cache in tokens (default and at least ctx), shared
        by what `generate_many` makes at once; verify compares every expert of a pack with its checksum before it is
        used (resident weights always are). ram_budget in bytes: of a pack's routed experts, so many are kept in RAM and
        the others, as far as no card has them, read from its files as they are needed, for the same answers; None keeps
        all of them, or as many as fit. device None is a CUDA card if there is one whose kernels work, which is said as
        a warning if not, else the CPU; gpu_experts is the most routed experts that go to it, None what there is room
        for: copies that change with the text, or, where RAM does not hold all, experts that stay. keep_stats adds how
        experts were chosen to what is known of the model, when it is closed, and keeps the figures of this run for
        `plan --compare`. kv is how the KV cache keeps rows: "auto" in dtype, "bf16", or "fp8" or "int8", which take
        little more than half of bf16 and round what attention sees. kv_disk bytes of the user's cache keep rows of
        prompts and answers, so that later runs need not compute them again; None is 8 GiB or a tenth of the free disk,
        0 neither writes nor reads. `speculate` has ids that repeat what came before computed ahead, where that proves
        faster. prefill_chunk tokens of prompts are computed at once. A routed expert with many_tokens of them and more
        is decoded and multiplied by torch, with activations that are not rounded to int8; None measures from how many
        on that is faster here, once, and 0 is never. With activations float32 torch multiplies all of them anyway.

        Raises CheckpointError for a model that is missing, damaged or unknown, and DoesNotFit, before reading weights,
        when memory will not hold it.
        """
        given = {name: value for name, value in locals().items() if name != "cls"}
        if activations not in ("int8", "float32") or dtype not in (None, *DTYPES):
            raise UsageError(f"activations {activations!r} with dtype {dtype!r} is not a choice.", "See --help.")
        if kv not in KV_CHOICES:
            raise UsageError(f"{kv!r} is no way to keep the KV cache.", f"There are {', '.join(KV_CHOICES)}.")
        report, began = on_progress or ignore, time.monotonic()
        residence = reside(
            choose_device(device), DTYPES[dtype or "bfloat16"], activations == "float32", use_threads(threads), kv
        )
        checkpoint = open_checkpoint(model_path(DEMO if path is None else path, report), verify=verify)
        config = checkpoint.config
        tokens = min(ctx or DEFAULT_CTX, config.max_position_embeddings)
        if ctx and ctx > tokens:
            raise UsageError(f"The context of {ctx:,} tokens is too long.", f"This model takes {tokens:,}.")
        room = max(tokens, cache or 0)
        residence, placement = settle(checkpoint, residence, room, ram_budget=ram_budget, gpu_experts=gpu_experts)
        known = stats_file(checkpoint)
        counts = read_counts(known, config)
        if not residence.exact:
            residence = replace(residence, many=ManyTokens(config, many_tokens))
        residence = furnish(checkpoint, residence, placement, counts)
        tier, total = residence.tier, load_bytes(checkpoint, residence, placement)
        model = Transformer(
            checkpoint,
            residence,
            lambda done: report(Progress("load", total * done // config.num_hidden_layers, total, "B")),
        )
        rows = residence.make_kv(config, room)
        if tier is not None:
            tier.preload(counts, lambda done, total: report(Progress("tier", done, total, "B")))
            model.stats.tier = tier.counters
        fill_card(
            model, checkpoint, placement, residence.pinned, counts,
            lambda done, total: report(Progress("card", done, total, "B")),
        )  # fmt: skip
        checkpoint.release()
        disk = open_disk_kv(checkpoint, rows, kv_disk, residence.exact, residence.card is not None)
        engine = Engine(model, rows, prefill_chunk, tokens, disk, Gauge() if speculate else None)
        kimi = cls(checkpoint, engine, tier, known if keep_stats else None)
        failed = kimi._compile(report, residence.many)
        if failed:
            log.warning("%s Everything is loaded again, for the CPU.", failed)
            kimi.close()
            del kimi, engine, model, rows, tier, residence, disk  # what they hold is needed once more
            return cls.load(**given | {"device": "cpu", "gpu_experts": None})
        kimi._load_s, kimi._placement = time.monotonic() - began, placement
        return kimi

    # -- what it is -------------------------------------------------------------------------------------------------
    @property
    def config(self) -> ModelConfig:
        return self._checkpoint.config

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._checkpoint.generation_config

    @property
    def placement(self) -> Placement:
        """The plan this was loaded by."""
        assert self._placement is not None
        return self._placement

    @property
    def ctx(self) -> int:
        """Tokens of context: prompt and answer together."""
        return self._engine.ctx

    @cached_property
    def insight(self) -> Insight:
        """What can be seen of the model at work, from any thread."""
        return Insight(self._engine, self.placement, self._tier)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.from_directory(self.path)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ends of a turn, from the tokenizer and both configurations."""
        return self.tokenizer.stop_ids | frozenset(self.config.eos_token_ids)

    @property
    def default_thinking(self) -> bool:
        """Whether replies reason first unless told otherwise."""
        return self._checkpoint.reasons

    def default_params(self, thinking: bool) -> SamplingParams:
        """Sampling as the checkpoint's generation_config says, else as recommended for the mode."""
        return recommended(thinking, self.generation_config, self.stop_ids)

    # -- what it does -----------------------------------------------------------------------------------------------
    def share(self, *, batch: int = 8) -> None:
        """From now on any number of threads may call `logits`, `generate`, `reply` and `complete`, and iterate these.

        A thread of its own computes up to `batch` answers together, and the others wait. `close` ends it, and
        interrupts what is being made.
        """
        assert self._service is None, "it is shared already"
        self._service = Service(self._engine, batch=batch)

    def require_open(self) -> None:
        """Raises Closed if the model is shared and an error has ended what computes."""
        if self._service is not None:
            self._service.require_open()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 [tokens, vocab]: the scores of what follows every prefix of `token_ids`."""
        ids, service = list(token_ids), self._service
        return self._engine.logits(ids) if service is None else service.call(lambda: self._engine.logits(ids))

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """New ids after `token_ids`, the stop id included. What `params.stop` says counts for replies only."""
        return self._source.stream(Request(list(token_ids), params))

    def generate_many(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, batch: int = 32
    ) -> Iterator[tuple[int, list[int], str]]:
        """(index, new ids, finish reason) of every prompt as its answer ends, up to `batch` of them made at once.

        Each answer is the one `generate` would give, and with a seed the same whatever else is being made. Prompts for
        which the cache has no room yet wait. Raises ContextExceeded for one that never fits, before computing anything.
        """
        ended = self.finish_many(prompts, params, batch=batch)
        return ((index, ids, request.finish_reason) for index, ids, request in ended)

    def finish_many(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        batch: int = 32,
        prepare: Callable[[int, Request], None] | None = None,
    ) -> Iterator[tuple[int, list[int], Request]]:
        """As `generate_many`, with all that is known of a request at its end: also its `cached_tokens`.

        `prepare` is given the index and the request of each prompt before any begins, to set its `mask` or `on_token`.
        """
        if batch < 1:
            raise UsageError(f"A batch of {batch} makes no answers.", "It must be 1 or more.")
        if self._service is not None:
            raise UsageError("A shared model makes its answers one by one.", "Use generate_many before share.")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [Request(list(ids), chosen) for ids, chosen in zip(prompts, each, strict=True)]
        if prepare is not None:
            for index, request in enumerate(requests):
                prepare(index, request)
        return ((index, ids, requests[index]) for index, ids in self._engine.stream_many(requests, batch))

    def reply(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        think_budget: int | None = None,
        call_pieces: bool = False,
        mask: Mask | None = None,
        keep: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Reply:
        """The next turn of a conversation; with `call_pieces` also calls that are still being written.

        Without `keep` nothing of it goes to disk, whatever the model was loaded with. `mask` is given the ids made so
        far, reasoning included, and says which may come next: bool [vocab], or None for all. Raises ContextExceeded
        before computing anything when it does not fit.
        """
        thinking = self.default_thinking if thinking is None else thinking
        prompt = self.tokenizer.reuse(self._render(messages, tools, thinking), self._engine.tokens)
        report = on_progress or ignore
        request = Request(
            prompt,
            params or self.default_params(thinking),
            on_prefill=lambda done, total: report(Progress("prefill", done, total, "tok")),
            mask=mask,
            keep=keep,
        )
        calls = sum(len(message.tool_calls) for message in messages)
        parser = ReplyParser.after(prompt, self.tokenizer, calls, call_pieces=call_pieces)
        reply = Reply(self._source, self.tokenizer, request, parser, think_budget)
        self._replies.append(reply.stats)
        return reply

    def complete(
        self, token_ids: Sequence[int], params: SamplingParams, *, on_progress: OnProgress | None = None
    ) -> Reply:
        """What follows `token_ids`, all of it as Text. Raises ContextExceeded before computing anything."""
        report = on_progress or ignore
        request = Request(
            list(token_ids), params, on_prefill=lambda done, total: report(Progress("prefill", done, total, "tok"))
        )
        return Reply(self._source, self.tokenizer, request, PlainParser(self.tokenizer), None)

    def count_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> int:
        """Tokens of the prompt that `reply` would send."""
        return len(self._render(messages, tools, self.default_thinking if thinking is None else thinking))

    def expert_report(self) -> dict[str, Any]:
        """Use of the routed experts since loading, as `Insight.report` has it."""
        return self.insight.report()

    def run_record(self) -> dict[str, float]:
        """Figures of this run so far, as `plan --compare` has them beside what was predicted."""
        vram = torch.cuda.max_memory_reserved() if self._engine.model.card is not None else 0
        return recorded(list(self._replies), self._load_s, vram)

    def ram_ceiling_gbps(self) -> float:
        """This machine's read bandwidth at the threads in use, in GB/s; measured once per machine and kept."""
        return ram_ceiling_gbps(torch.get_num_threads())

    def close(self) -> None:
        """Let go of the weights' files, and keep the routing and the rows of prompts if that was asked for."""
        if self._service is not None:
            self._service.close()
        self._engine.close()
        if self._stats_file is not None:
            save_counts(self._stats_file, self.config, self._engine.model.stats.counts)
            if self._replies:
                remember(run_file(self._checkpoint), self.run_record())
            self._stats_file = None
        for held in (self._tier, self._engine.model.cache):
            if held is not None:
                held.close()
        self._checkpoint.close()

    def __enter__(self) -> "Kimi":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _source(self) -> Engine | Service:
        return self._engine if self._service is None else self._service

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, thinking: bool) -> list[int]:
        return self.template.render_ids(messages, self.tokenizer, tools=tools, thinking=thinking)

    def _compile(self, report: OnProgress, many: ManyTokens | None) -> str:
        """Run every kernel once, so that compilation (seconds, first run only) happens where progress is shown.

        What failed, if that was a card's; empty if nothing did.
        """
        report(Progress("compile", 0, 1, "kernels"))
        formats = first_formats(self._checkpoint)
        try:
            if many is not None and formats is not None:
                many.compile(formats, self._engine.prefill_chunk * self.config.num_experts_per_tok)
            self._engine.logits([0])
        except KimiError as error:
            if self._engine.model.card is None:
                raise
            return error.message
        finally:
            self._engine.model.stats.reset()
        report(Progress("compile", 1, 1, "kernels"))
        return ""
