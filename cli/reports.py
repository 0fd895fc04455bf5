"""What /stats, /ctx, /tokens, /experts and /sessions print: rich renderables made from plain figures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cli.output import bandwidth, byte_count, count, duration, plural, rate, short_tokens

if TYPE_CHECKING:
    from cli.conversation import Conversation
    from cli.model import Model
    from cli.turn import Turn
    from hybrid.chat.session import Session
    from hybrid.stats import Stats

_HEAT = " ▁▂▃▄▅▆▇█"
_ROLES = {"system": "system prompt", "user": "questions", "assistant": "answers", "tool": "tool results"}


def grid(rows: Sequence[Sequence[str | Text]], *, styles: Sequence[str] = ("quiet",)) -> Table:
    """Columns without lines; `styles` are those of the first columns."""
    table = Table.grid(padding=(0, 2))
    for column in range(max((len(row) for row in rows), default=0)):
        table.add_column(style=styles[column] if column < len(styles) else None, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def banner(kimi: Model, thinking: bool) -> Text:
    """What runs here, from the checkpoint's own configuration."""
    config = kimi.config
    shape = f"{config.num_hidden_layers} layers"
    if config.n_routed_experts:
        shape += f", {config.n_routed_experts} experts ({config.num_experts_per_tok} per token)"
    manner = "thinking" if thinking else "instant"
    facts = f" · {shape} · ctx {short_tokens(kimi.ctx)} · {manner}"
    return Text.assemble((kimi.name, "bold"), (facts, "quiet"))


def stats_report(turns: Sequence[Turn], ceiling_gbps: float | None) -> Table:
    """The last answer in full, and the whole session."""
    last = turns[-1].stats
    rows = [("last answer", line) for line in _figures(last, ceiling_gbps)]
    tokens = sum(turn.stats.generated_tokens for turn in turns)
    seconds = sum(turn.stats.decode_s for turn in turns)
    read = sum(turn.stats.prefilled_tokens for turn in turns)
    cached = sum(turn.stats.cached_tokens for turn in turns)
    rows.append(
        ("this session", f"{plural(len(turns), 'answer')}, {count(tokens)} tokens written in {duration(seconds)}")
    )
    rows.append(("", f"{count(read)} prompt tokens read, {count(cached)} more found in the cache"))
    return grid([(name if name != rows[i - 1][0] or i == 0 else "", line) for i, (name, line) in enumerate(rows)])


def _figures(stats: Stats, ceiling_gbps: float | None) -> list[str]:
    of_disk = f" ({count(stats.disk_tokens)} from disk)" if stats.disk_tokens else ""
    lines = [
        f"prompt {count(stats.prompt_tokens)} tokens, {count(stats.cached_tokens)} of them cached{of_disk}; the rest "
        f"in {duration(stats.prefill_s)} ({rate(stats.prefill_tokens_per_s)} tok/s)",
        f"thinking {count(stats.thinking_tokens)}, answer {count(stats.answer_tokens)} tokens in "
        f"{duration(stats.decode_s)} ({rate(stats.decode_tokens_per_s)} tok/s)",
        f"first token after {duration(stats.first_token_s)}",
    ]
    if stats.ram_gbps:
        per_token = stats.host_bytes / max(1, stats.generated_tokens - 1)
        lines.append(f"weights: {byte_count(per_token)} read per token, {bandwidth(stats.ram_gbps, ceiling_gbps)}")
    return lines


def context_report(conversation: Conversation, width: int) -> Text:
    """A bar of the context, used and free."""
    used, capacity = conversation.tokens(), conversation.kimi.ctx
    cells = max(10, min(40, width - 30))
    full = min(cells, round(cells * used / capacity))
    text = Text("█" * full + "░" * (cells - full))
    text.append(f" {count(used)} of {count(capacity)} tokens ({used / capacity:.0%})", "quiet")
    return text


def tokens_report(conversation: Conversation) -> Table:
    """Tokens of the text by who wrote it, and of the markers around it."""
    encode = conversation.kimi.tokenizer.encode
    sums: dict[str, list[int]] = {}
    for message in conversation.messages:
        entry = sums.setdefault(message.role, [0, 0])
        entry[0] += 1
        entry[1] += len(encode(message.content)) + len(encode(message.reasoning_content or ""))
    rows = [(_ROLES.get(role, role), str(n), f"{count(tokens)} tok") for role, (n, tokens) in sums.items()]
    rows.append(("the next prompt", "", f"{count(conversation.tokens())} tok without its question"))
    return grid(rows)


def experts_report(report: dict[str, Any], width: int) -> list[Text]:
    """One row per layer, expert 0 on the left; the fuller a cell, the more often its experts were chosen."""
    layers, counts = report["layers"], report["counts"]
    if not layers:
        return [Text("This model has no routed experts.", "quiet")]
    total = sum(map(sum, counts))
    if not total:
        return [Text("No expert has been chosen yet: ask something first.", "quiet")]
    label = max(len(f"layer {layer}") for layer in layers)
    lines = [_layer_line(f"layer {layer}".ljust(label), row, width) for layer, row in zip(layers, counts, strict=True)]
    used, all_experts = sum(n > 0 for row in counts for n in row), sum(map(len, counts))
    summary = f"{count(total)} choices; {count(used)} of {count(all_experts)} experts used ({used / all_experts:.0%})"
    return [*lines, Text(summary, "quiet")]


def _layer_line(label: str, row: Sequence[int], width: int) -> Text:
    hottest = max(range(len(row)), key=lambda expert: row[expert])
    note = f" {hottest}: {row[hottest] / max(1, sum(row)):.0%}"
    cells = max(4, min(len(row), width - len(label) - 1 - len(" 9999: 100%")))
    bounds = [len(row) * i // cells for i in range(cells + 1)]
    sums = [sum(row[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    top = max(sums) or 1
    heat = "".join(_HEAT[-(-8 * round(1000 * value / top) // 1000)] for value in sums)
    return Text.assemble((label + " ", "quiet"), (heat, "yellow"), (note, "quiet"))


def sessions_report(sessions: Sequence[Session], current: str) -> Table:
    rows = []
    for session in sessions:
        turns = sum(message.role == "user" for message in session.messages)
        mark = " (this one)" if session.id == current else ""
        facts = f"{plural(turns, 'turn')}, {session.model}, {age(session.updated)}"
        rows.append((session.id, session.title + mark, facts))
    return grid(rows, styles=("cyan", "", "quiet"))


def age(stamp: str) -> str:
    """How long ago an ISO 8601 time was, in the largest unit."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
    except (TypeError, ValueError):
        return "of unknown age"
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        number = int(seconds // size)
        if number:
            return f"{plural(number, unit)} ago"
    return "just now"
