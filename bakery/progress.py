"""How far a long flow is: a rich bar on a terminal, a plain line now and then anywhere else. Always on stderr."""

import sys
import time
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `unit`s done (rows, steps) towards `total`; a note beside them says what they cost or brought."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self.start = self.spoke = time.monotonic()
        self.bar = _bar(label, total) if sys.stderr.isatty() else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def advance(self, steps: int, note: str | None = None) -> None:
        self.done += steps
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=self.note)
        elif self.done >= self.total or time.monotonic() - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = time.monotonic()
            left = self.seconds / self.done * (self.total - self.done)
            parts = [f"{self.done}/{self.total} {self.unit}", *([self.note] if self.note else []), f"{left:.0f} s left"]
            print(f"{self.label}: {', '.join(parts)}", file=sys.stderr)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class TeacherProgress(Progress):
    """Progress of stage one, with the tokens that were paid for and the bytes they took."""

    def __init__(self, total: int) -> None:
        super().__init__("teacher", total, "rows")
        self.tokens = self.bytes = 0

    def answered(self, rows: int, tokens: int, size: int) -> None:
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + size
        rate = self.tokens / max(self.seconds, 1e-9)
        self.advance(rows, f"{self.tokens:,} tokens, {rate:,.0f}/s, {self.bytes / 1e6:.1f} MB")


def _bar(label: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
    bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task(label, total=total, note="")
    return bar
