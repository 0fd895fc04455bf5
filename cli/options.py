"""The options of `kimi-local chat`: their spelling, their units, and what they were found to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from hybrid.errors import UsageError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TOKENS = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_BYTES = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


class Activations(StrEnum):
    int8 = "int8"
    float32 = "float32"


class Speculate(StrEnum):
    off = "off"
    auto = "auto"


class KV(StrEnum):
    """How rows of the KV cache are kept; auto as they are computed."""

    auto = "auto"
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"


class Dtype(StrEnum):
    """Of the resident weights."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def parse_tokens(text: str) -> int:
    """'32k' = '32K' = 32768, '1.5k' = 1536, '32,768'. Raises UsageError."""
    number = _measure(text, _TOKENS)
    if number is None or number < 1:
        raise UsageError(f"{text!r} is no number of tokens.", "Write 8192, 8k or 1.5k (k = 1,024).")
    return number


def parse_bytes(text: str) -> int:
    """'24G' = '24GB' = '24GiB' = 24 * 2**30. Raises UsageError."""
    number = _measure(text, _BYTES)
    if number is None or number < 1:
        raise UsageError(f"{text!r} is no amount of memory.", "Write 24G, 512M or a number of bytes (G = 2^30).")
    return number


def parse_room(text: str) -> int:
    """Bytes as `parse_bytes`, or 0."""
    return 0 if text.strip() == "0" else parse_bytes(text)


def _measure(text: str, pattern: re.Pattern[str]) -> int | None:
    match = pattern.fullmatch(text.strip())
    if match is None:
        return None
    digits, unit = match[1].replace("_", "").replace(",", ""), match[2].lower()
    return round(float(digits) * _UNITS[unit])


_T = TypeVar("_T")


def _parsed(parse: Callable[[str], _T]) -> Callable[[Any], _T]:
    """The same parser with its complaint as typer expects it, so that the option is named in the error."""

    def convert(text: Any) -> _T:
        try:
            return parse(str(text))
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error

    return convert


_tokens = _parsed(parse_tokens)
_bytes = _parsed(parse_bytes)
room = _parsed(parse_room)


def option(*names: str, help: str, env: bool = True, show_default: bool | str = False, **more: Any) -> Any:
    """A typer option; `--top-p` is also read from KIMI_LOCAL_TOP_P unless `env` is false."""
    longest = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "KIMI_LOCAL_" + longest.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, envvar=variable if env else None, show_envvar=False, show_default=show_default, **more
    )


ENVIRONMENT = (
    "Each setting can also come from the environment: --top-p from KIMI_LOCAL_TOP_P, MODEL from KIMI_LOCAL_MODEL; "
    "an option on the command line wins. NO_COLOR and FORCE_COLOR are obeyed. Exit codes: 0 answered, 1 failed, "
    "2 wrong use, 3 does not fit this machine, 4 model missing or damaged, 130 interrupted."
)


def sampling(*names: str, help: str, **more: Any) -> Any:
    return option(*names, help=help, rich_help_panel="Sampling (the model knows its defaults)", **more)


def machine(*names: str, help: str, **more: Any) -> Any:
    return option(*names, help=help, rich_help_panel="Machine", **more)


def output(*names: str, help: str, **more: Any) -> Any:
    return option(*names, help=help, rich_help_panel="Output", **more)


def conversation(*names: str, help: str, **more: Any) -> Any:
    return option(*names, help=help, rich_help_panel="Conversation", **more)


_MODEL = "Directory of a checkpoint, demo or pocket; without one demo, which is built on first use."
_SYSTEM = 'System prompt; "" removes the default one.'
_BUDGET = "End the reasoning after so many tokens: 8k, 32k, 96k, ..."
_RAM = "For a pack's experts; those beyond it are read from the drive when needed. By default all that is free."
_CARD = "Experts on the card; by default as many as there is room for, 0 for none."
_KV = "The context in memory: fp8 or int8 take little more than half, and round what attention sees."
_KV_DISK = "Disk for what was read, so that it need not be read again after a restart; 0 for none."
_SPECULATE = "auto: compute repeated text ahead where that proves faster; in bfloat16 an answer can rarely differ."
_STATS = "Counts and speeds below answers; --no-stats also keeps no record of the experts chosen."
_HISTORY = "Save neither the conversation nor what is typed, and nothing of --kv-disk."
_ATTACH = "Use a running `kimi-local serve` of the model (auto), load it here (never), or the server at a URL."
_KEY = "What the server wants from its clients; best given as KIMI_LOCAL_API_KEY."
_ACTIVATIONS = "What experts compute with; float32 is slow and for verification."

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", envvar="KIMI_LOCAL_MODEL", show_envvar=False, show_default=False, help=_MODEL),
]
ModelOption = Annotated[str | None, option("-m", "--model", metavar="MODEL", env=False, help="The same as MODEL.")]
Prompt = Annotated[
    str | None, option("-p", "--prompt", metavar="TEXT", env=False, help="Answer TEXT and exit; - reads only stdin.")
]
System = Annotated[str | None, conversation("-s", "--system", metavar="TEXT", help=_SYSTEM)]
SystemFile = Annotated[Path | None, conversation("--system-file", metavar="FILE", help="System prompt from a file.")]
Continue = Annotated[bool, conversation("-c", "--continue", env=False, help="Continue the newest conversation.")]
Session = Annotated[
    str | None, conversation("-S", "--session", metavar="ID", env=False, help="Continue the one with this id or name.")
]
NoHistory = Annotated[bool, conversation("--no-history", help=_HISTORY)]
Think = Annotated[bool | None, conversation("--think/--no-think", help="Reason before answering, or not.")]
ThinkBudget = Annotated[int | None, conversation("--think-budget", metavar="TOKENS", parser=_tokens, help=_BUDGET)]
HideThinking = Annotated[bool, output("--hide-thinking", help="Do not show the reasoning.")]
Temperature = Annotated[
    float | None, sampling("--temp", "--temperature", metavar="X", min=0.0, help="0 = always the likeliest token.")
]
TopP = Annotated[
    float | None, sampling("--top-p", metavar="X", min=0.0, max=1.0, help="Likeliest tokens that make up this share.")
]
TopK = Annotated[int | None, sampling("--top-k", metavar="N", min=0, help="The N likeliest tokens; 0 = all.")]
MinP = Annotated[
    float | None, sampling("--min-p", metavar="X", min=0.0, max=1.0, help="At least X times the likeliest's share.")
]
Seed = Annotated[int | None, sampling("--seed", metavar="N", help="Same seed, same answer.")]
MaxTokens = Annotated[
    int | None, sampling("-n", "--max-tokens", metavar="TOKENS", parser=_tokens, help="Longest reply, with reasoning.")
]
Ctx = Annotated[int | None, machine("--ctx", "--ctx-size", metavar="TOKENS", parser=_tokens, help="Context, as 32k.")]
Threads = Annotated[int | None, machine("--threads", metavar="N", min=1, help="Cores to compute on.")]
Device = Annotated[str | None, machine("--device", metavar="NAME", help="cpu or cuda.")]
ActivationsOption = Annotated[Activations, machine("--activations", help=_ACTIVATIONS, show_default=True)]
RamBudget = Annotated[int | None, machine("--ram-budget", metavar="SIZE", parser=_bytes, help=_RAM)]
GpuExperts = Annotated[int | None, machine("--gpu-experts", metavar="N", min=0, help=_CARD)]
KvOption = Annotated[KV, machine("--kv", help=_KV, show_default=True)]
KvDisk = Annotated[
    int | None, machine("--kv-disk", metavar="SIZE", parser=room, help=_KV_DISK, show_default="8G, or 10% of its space")
]
SpeculateOption = Annotated[Speculate, machine("--speculate", help=_SPECULATE, show_default=True)]
Verify = Annotated[bool, machine("--verify", help="Compare every expert of a pack with its checksum first.")]
Attach = Annotated[str, machine("--attach", metavar="auto|never|URL", help=_ATTACH, show_default=True)]
ApiKey = Annotated[str | None, machine("--api-key", metavar="KEY", help=_KEY)]
Json = Annotated[bool, output("--json", help="One JSON object: text, reasoning, usage, timings, ...")]
StreamJson = Annotated[bool, output("--stream-json", help="JSON lines as they come, then that object.")]
Stats = Annotated[bool | None, output("--stats/--no-stats", help=_STATS)]
Quiet = Annotated[bool, output("-q", "--quiet", help="Nothing but the answer and errors.")]
Raw = Annotated[bool, output("--raw", help="The answer as the model wrote it, no markdown.")]
NoStream = Annotated[bool, output("--no-stream", help="Show the answer when it is complete.")]


def _note_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().params["debug"] = True
    return value


Debug = Annotated[bool, option("--debug", callback=_note_debug, help="Show the traceback of an error.")]


@dataclass(frozen=True)
class ChatOptions:
    """What the user asked of `chat`; None means the model or the machine decides.

    `origins` says where a value came from: "flag", "env" or "default".
    """

    model: str | None = None
    prompt: str | None = None
    system: str | None = None
    system_file: Path | None = None
    continue_: bool = False
    session: str | None = None
    no_history: bool = False
    think: bool | None = None
    think_budget: int | None = None
    hide_thinking: bool = False
    temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    ctx: int | None = None
    threads: int | None = None
    device: str | None = None
    activations: Activations = Activations.int8
    ram_budget: int | None = None
    gpu_experts: int | None = None
    kv: KV = KV.auto
    kv_disk: int | None = None
    speculate: Speculate = Speculate.off
    verify: bool = False
    attach: str = "auto"
    api_key: str | None = None
    json: bool = False
    stream_json: bool = False
    stats: bool | None = None
    quiet: bool = False
    raw: bool = False
    no_stream: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)


def origins(context: typer.Context) -> dict[str, str]:
    """Name of every option that was given -> 'flag' or 'env'."""
    words = {"COMMANDLINE": "flag", "ENVIRONMENT": "env"}
    found = {name: context.get_parameter_source(name) for name in context.params}
    return {name: words[source.name] for name, source in found.items() if source is not None and source.name in words}
