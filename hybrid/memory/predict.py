"""How fast a placement will be: a decode step, a prefill chunk and loading, each simulated as tasks on resources.

    GPU         resident matrices, shared and cached experts: bound by the card's memory, a chunk also by arithmetic
    CPU cores   experts in RAM, and without a card everything
    RAM         what those read, what is uploaded from there, what is read into it
    PCIe        experts of a chunk on their way to the card
    NVMe        experts that are not in RAM

A prediction's range runs from FLAT routing, a full context and speeds at the lower end of what is known of them to
SKEWED routing, a short context and the upper end. Where it was counted how often the model chose each expert, that
takes the place of what the skews say of popularity. Uploads that refill slots are few and not counted.
"""

from typing import NamedTuple

from hybrid.config import ModelConfig
from hybrid.memory import parts
from hybrid.memory.kv_format import REDUCED, KVFormat
from hybrid.memory.place import EXCLUSIVE, NVME, Options, Placement
from hybrid.memory.rates import CPU_LAYER, CPU_SHARE, GPU_LAYER, Rates
from hybrid.memory.simulate import (
    EXPECTED,
    FLAT,
    SKEWED,
    Skew,
    Task,
    Timeline,
    Uses,
    distinct_experts,
    expected_uses,
    recorded_uses,
    simulate,
)

GPU, CPU, RAM, PCIE, DISK, FIXED = "GPU", "CPU cores", "RAM bandwidth", "PCIe", "NVMe", "fixed costs per layer"
SHORT_CONTEXT = 1024  # tokens already there when a typical step runs
DECODE_STEPS = 8
START = 4.0  # seconds: Python, torch, kernels
G = 1e9


class Figure(NamedTuple):
    """One predicted number with its range, and the resource that decides it."""

    value: float
    low: float
    high: float
    limit: str


class Predicted(NamedTuple):
    """Tokens per second of all sequences together, of a prompt, and seconds until the model can be asked."""

    decode_tok_s: Figure
    prefill_tok_s: Figure
    load_s: Figure


class Work(NamedTuple):
    """A placement at certain speeds."""

    config: ModelConfig
    options: Options
    placement: Placement
    rates: Rates

    # -- seconds of one piece of work by resource ---------------------------------------------------------------------
    def resident(self, part: tuple[int, int], past: float = 0.0) -> dict[str, float]:
        """A matrix (bytes, weights) applied to one step's tokens that look back at `past` positions in all."""
        config, rates, tokens = self.config, self.rates, self.options.batch
        rows = past * KVFormat.of(config, self.options.kv).row_bytes
        if self.placement.on_gpu:
            return {GPU: (part[0] + rows) / (rates.vram * G)}
        scores = past * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
        speed = rates.cores * G
        seconds = self._many(part[1] * tokens, f"resident {self.placement.resident}", tokens)
        seconds += scores / (rates.decode["scores"] * speed)
        if self.options.kv in REDUCED:  # a CPU first writes them as bf16, then reads that
            rows += 2 * past * KVFormat.of(config, "bf16").row_bytes
        return {CPU: seconds, RAM: (part[0] + rows) / (rates.ram * CPU_SHARE * G)}

    def experts(self, count: float, uses: float) -> dict[str, float]:
        """`count` experts on the CPU, used by `uses` tokens in all."""
        seconds = uses * sum(
            share * self._many(self.config.expert_params * fraction, name, uses / max(count, 1e-9))
            for pair, share in self._shares()
            for name, fraction in zip(pair, (2 / 3, 1 / 3), strict=True)
        )
        return {CPU: seconds, RAM: count * self.expert_bytes / (self.rates.ram * CPU_SHARE * G)}

    def upload(self, count: float) -> dict[str, float]:
        size = count * self.expert_bytes / G
        return {PCIE: size / self.rates.pcie, RAM: size / self.rates.ram}

    def read(self, count: float) -> dict[str, float]:
        size = count * self.expert_bytes / G
        return {DISK: size / self.rates.disk, RAM: size / self.rates.ram}

    @property
    def expert_bytes(self) -> float:
        return self.placement.mix.bytes(self.config) / max(1, self.config.num_experts)

    def _shares(self) -> list[tuple[tuple[str, str], float]]:
        counts = self.placement.mix.counts
        return [(pair, count / self.config.num_experts) for pair, count in counts.items()]

    def _many(self, products: float, name: str, tokens: float) -> float:
        """Seconds of `products` on all cores, `tokens` tokens per weight: between the speeds of one and of 64."""
        one, many = self.rates.decode[name], self.rates.prefill[name]
        share = min(1.0, max(0.0, (tokens - 1) / 63)) ** 0.5
        return products / ((one + (max(one, many) - one) * share) * self.rates.cores * G)

    @property
    def layer_cost(self) -> dict[str, float]:
        return {FIXED: GPU_LAYER if self.placement.on_gpu else CPU_LAYER}


def predict(
    config: ModelConfig, options: Options, placement: Placement, rates: Rates, skew: Skew = EXPECTED
) -> Predicted:
    """Predictions for a placement that fits."""
    short = min(options.ctx, SHORT_CONTEXT)
    typical = Work(config, options, placement, rates)
    slow = Work(config, options, placement, rates.scaled(1 - rates.spread))
    fast = Work(config, options, placement, rates.scaled(1 + rates.spread / 2))
    step = decode(typical, skew, short)
    worst, best = decode(slow, FLAT, options.ctx), decode(fast, SKEWED, short)
    tokens = options.batch
    decoded = _figure(step.limit, tokens / step.seconds, tokens / worst.seconds, tokens / best.seconds)
    chunk = min(placement.prefill_chunk, options.ctx)
    chunks = [prefill(work, chunk) for work in (typical, slow, fast)]
    filled = _figure(chunks[0].limit, *(chunk / found.seconds for found in chunks))
    loads = [load(work) for work in (typical, fast, slow)]
    return Predicted(decoded, filled, _figure(loads[0].limit, *(found.seconds for found in loads)))


def decode_speed(config: ModelConfig, options: Options, placement: Placement, rates: Rates, skew: Skew) -> float:
    """The first figure of `predict` alone: tokens per second of all sequences together."""
    work = Work(config, options, placement, rates)
    return options.batch / decode(work, skew, min(options.ctx, SHORT_CONTEXT)).seconds


def _figure(limit: str, value: float, low: float, high: float) -> Figure:
    return Figure(value, min(low, value), max(high, value), limit)


# -- one step ---------------------------------------------------------------------------------------------------------
def decode(work: Work, skew: Skew, past: int) -> Timeline:
    """One token for each sequence, with `past` tokens before it: the mean of a few steps."""
    config, tasks = work.config, list[Task]()
    resident, used = work.placement.weights, uses(work, skew)
    for step in range(DECODE_STEPS):
        for layer in range(config.num_hidden_layers):
            sample = (step * 37 + layer) % len(used.ram)
            _layer(work, tasks, layer, resident, Uses(*(counts[sample : sample + 1] for counts in used)), past)
        last = len(tasks) - 1
        tasks.append(Task(work.resident(resident.head), (last,)))
    timeline = simulate(tasks)
    busy = {name: seconds / DECODE_STEPS for name, seconds in timeline.busy.items()}
    return Timeline(timeline.seconds / DECODE_STEPS, busy)


def uses(work: Work, skew: Skew) -> Uses:
    """Samples of how many distinct experts of a layer one step needs, by where they are."""
    config, counts, k = work.config, work.options.counts, work.config.num_experts_per_tok
    if not config.num_experts:
        return expected_uses(1, 1, 0.0, 1.0, FLAT)
    if counts is None or not counts.any():
        found = _guessed(work, skew)
    else:
        slots = work.placement.vram_slots, work.placement.ram_slots
        found = recorded_uses(counts[list(config.moe_layers)], k, *slots, skew.persistence)
    wider = distinct_experts(config.n_routed_experts, k, work.options.batch) / k
    return Uses(*(where * wider for where in found))


def _guessed(work: Work, skew: Skew) -> Uses:
    """Of a model whose routing was never recorded."""
    config, placement = work.config, work.placement
    vram, ram = placement.vram_slots / config.num_experts, placement.ram_slots / config.num_experts
    if placement.tier == EXCLUSIVE:
        skew = skew._replace(persistence=0.0)  # who stays on the card profits from being popular alone
    # Shares rounded, so that neighbouring plans share one simulation.
    return expected_uses(
        config.n_routed_experts,
        config.num_experts_per_tok,
        round(vram, 3),
        round(ram, 2) if placement.tier == NVME else 2.0,
        skew,
    )


def _layer(work: Work, tasks: list[Task], layer: int, resident: parts.Resident, used: Uses, past: int) -> None:
    """Attention, then shared and cached experts beside those in RAM beside reads of the rest, then all meet."""
    config, batch = work.config, work.options.batch
    before = (len(tasks) - 1,) if tasks else ()
    tasks.append(Task(work.resident(resident.attention, past * batch), before))
    attention = len(tasks) - 1
    if not config.is_moe_layer(layer):
        tasks.append(Task(work.resident(resident.dense), (attention,)))
    else:
        tasks.extend(_experts(work, resident, attention, used))
    tasks.append(Task(work.layer_cost, tuple(range(attention, len(tasks)))))


def _experts(work: Work, resident: parts.Resident, attention: int, used: Uses) -> list[Task]:
    vram, ram, nvme = (float(counts[0]) for counts in used)
    repeats = work.options.batch * work.config.num_experts_per_tok / max(vram + ram + nvme, 1e-9)
    shared = work.resident(resident.shared)
    if vram:
        shared[GPU] = shared.get(GPU, 0.0) + vram * work.expert_bytes / (work.rates.vram * G)
    tasks = [Task(shared, (attention,)), Task(work.experts(ram, ram * repeats), (attention,))]
    if nvme:
        # This layer's reads go on while the CPU works on what is there.
        tasks.append(Task(work.read(nvme), (attention,)))
        tasks.append(Task(work.experts(nvme, nvme * repeats), (attention + len(tasks),)))
    return tasks


# -- a chunk of a prompt ----------------------------------------------------------------------------------------------
def prefill(work: Work, tokens: int) -> Timeline:
    """A chunk of `tokens`: experts streamed through the card or multiplied on the CPU, whichever is faster."""
    on_cpu = simulate(_chunk_tasks(work, tokens, streamed=False))
    if not work.placement.on_gpu:
        return on_cpu
    streamed = simulate(_chunk_tasks(work, tokens, streamed=True))
    return min(streamed, on_cpu, key=lambda timeline: timeline.seconds)


def _chunk_tasks(work: Work, tokens: int, *, streamed: bool) -> list[Task]:
    config, tasks = work.config, list[Task]()
    resident = work.placement.weights
    meetings: list[int] = []
    for layer in range(config.num_hidden_layers):
        before = tuple(meetings[-1:])
        tasks.append(Task(_chunk_resident(work, resident.attention, tokens, past=tokens / 2), before))
        attention = len(tasks) - 1
        if not config.is_moe_layer(layer):
            tasks.append(Task(_chunk_resident(work, resident.dense, tokens), (attention,)))
        else:
            tasks.append(Task(_chunk_resident(work, resident.shared, tokens), (attention,)))
            # Two layers' buffers: this layer's experts may come as soon as those before the last are done with.
            tasks.extend(_chunk_experts(work, tokens, streamed, tuple(meetings[-2:-1]), len(tasks), attention))
        tasks.append(Task(work.layer_cost, tuple(range(attention, len(tasks)))))
        meetings.append(len(tasks) - 1)
    tasks.append(Task(work.resident(resident.head), tuple(meetings[-1:])))
    return tasks


def _chunk_experts(
    work: Work, tokens: int, streamed: bool, buffers: tuple[int, ...], first: int, attention: int
) -> list[Task]:
    config, placement = work.config, work.placement
    k, experts = config.num_experts_per_tok, config.n_routed_experts
    touched = distinct_experts(experts, k, tokens)
    elsewhere = placement.ram_slots + placement.vram_slots
    on_drive = touched * (1 - elsewhere / config.num_experts) if placement.tier == NVME else 0.0
    read = Task(work.read(on_drive), buffers)
    if not streamed:
        return [read, Task(work.experts(touched, tokens * k), (first, attention))]
    cached = placement.vram_slots / config.num_experts
    upload = Task(work.upload(touched * (1 - cached)), (*buffers, first))
    products, rates = tokens * k * config.expert_params, work.rates
    # Decoding writes bf16 weights and the product reads them.
    decoding = touched * config.expert_params * 4 / (rates.vram * G)
    return [read, upload, Task({GPU: 2 * products / (rates.tflops * 1e12) + decoding}, (first + 1, attention))]


def _chunk_resident(work: Work, part: tuple[int, int], tokens: int, past: float = 0.0) -> dict[str, float]:
    config, rates = work.config, work.rates
    products = tokens * part[1] + tokens * past * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
    if work.placement.on_gpu:
        return {GPU: 2 * products / (rates.tflops * 1e12) + part[0] / (rates.vram * G)}
    speed = rates.prefill[f"resident {work.placement.resident}"]
    return {CPU: products / (speed * rates.cores * G), RAM: part[0] / (rates.ram * CPU_SHARE * G)}


# -- loading ----------------------------------------------------------------------------------------------------------
def load(work: Work) -> Timeline:
    """From the command to the first question: reading what RAM and card hold at the drive's speed."""
    config, placement, rates, resident = work.config, work.placement, work.rates, work.placement.weights
    always = sum(resident.parts(config).values()) + resident.embedding
    read = placement.ram_slots * work.expert_bytes
    if placement.exclusive:
        read += placement.vram_slots * work.expert_bytes
    upload = float(always) if placement.on_gpu else 0.0
    upload += placement.vram_slots * work.expert_bytes
    reading = Task({DISK: (always + read) / (rates.disk * G), RAM: (always + read) / (rates.ram * G)})
    copying = Task({PCIE: upload / (rates.pcie * G)})
    timeline = simulate([reading, copying])
    return Timeline(START + timeline.seconds, timeline.busy)
