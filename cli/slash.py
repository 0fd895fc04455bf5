"""The /commands of a conversation. Each is a function of the running chat and the text after its name."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, get_args

from cli import reports
from cli.export import export
from cli.live import Thoughts
from cli.opening import memory_ceiling
from cli.output import count, plural, printable
from cli.repl import Repl
from cli.settings import PARSERS, parse_switch
from hybrid.errors import UsageError

_NAME = re.compile(r"/[A-Za-z?][\w-]*\??$")


class Call(NamedTuple):
    """A recognised command line."""

    command: Command
    argument: str

    def run(self, repl: Repl) -> None:
        self.command.run(repl, self.argument)


@dataclass(frozen=True)
class Command:
    names: tuple[str, ...]
    usage: str
    help: str
    run: Callable[[Repl, str], None]
    words: tuple[str, ...] = ()  # what Tab offers after the name; PATH and SESSION stand for names


def parse(line: str) -> Call | None:
    """The command in `line`, or None when it is a message for the model.

    A first word like /name that is no command is an error with the nearest one (UsageError), unless it is a path that
    exists; words with further slashes are text.
    """
    first, _, argument = line.partition(" ") if line.startswith("/") else ("", "", "")
    if not _NAME.match(first):
        return None
    commands = by_name()
    if first.lower() in commands:
        return Call(commands[first.lower()], argument.strip())
    if os.path.exists(first):
        return None
    near = get_close_matches(first.lower(), commands, n=1)
    hint = f"Did you mean {near[0]}?" if near else "/help lists the commands."
    raise UsageError(f"There is no command {first}.", f"{hint} (A space before it sends it as text.)")


def by_name() -> dict[str, Command]:
    return {name: command for command in COMMANDS for name in command.names}


def show_help(repl: Repl, argument: str) -> None:
    if argument == "keys":
        repl.show(reports.grid(KEYS, styles=("cyan",)))
        return
    rows = [(" ".join((*command.names, command.usage)).strip(), command.help) for command in COMMANDS]
    repl.show(reports.grid(rows, styles=("cyan",)))
    repl.say("/help keys lists the keys.")


def leave(repl: Repl, argument: str) -> None:
    repl.done = True


def new(repl: Repl, argument: str) -> None:
    repl.conversation.begin_anew()
    repl.say("A new conversation; the last one is kept (/sessions).")


def retry(repl: Repl, argument: str) -> None:
    if repl.unsent is not None:
        repl.ask(repl.unsent)
    elif repl.conversation.turns:
        repl.answer(repl.conversation.drop_answer())
    else:
        repl.say("There is no question to ask again.")


def undo(repl: Repl, argument: str) -> None:
    turns = _whole(argument or "1")
    taken = repl.conversation.take_back(turns)
    repl.say(f"Removed {plural(len(taken), 'turn')}." if taken else "There is nothing to undo.")


def edit(repl: Repl, argument: str) -> None:
    taken = repl.conversation.take_back(1)
    if not taken:
        repl.say("There is no question to edit.")
    else:
        repl.draft = repl.prompt.pastes.collapse(taken[0])


def system(repl: Repl, argument: str) -> None:
    conversation = repl.conversation
    if not argument:
        repl.say(conversation.system or "There is no system prompt.")
        return
    conversation.system = None if argument == '""' else argument
    conversation.save()
    again = conversation.tokens()
    repl.say(f"System prompt {'removed' if conversation.system is None else 'set'}.")
    if conversation.turns:
        repl.say(f"The whole conversation ({count(again)} tokens) is read anew with the next question.")


def think(repl: Repl, argument: str) -> None:
    settings = repl.conversation.settings
    if argument[:1].isdigit():
        settings.set("think_budget", argument)
        settings.set("think", "on")
    elif argument:
        settings.set("think", argument)
    budget = f", at most {count(settings.think_budget)} tokens" if settings.think_budget else ""
    on = settings.thinking(repl.kimi)
    repl.say(f"Thinking is {'on' + budget if on else 'off'}.")
    if on and not repl.kimi.default_thinking:
        repl.say("This model was not made for thinking: expect little of it.")


def thoughts(repl: Repl, argument: str) -> None:
    if argument in ("", "last"):
        answer = repl.conversation.last_answer()
        text = answer.reasoning_content if answer is not None else None
        repl.say(printable(text).strip() if text else "The last answer came without thoughts.", "thought")
    elif argument in get_args(Thoughts):
        repl.thoughts = argument  # type: ignore[assignment]
        shown = {"fold": "shown while they last, then folded", "show": "shown in full", "hide": "not shown"}
        repl.say(f"Thoughts are {shown[argument]}.")
    else:
        raise UsageError(f"/thoughts {argument} means nothing.", "Use show, hide, fold or last.")


def set_value(repl: Repl, argument: str) -> None:
    settings = repl.conversation.settings
    name, _, text = argument.replace("=", " ").partition(" ")
    if name and text.strip():
        settings.set(name, text.strip())
        repl.conversation.save()
    rows = settings.table(repl.kimi)
    wanted = settings.known(name) if name else ""
    shown = [(key, value, origin) for key, value, origin in rows if wanted in ("", key)]
    repl.show(reports.grid(shown, styles=("cyan", "", "quiet")))


def stats(repl: Repl, argument: str) -> None:
    if argument:
        repl.stats = parse_switch(argument)
        repl.say(f"The line below answers is {'on' if repl.stats else 'off'}.")
    elif repl.turns:
        repl.show(reports.stats_report(repl.turns, memory_ceiling(repl.kimi, repl.turns[-1].stats)))
    else:
        repl.say("No answer yet.")


def context(repl: Repl, argument: str) -> None:
    repl.show(reports.context_report(repl.conversation, repl.console.width))


def tokens(repl: Repl, argument: str) -> None:
    if argument:
        repl.say(f"{count(len(repl.kimi.tokenizer.encode(argument)))} tokens")
    else:
        repl.show(reports.tokens_report(repl.conversation))


def experts(repl: Repl, argument: str) -> None:
    for line in reports.experts_report(repl.kimi.expert_report(), repl.console.width):
        repl.show(line)


def save(repl: Repl, argument: str) -> None:
    conversation = repl.conversation
    if not conversation.turns:
        repl.say("There is nothing to save yet.")
        return
    conversation.session.title = argument or conversation.session.title
    conversation.saving = True
    conversation.save()
    repl.say(f"Saved as {conversation.session.title!r} ({conversation.session.id}).")


def load(repl: Repl, argument: str) -> None:
    if not argument:
        list_sessions(repl, "")
        return
    repl.resume(repl.conversation.store.load(argument))


def list_sessions(repl: Repl, argument: str) -> None:
    store = repl.conversation.store
    sessions = store.list()
    if not sessions:
        repl.say("There are no saved conversations.")
        return
    repl.show(reports.sessions_report(sessions[:30], repl.conversation.session.id))
    repl.say(f"/load ID or NAME opens one; they lie in {store.directory}.")


def export_to(repl: Repl, argument: str) -> None:
    path = export(repl.conversation.session, repl.kimi.name, argument)
    repl.say(f"Written to {path}.")


def copy(repl: Repl, argument: str) -> None:
    from cli.layout import code_blocks

    answer = repl.conversation.last_answer()
    if answer is None:
        repl.say("There is no answer to copy.")
        return
    text, what = answer.content, "The answer"
    if argument:
        number, blocks = _whole(argument), code_blocks(printable(answer.content))
        if number > len(blocks):
            raise UsageError(f"The last answer has {len(blocks)} code blocks.", "Copy one of them, or all with /copy.")
        text, what = blocks[number - 1], f"Code block {number}"
    encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
    repl.console.file.write(f"\x1b]52;c;{encoded}\x07")
    repl.console.file.flush()
    repl.say(f"{what} ({count(len(text))} characters) was sent to the clipboard.")


def read(repl: Repl, argument: str) -> None:
    if not argument:
        raise UsageError("/read needs a file.", "Write /read FILE.")
    path = Path(argument.strip("\"'")).expanduser()
    text = path.read_bytes().decode("utf-8", "replace")
    if "\0" in text:
        raise UsageError(f"{path} is no text file.", "Only text can be read.")
    repl.draft = repl.prompt.pastes.collapse(text, path.name, always=True) + " "
    repl.say(f"{count(len(repl.kimi.tokenizer.encode(text)))} tokens. Add a question; Enter sends both.")


def multi(repl: Repl, argument: str) -> None:
    repl.multiline = True
    repl.say("The next message may have several lines: Alt-Enter sends it.")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{text!r} is no number of things.", "Write 1, 2, 3, ...")
    return int(text)


_THOUGHTS = ("last", *get_args(Thoughts))
COMMANDS = (
    Command(("/help", "/?"), "[keys]", "this list, or the keys", show_help, ("keys",)),
    Command(("/new", "/clear"), "", "begin a new conversation", new),
    Command(("/retry", "/regen"), "", "ask the last question again", retry),
    Command(("/undo",), "[N]", "remove the last question and answer", undo),
    Command(("/edit",), "", "change the last question and send it again", edit),
    Command(("/system",), "[TEXT]", 'show or set the system prompt ("" removes it)', system),
    Command(("/think",), "on|off|TOKENS", "reason before answering, within a budget", think, ("on", "off")),
    Command(("/thoughts",), "last|show|hide|fold", "the last reasoning, or how to show it", thoughts, _THOUGHTS),
    Command(("/set",), "[NAME VALUE]", "show or change temp, top_p, seed, max_tokens, ...", set_value, (*PARSERS,)),
    Command(("/stats",), "[on|off]", "figures of the last answer, or the line below answers", stats, ("on", "off")),
    Command(("/ctx",), "", "how full the context is", context),
    Command(("/tokens",), "[TEXT]", "count the tokens of the conversation or a text", tokens),
    Command(("/experts",), "", "which experts were chosen, by layer", experts),
    Command(("/read",), "FILE", "put a file into the next message", read, ("PATH",)),
    Command(("/multi",), "", "write the next message in several lines", multi),
    Command(("/copy",), "[N]", "copy the last answer or its N-th code block", copy),
    Command(("/export",), "[FILE.md|FILE.json]", "write the conversation to a file", export_to, ("PATH",)),
    Command(("/save",), "[NAME]", "save the conversation under a name", save),
    Command(("/load", "/resume"), "NAME|ID", "go on with a saved conversation", load, ("SESSION",)),
    Command(("/sessions",), "", "list the saved conversations", list_sessions),
    Command(("/exit", "/quit", "/bye"), "", "leave (Ctrl-D)", leave),
)  # fmt: skip

KEYS = (
    ("Enter", "send"),
    ("Alt-Enter, Ctrl-J", "new line"),
    ('"""', "begin and end a message of several lines"),
    ("Ctrl-C", "stop the answer; clear the line; twice on an empty line: leave"),
    ("Ctrl-T", "while it thinks: answer now"),
    ("Ctrl-D", "leave"),
    ("Up, Down, Ctrl-R", "earlier messages, search in them"),
    ("Tab", "complete /commands and paths"),
    ("Ctrl-X Ctrl-E, Ctrl-G", "write the message in $EDITOR"),
)
