"""Putting a terminal's conversation together: model, session, keyboard, prompt and /commands."""

from __future__ import annotations

import sys

from cli import slash
from cli.keys import Keyboard, exiting_on_kill
from cli.opening import (
    OpenKimi,
    changed_model,
    find_session,
    open_conversation,
    open_store,
    open_with_status,
    state_directory,
    with_model_of,
)
from cli.options import ChatOptions
from cli.output import make_console
from cli.prompt import Prompt
from cli.repl import Repl


def run_repl(options: ChatOptions, open_kimi: OpenKimi) -> int:
    """Hold a conversation until the user leaves; returns the exit code."""
    store = open_store()
    session = find_session(options, store)
    history = None if options.no_history else state_directory() / "history"
    words = {name: command.words for name, command in slash.by_name().items()}
    prompt = Prompt(words, history, sessions=lambda: [session.id for session in store.list()])
    with (
        exiting_on_kill(),
        Keyboard() as keyboard,
        open_with_status(with_model_of(options, session), open_kimi) as kimi,
    ):
        conversation = open_conversation(options, kimi, store, session)
        repl = Repl(conversation, prompt, make_console(sys.stdout), keyboard, options, slash.parse)
        repl.greet(changed_model(session, kimi))
        if session is not None:
            repl.show_resumed()
        return repl.run()
