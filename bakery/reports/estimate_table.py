"""What a dry run finds, and how a terminal shows it."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class AtK:
    """What keeping K entries a target, or what K draws bring up, holds, and costs on disk."""

    k: int
    entries: float  # mean over the sample's targets: below K with a top-mass, and of draws
    captured_mass: float | None  # mean over the sample's targets; None of draws, which stand for all of it
    bytes_per_target: float


@dataclass(frozen=True)
class Estimate:
    """Of a whole run from nothing; `targets` is the most that the teacher can write where it writes."""

    examples: int
    context_tokens: int
    targets: int
    tokens_per_second: float  # targets, in the sample
    at_k: list[AtK]  # from 8 to 128, as far as the recipe's K lets the sample see, and at the recipe's own
    k: int
    sampled: bool  # k is a number of draws
    money: float | None  # None where the recipe names no prices

    @property
    def seconds(self) -> float:
        return self.targets / self.tokens_per_second

    @property
    def bytes(self) -> float:
        return next(row.bytes_per_target for row in self.at_k if row.k == self.k) * self.targets


def print_estimate(found: Estimate, writes: bool) -> None:
    most = "at most " if writes else ""
    kept = f"{found.k} draws a target" if found.sampled else f"top-{found.k}"
    rows = [
        ("examples", f"{found.examples:,}"),
        ("tokens of context", f"{found.context_tokens:,}"),
        ("tokens to write" if writes else "tokens to score", f"{most}{found.targets:,}"),
        (
            "time",
            f"{most}{_duration(found.seconds)} at the sample's {found.tokens_per_second:,.0f} tokens/s",
        ),
        ("on disk", f"{most}{found.bytes / 1e6:,.1f} MB at {kept}"),
        ("price", "no teacher.price_per_million in the recipe" if found.money is None else f"{most}{found.money:,.2f}"),
    ]
    console = Console()
    facts = Table(box=box.SIMPLE_HEAD, show_header=False)
    for row in rows:
        facts.add_row(*row)
    console.print(facts)
    table = Table(title="From the sample", box=box.SIMPLE_HEAD)
    for column in ("draws" if found.sampled else "top-k", "entries", "captured mass", "bytes a target"):
        table.add_column(column, justify="right")
    for at in found.at_k:
        mass = "–" if at.captured_mass is None else f"{at.captured_mass:.2%}"
        table.add_row(str(at.k), f"{at.entries:.1f}", mass, f"{at.bytes_per_target:.0f}")
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
