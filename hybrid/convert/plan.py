"""What a pack will be, decided before a weight is read: the formats of all experts and the bytes of every part.

The plan of an unfinished pack stands in its directory (quantize.json) together with the arguments it was made from; a
later run must bring the same ones, and takes the formats from there.

How much may the experts take?
    --bits B     B bits per weight, scales and padding included
    --ram SIZE   SIZE less 6 GiB for the system and the program, less the resident weights, less the KV cache of --ctx
                 tokens, kept as --kv (resident weights and cache only where there is no GPU to hold them)
    --mix NAMES  a named format for each matrix
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import quant
from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.blob import FORMATS, MATRICES, Formats, Shapes, matrix_bytes, place
from hybrid.checkpoint.calibration import COMPLETE, Calibration, layer_file, open_calibration, read_arrays
from hybrid.checkpoint.header import damaged
from hybrid.checkpoint.hf import read_json
from hybrid.config import ModelConfig
from hybrid.convert import allocation, resident
from hybrid.convert.source import Source, layer_part
from hybrid.device import choose_device
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory.hardware import total_ram
from hybrid.memory.kv_format import KINDS, kv_bytes
from quant.aligned import PAGE

INT4 = ("int4_g32", "int4_g32")
SHARDS = "shards"  # the argument that holds names and sizes of the source's shards
RESERVE = 6 << 30  # bytes of RAM left to the system, this program and its buffers
DEFAULT_CTX = 32768
GB = 1e9


@dataclass(frozen=True)
class Settings:
    """What a pack is to be. Of ram, bits and mix at most one is given; without any, this machine's RAM decides."""

    ram: int | None = None  # bytes
    bits: float | None = None  # per weight
    mix: Formats | None = None
    resident: str = "bf16"  # a key of resident.STORED
    calibration: Path | None = None
    seed: int = 0  # of the rotations
    ctx: int = DEFAULT_CTX  # tokens, for --ram
    kv: str = "bf16"  # a member of kv_format.KINDS: how the cache of these keeps rows

    def __post_init__(self) -> None:
        given = [value for value in (self.ram, self.bits, self.mix) if value is not None]
        if len(given) > 1:
            raise UsageError("--ram, --bits, --mix and --format int4 exclude each other.", "Give one of them.")
        assert self.resident in resident.STORED and self.kv in KINDS and 0 <= self.seed < 1 << 24

    @property
    def by_memory(self) -> bool:
        """Whether it is memory that decides what experts may take."""
        return self.bits is None and self.mix is None


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a pack."""

    arguments: dict[str, Any]
    formats: dict[int, list[Formats]]  # per layer and expert
    resident_bytes: dict[str, int]  # file size per part, header not counted

    @property
    def seed(self) -> int:
        return int(self.arguments["seed"])

    @property
    def resident(self) -> str:
        return str(self.arguments["resident"])

    def layer_bytes(self, config: ModelConfig) -> dict[int, int]:
        """Size of each layer's file of experts."""
        shapes = Shapes.of(config)
        return {layer: place(shapes, formats)[1] for layer, formats in self.formats.items()}

    def part_bytes(self, config: ModelConfig) -> dict[str, int]:
        """What each part adds to the disk."""
        experts = {layer_part(layer): size for layer, size in self.layer_bytes(config).items()}
        return {part: size + experts.get(part, 0) for part, size in self.resident_bytes.items()}

    def to_json(self) -> bytes:
        content = asdict(self) | {"formats": {str(n): _digits(pairs) for n, pairs in self.formats.items()}}
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Raises CheckpointError if the file is not what `to_json` gives."""
        content = read_json(path)
        try:
            formats = {int(layer): _pairs(digits) for layer, digits in content["formats"].items()}
            return cls(dict(content["arguments"]), formats, dict(content["resident_bytes"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise damaged(path, "it is no plan of a pack") from error


def _digits(pairs: list[Formats]) -> list[str]:
    """Formats of a layer as two strings with one digit per expert."""
    return ["".join(str(FORMATS.index(pair[matrix])) for pair in pairs) for matrix in (0, 1)]


def _pairs(digits: list[str]) -> list[Formats]:
    gate_up, down = ([FORMATS[int(digit)] for digit in text] for text in digits)
    return list(zip(gate_up, down, strict=True))


def parse_mix(text: str) -> Formats:
    """'trellis2', or 'gate_up=trellis1_5,down=trellis2'. Raises UsageError."""
    named = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    pair = (text, text) if "=" not in text else tuple(named.get(matrix, "") for matrix in MATRICES)
    if set(pair) - set(quant.LADDER) or ("=" in text and set(named) != set(MATRICES)):
        known = ", ".join(quant.LADDER)
        raise UsageError(f"{text!r} is no mix.", f"Write NAME or gate_up=NAME,down=NAME with NAME one of {known}.")
    return pair[0], pair[1]


def arguments(source: Source, settings: Settings) -> dict[str, Any]:
    """The arguments a rerun is held to, in a form JSON keeps."""
    chosen = asdict(settings) | {"calibration": _calibration_sha256(settings.calibration)}
    made_by = {"made_by": f"kimi-local {version('kimi-local')}", "model": source.config_sha256}
    return json.loads(json.dumps(made_by | chosen | {SHARDS: source.sizes()}))


def _calibration_sha256(path: Path | None) -> str | None:
    return hashlib.sha256((open_calibration(path).path / COMPLETE).read_bytes()).hexdigest() if path else None


def make_plan(source: Source, checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Decide everything. Raises DoesNotFit if no format is small enough, CheckpointError for a foreign calibration."""
    if source.config.hidden_size % 32 or source.config.moe_intermediate_size % 32:
        raise UsageError(f"Experts of {source.directory} have sizes that are not multiples of 32.", "Use it as it is.")
    if settings.resident == "int4" and source.config.group_size != resident.GROUP:
        raise UsageError("--resident int4 needs a source with INT4 groups of 32.", "Use --resident int8.")
    layouts = {part: resident.layout(checkpoint, names, settings.resident) for part, names in source.parts.items()}
    in_memory = resident.memory_bytes(source.config, layouts.values())
    calibration = open_calibration(settings.calibration) if settings.calibration else None
    if calibration:
        calibration.require_match(checkpoint)
    return Plan(
        arguments(source, settings),
        _choose(source.config, settings, in_memory, calibration),
        {part: resident.file_bytes(places) for part, places in layouts.items() if places},
    )


def _choose(
    config: ModelConfig, settings: Settings, in_memory: int, calibration: Calibration | None
) -> dict[int, list[Formats]]:
    experts = config.n_routed_experts
    if settings.mix:
        return {layer: [settings.mix] * experts for layer in config.moe_layers}
    budget = expert_budget(config, settings, in_memory)
    if budget >= config.num_experts * Shapes.of(config).blob_bytes(INT4):
        return {layer: [INT4] * experts for layer in config.moe_layers}
    choice = allocation.allocate(_sensitivities(config, calibration), ladder_costs(config), budget)
    names = [[(quant.LADDER[gate_up], quant.LADDER[down]) for gate_up, down in layer] for layer in choice.tolist()]
    return dict(zip(config.moe_layers, names, strict=True))


def expert_budget(config: ModelConfig, settings: Settings, in_memory: int) -> int:
    """Bytes for all routed experts; `in_memory` are those of the resident weights. Raises DoesNotFit for none."""
    if settings.bits is not None:
        return int(settings.bits * config.routed_params / 8)
    ram = settings.ram or total_ram()
    cache = kv_room(config, settings)
    taken = RESERVE + (in_memory + cache if cache else 0)
    if ram <= taken:
        raise DoesNotFit(
            f"{ram / GB:,.1f} GB of memory leave nothing for experts: {taken / GB:,.1f} GB go to the system, the "
            f"resident weights and the KV cache of {settings.ctx:,} tokens in {settings.kv}.",
            "Try --resident int8, --kv fp8, a smaller --ctx, or --bits to ignore the memory.",
        )
    return ram - taken


def kv_room(config: ModelConfig, settings: Settings) -> int:
    """Bytes of RAM that experts leave to the KV cache; 0 where memory does not decide, or a card holds the cache."""
    if not settings.by_memory or choose_device(None).type != "cpu":
        return 0
    return kv_bytes(config, min(settings.ctx, config.max_position_embeddings), settings.kv)


def ladder_costs(config: ModelConfig) -> allocation.Costs:
    sizes = [[matrix_bytes(name, shape) for name in quant.LADDER] for shape in Shapes.of(config)]
    distortion = np.array([allocation.DISTORTION[name] for name in quant.LADDER])
    return allocation.Costs(np.array(sizes, np.int64), distortion, PAGE)


def _sensitivities(config: ModelConfig, calibration: Calibration | None) -> np.ndarray:
    if calibration is None:
        return allocation.default_sensitivities(config.num_moe_layers, config.n_routed_experts)
    # The second moments are left alone: only a few numbers per layer are wanted here.
    layers = [read_arrays(calibration.path / layer_file(layer)) for layer in config.moe_layers]
    counts, output_ms, residual_ms = (
        np.stack([np.array(layer[name], np.float64) for layer in layers])
        for name in ("counts", "output_ms", "residual_ms")
    )
    return allocation.calibrated_sensitivities(counts, output_ms, residual_ms[:, 0])


def require_same(begun: dict[str, Any], wanted: dict[str, Any], staging: Path) -> None:
    """Raise UsageError if an unfinished pack was begun with other arguments; shards may have been deleted since."""
    anew = f"Use the same input and options, or remove {staging} to begin anew."
    for name, value in begun.items():
        now = wanted.get(name)
        if name != SHARDS and now != value:
            raise UsageError(f"{staging} was begun with {name} {_spelt(value)}, not {_spelt(now)}.", anew)
    changed = [shard for shard, size in wanted[SHARDS].items() if begun.get(SHARDS, {}).get(shard, size) != size]
    if changed:
        raise UsageError(f"{changed[0]} has changed since {staging} was begun.", anew)


def _spelt(value: Any) -> str:
    return "none" if value is None else ",".join(value) if isinstance(value, list) else str(value)
