"""One conversation with a model: its messages, its settings, and its file. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cli.settings import Settings

if TYPE_CHECKING:
    from cli.model import Model, Reply
    from cli.turn import Turn
    from hybrid.chat.message import Message
    from hybrid.chat.session import Session, SessionStore
    from hybrid.progress import OnProgress


def default_system(kimi: Model) -> str | None:
    """The model's own system prompt; its generation_config may name another or, with null, none."""
    from hybrid.chat.template import DEFAULT_SYSTEM

    system = kimi.generation_config.get("default_system", DEFAULT_SYSTEM)
    return system if isinstance(system, str) and system else None


class Conversation:
    """`session.messages` is what the model sees next; `store` is None when nothing may be saved."""

    def __init__(
        self, kimi: Model, session: Session, settings: Settings, store: SessionStore, *, saving: bool = True
    ) -> None:
        self.kimi = kimi
        self.session = session
        self.settings = settings
        self.store = store
        self.saving = saving

    @property
    def messages(self) -> list[Message]:
        return self.session.messages

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first.content if first is not None and first.role == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        from hybrid.chat.message import Message

        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, Message("system", text))

    @property
    def turns(self) -> int:
        """Questions asked so far."""
        return sum(message.role == "user" for message in self.messages)

    def reply(self) -> Callable[[OnProgress], Reply]:
        """What `run_turn` needs to start the answer to the messages so far."""
        params = self.settings.params(self.kimi)
        thinking = self.settings.thinking(self.kimi)

        def start(on_progress: OnProgress) -> Reply:
            return self.kimi.reply(
                self.messages,
                params,
                thinking=thinking,
                think_budget=self.settings.think_budget,
                keep=self.saving,
                on_progress=on_progress,
            )

        return start

    def ask(self, text: str) -> None:
        """Add a question; it is saved at once, so that a crash does not lose it."""
        from hybrid.chat.message import Message

        self.messages.append(Message("user", text))
        self.save()

    def keep(self, turn: Turn) -> None:
        """Add the answer."""
        self.messages.append(turn.message)
        self.save()

    def take_back(self, turns: int = 1) -> list[str]:
        """Remove the last questions with their answers; returns the questions, oldest first."""
        taken: list[str] = []
        while len(taken) < turns and self.turns:
            message = self.messages.pop()
            if message.role == "user":
                taken.insert(0, message.content)
        if taken:
            self.save()
        if not self.turns:
            self.session.title = ""
        return taken

    def drop_answer(self) -> list[Message]:
        """Take out what follows the last question, for `put_back`; there must be one."""
        last = max(at for at, message in enumerate(self.messages) if message.role == "user")
        dropped = self.messages[last + 1 :]
        del self.messages[last + 1 :]
        return dropped

    def put_back(self, answer: Sequence[Message]) -> None:
        """The answer that was dropped stays after all."""
        self.messages.extend(answer)
        self.save()

    def unanswered(self) -> str | None:
        """Take out a last question that never got an answer (the program was killed over it)."""
        if self.messages and self.messages[-1].role == "user":
            return self.messages.pop().content
        return None

    def last_answer(self) -> Message | None:
        return next((message for message in reversed(self.messages) if message.role == "assistant"), None)

    def begin_anew(self) -> None:
        """A fresh session with the same system prompt; the old one stays on disk."""
        system = self.system
        self.session = self.store.new(self.kimi.name)
        self.system = system

    def resume(self, session: Session) -> None:
        """Go on with a saved session and the settings it had."""
        self.session = session
        self.settings.restore(session.settings)

    def tokens(self) -> int:
        """Length of the prompt that the next answer starts from, without a new question."""
        if not self.messages:
            return 0
        return self.kimi.count_tokens(self.messages, thinking=self.settings.thinking(self.kimi))

    def save(self) -> None:
        """Write the session; one without a question is not worth a file."""
        self.session.model = self.kimi.name
        path = {"model_path": str(self.kimi.path)} if self.kimi.path is not None else {}
        self.session.settings = {**self.settings.saved(), **path}
        if not self.saving:
            return
        if self.turns:
            self.store.save(self.session)
        elif self.session.updated:  # it has a file
            self.store.remove(self.session.id)
            self.session.updated = ""
