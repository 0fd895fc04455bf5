"""`Kimi`: a loaded model that can be talked to. Engine and chat put together, nothing else."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.template import ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint import Checkpoint, Pack, open_checkpoint
from hybrid.config import ModelConfig
from hybrid.device import choose_device, use_threads
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.engine.sampler import SamplingParams
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory.bandwidth import ram_ceiling_gbps
from hybrid.memory.hardware import available_ram
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.router_stats import read_counts, save_counts, stats_file
from hybrid.memory.tiers import NvmeTier
from hybrid.model.transformer import Placement, Transformer
from hybrid.names import DEMO, model_path
from hybrid.progress import OnProgress, Progress, ignore
from hybrid.reply import Reply
from hybrid.stats import Stats

DEFAULT_CTX = 32768
PREFILL_CHUNK = 256
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Thinking and instant, as Moonshot recommends for K2.5.
RECOMMENDED = {True: {"temperature": 1.0, "top_p": 0.95}, False: {"temperature": 0.6, "top_p": 0.95}}
GIB = 1 << 30
SPARE = 16  # of the free memory, one part in so many is left free where experts take what they can get

__all__ = ["Kimi", "Message", "Reply", "SamplingParams", "Stats"]


class Kimi:
    """A model in memory. One thread at a time may iterate its replies; use as a context manager or `close` it."""

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine, tier: NvmeTier | None = None, stats_file: Path | None = None
    ) -> None:
        """Use `Kimi.load`."""
        self._checkpoint = checkpoint
        self._engine = engine
        self._tier = tier
        self._stats_file = stats_file

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
        keep_stats: bool = False,
        activations: str = "int8",
        verify: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        on_progress: OnProgress | None = None,
    ) -> "Kimi":
        """Load a model directory, "demo" (also None: the demo model, built on first use) or "pocket".

        dtype bfloat16 (default) or float32, of the resident weights; activations int8 (default) or float32, of the
        routed experts' inputs; ctx in tokens, of prompt and answer; cache in tokens (default and at least ctx), shared
        by what `generate_many` makes at once; verify compares every expert of a pack with its checksum before it is
        used (resident weights always are). ram_budget in bytes: of a pack's routed experts, so many are kept in RAM and
        the others read from its files as they are needed, for the same answers; None keeps all of them, or as many as
        fit. keep_stats adds how experts were chosen to what is known of the model, when it is closed.

        Raises CheckpointError for a model that is missing, damaged or unknown, and DoesNotFit, before reading weights,
        when memory will not hold it.
        """
        if activations not in ("int8", "float32") or dtype not in (None, *DTYPES):
            raise UsageError(f"activations {activations!r} with dtype {dtype!r} is not a choice.", "See --help.")
        report = on_progress or ignore
        placement = Placement(
            choose_device(device), DTYPES[dtype or "bfloat16"], activations == "float32", use_threads(threads)
        )
        checkpoint = open_checkpoint(model_path(DEMO if path is None else path, report), verify=verify)
        config = checkpoint.config
        tokens = min(ctx or DEFAULT_CTX, config.max_position_embeddings)
        if ctx and ctx > tokens:
            raise UsageError(f"The context of {ctx:,} tokens is too long.", f"This model takes {tokens:,}.")
        room = max(tokens, cache or 0)
        tier = _open_tier(checkpoint, placement, room, ram_budget)
        if tier is not None:
            placement = replace(placement, tier=tier)
        model = Transformer(checkpoint, placement, _loading(checkpoint, placement, tier, report))
        checkpoint.release()
        known = stats_file(checkpoint)
        if tier is not None:
            tier.preload(read_counts(known, config), lambda done, total: report(Progress("tier", done, total, "B")))
            model.stats.tier = tier.counters
        kv = KVCache(config, room, dtype=placement.dtype, device=placement.device)
        kimi = cls(checkpoint, Engine(model, kv, prefill_chunk, tokens), tier, known if keep_stats else None)
        kimi._compile(report)
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
    def ctx(self) -> int:
        """Tokens of context: prompt and answer together."""
        return self._engine.ctx

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
        """Whether replies reason first unless told otherwise; a checkpoint's generation_config may say it cannot."""
        return self.generation_config.get("thinking") is not False

    def default_params(self, thinking: bool) -> SamplingParams:
        """Sampling as the checkpoint's generation_config says, else as recommended for the mode."""
        values: dict[str, Any] = dict(RECOMMENDED[thinking])
        known = ("temperature", "top_p", "top_k", "min_p")
        values |= {key: self.generation_config[key] for key in known if self.generation_config.get(key) is not None}
        if self.generation_config.get("do_sample") is False:
            values["temperature"] = 0.0
        return SamplingParams(**values, stop_ids=self.stop_ids)

    # -- what it does -----------------------------------------------------------------------------------------------
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 [tokens, vocab]: the scores of what follows every prefix of `token_ids`."""
        return self._engine.logits(list(token_ids))

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """New ids after `token_ids`, the stop id included."""
        return self._engine.stream(Request(list(token_ids), params))

    def generate_many(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, batch: int = 32
    ) -> Iterator[tuple[int, list[int], str]]:
        """(index, new ids, finish reason) of every prompt as its answer ends, up to `batch` of them made at once.

        Each answer is the one `generate` would give, and with a seed the same whatever else is being made. Prompts for
        which the cache has no room yet wait. Raises ContextExceeded for one that never fits, before computing anything.
        """
        if batch < 1:
            raise UsageError(f"A batch of {batch} makes no answers.", "It must be 1 or more.")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [Request(list(ids), chosen) for ids, chosen in zip(prompts, each, strict=True)]
        ended = self._engine.stream_many(requests, batch)
        return ((index, ids, requests[index].finish_reason) for index, ids in ended)

    def reply(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        think_budget: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Reply:
        """The next turn of a conversation. Raises ContextExceeded before computing anything when it does not fit."""
        thinking = self.default_thinking if thinking is None else thinking
        prompt = self.tokenizer.reuse(self._render(messages, tools, thinking), self._engine.tokens)
        report = on_progress or ignore
        request = Request(
            prompt,
            params or self.default_params(thinking),
            on_prefill=lambda done, total: report(Progress("prefill", done, total, "tok")),
        )
        calls = sum(len(message.tool_calls) for message in messages)
        parser = ReplyParser.after(prompt, self.tokenizer, calls)
        return Reply(self._engine, self.tokenizer, request, parser, think_budget)

    def count_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> int:
        """Tokens of the prompt that `reply` would send."""
        return len(self._render(messages, tools, self.default_thinking if thinking is None else thinking))

    def expert_report(self) -> dict[str, Any]:
        """Use of the routed experts since loading: `layers`, `counts` int64 [layers, experts] as lists, and `tier`.

        That is None where all experts are in RAM, else `TierCounters` with its `hit_rate`, `slots` and `slot_bytes`.
        """
        stats, tier = self._engine.model.stats, self._tier
        facts = {} if tier is None else {"slots": tier.slots.count, "slot_bytes": tier.slot_bytes}
        return {
            "layers": list(stats.layers),
            "counts": [stats.counts[layer].tolist() for layer in stats.layers],
            "tier": None if tier is None else asdict(tier.counters) | {"hit_rate": tier.counters.hit_rate} | facts,
        }

    def ram_ceiling_gbps(self) -> float:
        """This machine's read bandwidth at the threads in use, in GB/s; measured once per machine and kept."""
        return ram_ceiling_gbps(torch.get_num_threads())

    def close(self) -> None:
        """Let go of the weights' files, and keep the routing if that was asked for."""
        if self._stats_file is not None:
            save_counts(self._stats_file, self.config, self._engine.model.stats.counts)
            self._stats_file = None
        if self._tier is not None:
            self._tier.close()
        self._checkpoint.close()

    def __enter__(self) -> "Kimi":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, thinking: bool) -> list[int]:
        return self.template.render_ids(messages, self.tokenizer, tools=tools, thinking=thinking)

    def _compile(self, report: OnProgress) -> None:
        """Run every kernel once, so that compilation (seconds, first run only) happens where progress is shown."""
        report(Progress("compile", 0, 1, "kernels"))
        self._engine.logits([0])
        self._engine.model.stats.reset()
        report(Progress("compile", 1, 1, "kernels"))


def _load_bytes(checkpoint: Checkpoint, placement: Placement) -> dict[str, int]:
    packed = placement.device.type == "cpu" and not placement.exact
    return checkpoint.load_bytes(placement.dtype.itemsize, packed=packed)


def _loading(
    checkpoint: Checkpoint, placement: Placement, tier: NvmeTier | None, report: OnProgress
) -> Callable[[int], None]:
    """What `Transformer` tells of its layers, as bytes."""
    parts, layers = _load_bytes(checkpoint, placement), checkpoint.config.num_hidden_layers
    total = sum(parts.values()) - (0 if tier is None else parts["routed_experts"])
    return lambda done: report(Progress("load", total * done // layers, total, "B"))


def _open_tier(checkpoint: Checkpoint, placement: Placement, tokens: int, ram_budget: int | None) -> NvmeTier | None:
    """None where all routed experts are to be in RAM, else what keeps `ram_budget` bytes of them there.

    Refuses, with the sizes, what memory cannot hold: before a weight is read.
    """
    parts = _load_bytes(checkpoint, placement)
    cache = tokens * checkpoint.config.kv_bytes_per_token(placement.dtype.itemsize)
    experts, needed, available = parts["routed_experts"], sum(parts.values()) + cache, available_ram()
    room = available - (needed - experts)
    pack = checkpoint if isinstance(checkpoint, Pack) and not placement.exact else None
    if ram_budget is not None and pack is None:
        raise UsageError("Only packs, with int8 activations, run with a RAM budget.", "Make one: kimi-local quantize.")
    if pack is not None and ram_budget is not None and ram_budget < experts and ram_budget <= room:
        return NvmeTier(pack, ram_budget)
    if pack is not None and ram_budget is None and 0 < room < experts:
        return NvmeTier(pack, max(0, room - available // SPARE))
    if experts > room:
        sizes = ", ".join(f"{name.replace('_', ' ')} {size / GIB:,.1f} GiB" for name, size in parts.items())
        raise DoesNotFit(
            f"This model needs {needed / GIB:,.1f} GiB of memory ({sizes}, KV cache {cache / GIB:,.1f} GiB for "
            f"{tokens:,} tokens) and {available / GIB:,.1f} GiB are free.",
            "Nothing was read. Use a smaller --ctx or --ram-budget, a smaller model, or a machine with more memory.",
        )
    return None
