"""Errors meant for people: one sentence that says what is wrong and one that says what to do about it.

A bug is an `assert`; whatever a user can cause or cure is a `KimiError`. The command line prints the message and the
remedy on one line and exits with `exit_code` (see the table in README).
"""

INTERRUPTED = 130  # the exit code after Ctrl-C


class KimiError(Exception):
    """Something a person can act on: `message` names the cause, `remedy` the way out."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class UsageError(KimiError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class DoesNotFit(KimiError):
    """The machine lacks the memory or disk the job needs; raised before anything large is read or written."""

    exit_code = 3


class CheckpointError(KimiError):
    """The model is missing, incomplete, damaged, or of a kind this program does not run."""

    exit_code = 4


class MissingExtra(KimiError):
    """An optional dependency is not installed; the remedy is the exact pip command."""


class ContextExceeded(KimiError):
    """The prompt is longer than the context; nothing is ever truncated silently."""


class Retry(KimiError):
    """Stopped half-way with progress saved; running the same command again continues."""

    exit_code = 75
