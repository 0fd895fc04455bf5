"""A conversation on a terminal: read a line, answer it or obey it, again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.text import Text

from cli import reports
from cli.attaching import arrival
from cli.conversation import Conversation
from cli.keys import Keyboard, on_interrupt
from cli.layout import Layout
from cli.live import LiveView, Thoughts
from cli.opening import changed_model, memory_ceiling
from cli.options import ChatOptions
from cli.output import count, is_drawable, plural, printable, short_tokens, stats_line
from cli.prompt import DoublePress, Prompt
from cli.turn import Turn, run_turn
from cli.views import PipeView, View
from hybrid.errors import INTERRUPTED, ContextExceeded, KimiError

if TYPE_CHECKING:
    from cli.model import Model
    from hybrid.chat.message import Message
    from hybrid.chat.session import Session


class Action(Protocol):
    """A /command with its argument, ready to run."""

    def run(self, repl: Repl) -> None: ...


class Repl:
    """The state of a chat beyond its conversation; /commands work on it."""

    def __init__(
        self,
        conversation: Conversation,
        prompt: Prompt,
        console: Console,
        keyboard: Keyboard,
        options: ChatOptions,
        parse: Callable[[str], Action | None],
    ) -> None:
        """`parse` finds the /command in a line; None means the line is for the model."""
        self.conversation = conversation
        self.prompt = prompt
        self.console = console
        self.turns: list[Turn] = []
        self.thoughts: Thoughts = "hide" if options.hide_thinking else "fold"
        self.stats = options.stats if options.stats is not None else not options.quiet
        self.draft = ""  # text the next prompt begins with
        self.multiline = False
        self.unsent: str | None = None  # a question that was stopped before its answer began
        self.done = False
        self._keyboard = keyboard
        self._options = options
        self._parse = parse
        self._interrupts = DoublePress()

    @property
    def kimi(self) -> Model:
        return self.conversation.kimi

    def greet(self, warning: str) -> None:
        if not self._options.quiet:
            if found := arrival(self.kimi):
                self.say(found)
            self.show(reports.banner(self.kimi, self.conversation.settings.thinking(self.kimi)))
            self.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        if warning:
            self.say(warning, "notice")

    def run(self) -> int:
        while not self.done:
            try:
                self.take(self._read())
            except EOFError:
                return 0
            except KeyboardInterrupt:  # at the prompt, or in a /command
                if self._interrupts.again():
                    return INTERRUPTED
                self.say("Ctrl-D or /exit leaves (or Ctrl-C again).")
        return 0

    def take(self, line: str) -> None:
        """Obey or answer one line; what goes wrong is told and the conversation goes on."""
        text = line.strip()
        if not text:
            return
        if text.lower() in ("exit", "quit", "bye"):
            self.say(f"/{text.lower()} or Ctrl-D leaves. (To say it to the model, put it in a sentence.)")
            return
        try:
            action = self._parse(line)
            if action is None:
                self.ask(line.strip("\n") if line[:1] != " " else text)
            else:
                action.run(self)
        except KimiError as error:
            self.say(f"error: {error}", "error")
        except OSError as error:
            self.say(f"error: {error.filename or ''}: {error.strerror or error}", "error")

    def ask(self, text: str) -> None:
        self.unsent = None
        self.conversation.ask(text)
        self.answer()

    def answer(self, former: Sequence[Message] = ()) -> None:
        """Let the model answer the last question, and keep what it said; a `former` answer stays if it says nothing."""
        with on_interrupt(lambda: None):  # Ctrl-C stops the reply, never what keeps it
            turn = self._answered(former)
        if turn is not None:
            self._after(turn)

    def _answered(self, former: Sequence[Message]) -> Turn | None:
        """The reply, kept; None when there was nothing to keep: then the question is taken back, or has its `former`
        answer again."""
        try:
            turn = run_turn(self.conversation.reply(), self._view(), self._keyboard)
        except ContextExceeded:
            self._refuse_length()
            return None
        except KimiError:
            self._take_back(former)
            raise
        if turn.is_empty:
            self._take_back(former)
            fate = "the former one stays" if former else "the question is not kept"
            self.say(f"Stopped before the answer began; {fate} (/retry sends the question again).")
            return None
        self.conversation.keep(turn)
        self.turns.append(turn)
        return turn

    def _take_back(self, former: Sequence[Message]) -> None:
        if former:
            self.conversation.put_back(former)
        else:
            self.unsent = self.conversation.take_back()[0]

    def resume(self, session: Session) -> None:
        """Go on with a saved conversation."""
        warning = changed_model(session, self.kimi)
        self.conversation.resume(session)
        if warning:
            self.say(warning, "notice")
        self.show_resumed()

    def show_resumed(self) -> None:
        """The last question and answer, so that one knows where one was."""
        conversation = self.conversation
        turns = conversation.turns
        age = reports.age(conversation.session.updated)
        self.say(f"{conversation.session.title} ({plural(turns, 'turn')}, {age})")
        unanswered = conversation.unanswered()
        questions = [message for message in conversation.messages if message.role == "user"]
        answer = conversation.last_answer()
        if questions and answer is not None:
            self.console.print(Text.assemble(("> ", "prompt"), printable(questions[-1].content)))
            for row in Layout(self.console, numbered=True).lines(printable(answer.content), self.console.width):
                self.console.file.write(row + "\n")
        if unanswered is not None:
            self.draft = self.prompt.pastes.collapse(unanswered)
            self.say("The last question was not answered: Enter asks it again.")

    def say(self, text: str, style: str = "quiet") -> None:
        self.console.print(text, style=style)

    def show(self, renderable: RenderableType) -> None:
        self.console.print(renderable)

    def _read(self) -> str:
        self.prompt.type_ahead(self._keyboard.take_typed())
        draft, self.draft = self.draft, ""
        multiline, self.multiline = self.multiline, False
        return self.prompt.read(draft, multiline=multiline)

    def _view(self) -> View:
        if not is_drawable(sys.stdout):
            return PipeView(sys.stdout, sys.stderr, thoughts=self.thoughts != "hide", quiet=True)
        stream = not self._options.no_stream
        return LiveView(self.console, thoughts=self.thoughts, raw=self._options.raw, stream=stream, interactive=True)

    def _after(self, turn: Turn) -> None:
        limit = count(turn.stats.generated_tokens)
        notes = {
            "length": f"Stopped at the limit of {limit} tokens (/set max_tokens).",
            "context": f"The context of {count(self.kimi.ctx)} tokens is full: /new starts afresh, /undo makes room.",
            "interrupted": "Stopped; what was written is kept (/retry asks again).",
        }
        if turn.notice:
            self.say(turn.notice, "notice")
        if turn.failure is not None:
            self.say(f"error: {turn.failure}", "error")
            self.say("What was written is kept (/retry asks again).")
        elif turn.finish_reason in notes:
            self.say(notes[turn.finish_reason])
        if self.stats:
            ceiling = memory_ceiling(self.kimi, turn.stats)
            self.say(stats_line(turn.stats, self.kimi.ctx, ceiling, self.console.width))
        self.console.print()

    def _refuse_length(self) -> None:
        """Nothing was computed: say how long it is, what the limit is, and the ways out."""
        needed, limit = self.conversation.tokens(), self.kimi.ctx
        self.unsent = self.conversation.take_back()[0]
        larger = 1 << needed.bit_length()
        ways = ["/new begins afresh", "/undo removes turns"]
        if larger <= self.kimi.config.max_position_embeddings:
            ways.append(f"kimi-local chat -c --ctx {short_tokens(larger)} makes room")
        self.say(
            f"error: With this question the conversation has {count(needed)} tokens, the context holds {count(limit)}: "
            f"it was not sent. {', '.join(ways)}.",
            "error",
        )
