"""One question, one answer: stdout carries the answer and nothing else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cli.attaching import arrival
from cli.layout import Layout
from cli.live import LiveView
from cli.markdown import MarkdownStream
from cli.opening import (
    OpenKimi,
    changed_model,
    find_session,
    memory_ceiling,
    open_conversation,
    open_store,
    open_with_status,
    with_model_of,
)
from cli.options import ChatOptions
from cli.output import count, is_drawable, make_console, stats_line
from cli.turn import Turn, run_turn
from cli.views import JsonLinesView, PipeView, SilentView, View, write_json
from hybrid.errors import INTERRUPTED, KimiError

if TYPE_CHECKING:
    from cli.conversation import Conversation
    from cli.model import Model


def answer_once(options: ChatOptions, text: str, open_kimi: OpenKimi) -> int:
    """Answer `text`; returns 0, or 130 when Ctrl-C cut the answer short."""
    store = open_store()
    session = find_session(options, store)
    with open_with_status(with_model_of(options, session), open_kimi) as kimi:
        if not options.quiet:
            note(arrival(kimi))
            note(changed_model(session, kimi))
        conversation = open_conversation(options, kimi, store, session)
        conversation.unanswered()
        turn = ask(conversation, text, choose_view(options))
        if options.json or options.stream_json:
            kind = {"type": "result"} if options.stream_json else {}
            write_json(sys.stdout, kind | result(turn, kimi))
        if not options.quiet:
            note(ending(turn, kimi))
        if wants_stats(options):
            show_stats(turn, kimi)
    return INTERRUPTED if turn.finish_reason == "interrupted" else 0


def ask(conversation: Conversation, text: str, view: View) -> Turn:
    """Ask and keep the answer, also one that was cut off; a question that got none is not part of the conversation.

    Raises what cut it off.
    """
    conversation.ask(text)
    try:
        turn = run_turn(conversation.reply(), view)
    except KimiError:
        conversation.take_back()
        raise
    if turn.is_empty:
        conversation.take_back()
    else:
        conversation.keep(turn)
    if turn.failure is not None:
        raise turn.failure
    return turn


def choose_view(options: ChatOptions) -> View:
    if options.json:
        return SilentView()
    if options.stream_json:
        return JsonLinesView(sys.stdout)
    console = make_console(sys.stdout)
    hidden = options.hide_thinking or options.quiet
    if is_drawable(sys.stdout):
        return LiveView(console, thoughts="hide" if hidden else "fold", raw=options.raw, stream=not options.no_stream)
    coloured = console.is_terminal and not options.raw and not sys.stdout.isatty()  # FORCE_COLOR in a pipe
    return PipeView(
        sys.stdout,
        sys.stderr,
        thoughts=not hidden,
        quiet=options.quiet,
        stream=not options.no_stream,
        width=console.width,
        markdown=MarkdownStream(Layout(console)) if coloured else None,
    )


def result(turn: Turn, kimi: Model) -> dict[str, Any]:
    """What --json prints."""
    stats, message = turn.stats, turn.message
    return {
        "text": message.content,
        "reasoning": message.reasoning_content or "",
        "tool_calls": message.to_dict().get("tool_calls", []),
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "completion_tokens": stats.generated_tokens,
            "thinking_tokens": stats.thinking_tokens,
        },
        "timings": {
            "prefill_s": round(stats.prefill_s, 4),
            "first_token_s": round(stats.first_token_s, 4),
            "decode_s": round(stats.decode_s, 4),
            "total_s": round(turn.total_s, 4),
            "prefill_tokens_per_s": round(stats.prefill_tokens_per_s, 2),
            "decode_tokens_per_s": round(stats.decode_tokens_per_s, 2),
        },
        "finish_reason": turn.finish_reason,
        "model": kimi.name,
    }


def ending(turn: Turn, kimi: Model) -> str:
    """Why an answer ended before the model was done; empty when it was."""
    made = count(turn.stats.generated_tokens)
    return {
        "length": f"Stopped at the limit of {made} tokens: --max-tokens sets it.",
        "context": f"Stopped: the context of {count(kimi.ctx)} tokens is full.",
        "interrupted": "Interrupted.",
    }.get(turn.finish_reason, "")


def wants_stats(options: ChatOptions) -> bool:
    if options.stats is not None:
        return options.stats
    return sys.stdout.isatty() and not options.quiet and not options.json and not options.stream_json


def show_stats(turn: Turn, kimi: Model) -> None:
    console = make_console(sys.stderr)
    console.print(stats_line(turn.stats, kimi.ctx, memory_ceiling(kimi, turn.stats), console.width), style="quiet")


def note(text: str) -> None:
    if text:
        make_console(sys.stderr).print(text, style="notice")
