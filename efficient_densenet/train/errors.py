"""What ends a run, and how it says why."""

from __future__ import annotations

REFUSED = 2  # the exit status of what was asked for in vain, as argparse has it
FAILED = 1


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line that says why."""


class SharedError(UsageError):
    """A refusal that all processes raise at once: none has to be told."""


class RunFailed(Exception):
    """The run broke, by no fault of what was asked for; the message is one line that says why."""


class Stopped(Exception):
    """All processes agreed to stop after a signal to one of them."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, or else its type."""
    return " ".join(str(error).split()) or type(error).__name__
