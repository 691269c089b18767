"""Ctrl-C and SIGTERM: what is being written is finished first, then the command ends and says how to go on.

Only the command line installs the handler; elsewhere Ctrl-C is Python's own KeyboardInterrupt, and a crash at any
moment costs no more than what was in flight.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal ends the command; like KeyboardInterrupt no error that anyone could cure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class _Signals:
    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self.depth = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.number = self.number is None, number
        if not (first and self.depth):
            raise Stopped(number)


_signals = _Signals()


def stop_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _signals.on_signal)


def stopping() -> bool:
    """Whether this process has been told to stop."""
    return _signals.number is not None


@contextmanager
def finishing() -> Iterator[None]:
    """What is done inside is done to its end before a signal stops the command; a second signal does not wait."""
    _signals.depth += 1
    try:
        yield
    finally:
        _signals.depth -= 1
    if _signals.number is not None and not _signals.depth:
        raise Stopped(_signals.number)
