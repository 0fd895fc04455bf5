"""`kimi-local batch`: a file of requests answered unattended, into a file that survives whatever stops it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options as common
from cli.keys import leaving_on_interrupt
from cli.opening import waiting
from cli.options import Activations, Dtype, machine, option, output, sampling
from cli.output import count, duration, plural, print_table, rate
from cli.streaming import named_directory, progress_line
from hybrid.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from hybrid.batch.jobs import Answer, Job, Prompts
    from hybrid.batch.lines import Lines
    from hybrid.batch.state import Output

SHOWN = 5  # bad lines that are named; all are in the file of errors
EVERY = 30.0  # seconds between lines of progress where nothing can be redrawn


_INPUT = "JSON lines: OpenAI's batch format, {messages} or {prompt}; - reads standard input."
_OUTPUT = "JSON lines in OpenAI's format. If it is there already, the job goes on."
_MODEL = "A directory, demo or pocket; demo by default."
_TEXT = "Every line of the input is a question as it stands."
_SYSTEM = "System prompt before questions that are bare text."
_ORDERED = "Answers in the order of the input; otherwise as they are done."
_FORCE = "Go on although model, settings or lines are others; answers that are there stay."
_DRY = "Count tokens, predict hours, and change nothing."
_PARALLEL = "Answers made at once; by default as many as memory has room for."
_RAY = "Spread the lines over the Ray cluster at this address; auto finds one on this machine."
_SEED = "Other draws; every line has a seed of its own, made of this and its custom_id."
_KV_DISK = "Disk on which to keep what was read for later runs; by default none."
_JSON = "One JSON object at the end, on standard output."
_DTYPE = "Of the resident weights; float32 here and in --activations keeps answers apart from what is made beside them."


@dataclass(frozen=True)
class Options:
    """What was asked for; see the command."""

    input: str
    output: Path
    model: str
    text: bool
    system: str | None
    ordered: bool
    force: bool
    dry_run: bool
    max_parallel: int | None
    ray: str | None
    thinking: bool | None
    sampling: dict[str, Any]
    ctx: int | None
    threads: int | None
    ram_budget: int | None
    kv: common.KV
    kv_disk: int
    speculate: common.Speculate
    activations: Activations
    dtype: Dtype
    json: bool
    quiet: bool


def batch(
    input: Annotated[str, typer.Argument(metavar="IN", help=_INPUT, show_default=False)],
    out: Annotated[Path, option("-o", "--output", metavar="OUT", env=False, help=_OUTPUT)],
    model: Annotated[str, option("-m", "--model", metavar="MODEL", help=_MODEL)] = "demo",
    text: Annotated[bool, option("--text", env=False, help=_TEXT)] = False,
    system: Annotated[str | None, option("-s", "--system", metavar="TEXT", env=False, help=_SYSTEM)] = None,
    ordered: Annotated[bool, output("--ordered", env=False, help=_ORDERED)] = False,
    force: Annotated[bool, output("--force", env=False, help=_FORCE)] = False,
    dry_run: Annotated[bool, option("--dry-run", env=False, help=_DRY)] = False,
    think: common.Think = None,
    temp: common.Temperature = None,
    top_p: common.TopP = None,
    top_k: common.TopK = None,
    min_p: common.MinP = None,
    seed: Annotated[int, sampling("--seed", metavar="N", help=_SEED, show_default=True)] = 0,
    max_tokens: common.MaxTokens = None,
    max_parallel: Annotated[int | None, machine("--max-parallel", metavar="N", min=1, help=_PARALLEL)] = None,
    ray: Annotated[str | None, machine("--ray", metavar="ADDRESS", env=False, help=_RAY)] = None,
    ctx: common.Ctx = None,
    threads: common.Threads = None,
    ram_budget: common.RamBudget = None,
    kv: common.KvOption = common.KV.auto,
    kv_disk: Annotated[int, machine("--kv-disk", metavar="SIZE", parser=common.room, help=_KV_DISK)] = 0,
    speculate: common.SpeculateOption = common.Speculate.off,
    activations: common.ActivationsOption = Activations.int8,
    dtype: Annotated[Dtype, machine("--dtype", env=False, help=_DTYPE, show_default=True)] = Dtype.bfloat16,
    json_output: Annotated[bool, output("--json", env=False, help=_JSON)] = False,
    quiet: Annotated[bool, output("-q", "--quiet", env=False, help="Nothing but errors.")] = False,
    debug: common.Debug = False,
) -> None:
    """Answer a file of requests, unattended.

    The output is all there is to keep: run the same command again after a crash, a power cut or Ctrl-C, and it goes on;
    no line is answered twice and none is lost. Lines that cannot be answered go to OUT.errors.jsonl. Ends with 0 if all
    were answered, 1 if some could not be, 130 after Ctrl-C.

      kimi-local batch questions.jsonl -o answers.jsonl -m /models/packed --dry-run

      kimi-local batch names.txt --text -s "Translate to German." -o german.jsonl
    """
    given = {
        "temperature": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed, "max_tokens": max_tokens,
    }  # fmt: skip
    options = Options(
        input, out, model, text, system, ordered, force, dry_run, max_parallel, ray, think, given, ctx, threads,
        ram_budget, kv, kv_disk, speculate, activations, dtype, json_output, quiet,
    )  # fmt: skip
    raise typer.Exit(run_batch(options))


def run_batch(options: Options) -> int:
    """Do the job; returns the exit code."""
    began = time.monotonic()
    lines = read_input(options)
    try:
        with leaving_on_interrupt():
            prompts, settings, directory = open_prompts(options)
            if options.dry_run:
                return foretell(options, lines, prompts, directory)
            from hybrid.batch.state import Output

            with Output(options.output, settings, lines.digests, force=options.force) as results:
                made = work(options, lines, prompts, directory, results)
                return conclude(options, lines, results, made, time.monotonic() - began)
    except KeyboardInterrupt:
        note("Interrupted. What is answered is kept; run the same command again to go on.", quiet=options.quiet)
        return INTERRUPTED


def note(text: str, *, quiet: bool = False) -> None:
    if not quiet:
        print(text, file=sys.stderr)


# -- what there is to do ----------------------------------------------------------------------------------------------
def read_input(options: Options) -> Lines:
    """Every line, checked; what is wrong is told before anything is loaded."""
    from hybrid.batch.lines import described, read_lines

    source = Path(options.input)
    if options.input != "-" and options.output.exists() and source.exists() and source.samefile(options.output):
        raise UsageError("Input and output are the same file.", "Name another output.")
    raw = sys.stdin.buffer.read() if options.input == "-" else source.expanduser().read_bytes()
    lines = read_lines(BytesIO(raw), text=options.text, system=options.system)
    if not lines.digests:
        raise UsageError(f"{options.input} has no lines.", "Each is to be a request.")
    for text in list(described(lines.bad))[:SHOWN]:
        note(text, quiet=options.quiet)
    if len(lines.bad) > SHOWN:
        note(f"... and {plural(len(lines.bad) - SHOWN, 'more line')} of that kind.", quiet=options.quiet)
    if lines.empty:
        note(f"{plural(lines.empty, 'empty line')} skipped.", quiet=options.quiet)
    return lines


def open_prompts(options: Options) -> tuple[Prompts, dict[str, Any], Path]:
    """What makes prompts, what answers depend on, and where the model is."""
    from importlib.metadata import version

    from hybrid.batch.jobs import Prompts
    from hybrid.checkpoint import open_checkpoint
    from hybrid.checkpoint.calibration import fingerprint
    from hybrid.kimi import DEFAULT_CTX

    with open_checkpoint(named_directory(options.model)) as checkpoint:
        most = checkpoint.config.max_position_embeddings
        if options.ctx and options.ctx > most:
            raise UsageError(f"The context of {count(options.ctx)} tokens is too long.", f"It takes {count(most)}.")
        prompts = Prompts(checkpoint, min(options.ctx or DEFAULT_CTX, most))
        manifest = checkpoint.path / "manifest.json"  # of a pack: what its weights became
        settings = {
            "model": fingerprint(checkpoint)[:32] + _sha(manifest),
            "version": version("kimi-local"),
            "ctx": prompts.ctx,
            "thinking": options.thinking,
            "ordered": options.ordered,
            "activations": options.activations.value,
            "dtype": options.dtype.value,
            "kv": options.kv.value,
            **options.sampling,
        }
        return prompts, settings, checkpoint.path


def _sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.is_file() else ""


# -- doing it ---------------------------------------------------------------------------------------------------------
@dataclass
class Made:
    """What this run has done so far."""

    lines: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0  # of answering

    def figures(self, total: int) -> str:
        """'12/500 lines · 34 tok/s · 3 m 10 s left'."""
        left = self.seconds / self.lines * (total - self.lines)
        speed = rate(self.new_tokens / max(self.seconds, 1e-9))
        return f"{count(self.lines)}/{count(total)} lines · {speed} tok/s · {duration(left)} left"


def work(options: Options, lines: Lines, prompts: Prompts, directory: Path, results: Output) -> Made:
    """Answer what is not answered yet."""
    from hybrid.batch.jobs import by_prefix
    from hybrid.batch.records import error_record
    from hybrid.batch.run import write_answers

    made = Made()
    jobs, refused = prompts.jobs(
        [line for line in lines.good if line.custom_id not in results.done], options.sampling, options.thinking
    )
    wrong = [(bad.custom_id, bad.why) for bad in lines.bad if bad.custom_id not in results.done] + refused
    if wrong:
        results.fail([error_record(custom_id, why) for custom_id, why in wrong])
    if results.done and len(jobs) < len(lines.good):
        note(f"{plural(len(results.answered), 'line')} answered before.", quiet=options.quiet)
    if not jobs:
        return made
    jobs = jobs if options.ordered else by_prefix(jobs)
    with engine(options, directory, jobs) as ended, progress(options, len(jobs)) as show:
        began = time.monotonic()
        for answered in write_answers(ended, jobs, results, prompts, ordered=options.ordered):
            made.lines += 1
            made.prompt_tokens += answered.prompt_tokens
            made.new_tokens += answered.new_tokens
            made.seconds = time.monotonic() - began
            show(made)
    return made


def kept(options: Options) -> str:
    """How a plan is to say that rows of the KV cache are kept."""
    from hybrid.memory.kv_format import kind_of

    return kind_of(options.kv.value, full=options.dtype is Dtype.float32)


@contextmanager
def engine(options: Options, directory: Path, jobs: list[Job]) -> Iterator[Iterator[Answer]]:
    """The answers to `jobs`, by a model on this machine or by a cluster."""
    from hybrid.batch.estimate import room_for, sequences
    from hybrid.batch.run import answers
    from hybrid.kimi import Kimi

    size = options.max_parallel or sequences(directory, jobs, kv=kept(options))
    load: dict[str, Any] = {
        "path": str(directory.resolve()),
        "dtype": options.dtype.value,
        "activations": options.activations.value,
        "threads": options.threads,
        "ram_budget": options.ram_budget,
        "kv": options.kv.value,
        "kv_disk": options.kv_disk,
        "speculate": options.speculate is common.Speculate.auto,
        "ctx": max(len(job.prompt) + job.longest for job in jobs),
        "cache": room_for(jobs, size),
    }
    note(f"{plural(len(jobs), 'line')} to answer, {size} at once.", quiet=options.quiet)
    if options.ray is not None:
        from hybrid.batch.cluster import spread

        yield spread(options.ray, load, jobs, size)
        return
    with progress_line() as report:
        kimi = Kimi.load(**load, on_progress=report)
    with kimi:
        yield answers(kimi, jobs, size)


@contextmanager
def progress(options: Options, total: int) -> Iterator[Any]:
    """Something to call after every line: redraws one line of a terminal, else writes one now and then."""
    told = time.monotonic()
    with waiting(f"Answering {plural(total, 'line')}", quiet=options.quiet) as status:

        def show(made: Made) -> None:
            nonlocal told
            if status is not None:
                status.show(made.figures(total))
            elif time.monotonic() - told >= EVERY:
                told = time.monotonic()
                note(made.figures(total), quiet=options.quiet)

        yield show


def conclude(options: Options, lines: Lines, results: Output, made: Made, seconds: float) -> int:
    """Say how it went; returns the exit code."""
    mine = lines.digests.keys()
    answered, failed = len(mine & results.answered), len(mine & results.failed)
    if options.json:
        figures = {"lines": len(mine), "answered": answered, "failed": failed, "answered_now": made.lines}
        tokens = {"prompt_tokens": made.prompt_tokens, "completion_tokens": made.new_tokens}
        speed = round(made.new_tokens / made.seconds, 2) if made.seconds else None
        print(json.dumps({**figures, **tokens, "seconds": round(seconds, 3), "tokens_per_s": speed}))
    pace = f" ({rate(made.new_tokens / made.seconds)} tok/s)" if made.seconds else ""
    note(
        f"{plural(answered, 'line')} answered, {count(made.new_tokens)} tokens now, in {duration(seconds)}{pace}.",
        quiet=options.quiet,
    )
    if failed:
        note(f"{plural(failed, 'line')} could not be answered: see {results.errors_path}.")
    return 1 if failed else 0


# -- not doing it -----------------------------------------------------------------------------------------------------
def foretell(options: Options, lines: Lines, prompts: Prompts, directory: Path) -> int:
    """What the whole input would take; nothing is written. Returns 1 if some lines cannot be answered."""
    from hybrid.batch.estimate import estimate, sequences

    jobs, refused = prompts.jobs(lines.good, options.sampling, options.thinking)
    bad = len(lines.bad) + len(refused)
    size = options.max_parallel or (sequences(directory, jobs, kv=kept(options)) if jobs else 1)
    found = estimate(directory, jobs, size, kv=kept(options))
    if options.json:
        print(json.dumps({"lines": len(lines.digests), "bad": bad, "estimate": found and found.as_dict()}))
        return 1 if bad else 0
    rows = [("lines", f"{count(len(lines.digests))}, of which {count(bad)} cannot be answered")]
    if found is None:
        rows.append(("hours", "not known: nothing to answer, or the model does not fit this machine"))
    else:
        shared = f"{count(found.shared_tokens)} of them ({found.shared_tokens / found.prompt_tokens:.0%})"
        gain = f"{rate(found.decode_tok_s)} tok/s, and {rate(found.decode_alone_tok_s)} one by one"
        rows += [
            ("prompts", f"{count(found.prompt_tokens)} tokens; {shared} begin as another prompt does"),
            ("answers", f"{count(found.new_tokens)} tokens at most"),
            ("at once", f"{found.batch}: predicted {gain}"),
            ("time", f"predicted {duration(3600 * found.hours)} at most, {duration(3600 * found.prompt_hours)} of it "
             "for prompts"),
        ]  # fmt: skip
    print_table(f"{options.input} with {prompts.model}", rows, wide=True)
    return 1 if bad else 0
