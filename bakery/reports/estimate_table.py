"""What a dry run found, for a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from bakery.estimate import Estimate


def print_estimate(found: Estimate, writes: bool) -> None:
    most = "at most " if writes else ""
    rows = [
        ("examples", f"{found.examples:,}"),
        ("tokens of context", f"{found.context_tokens:,}"),
        ("tokens to write" if writes else "tokens to score", f"{most}{found.targets:,}"),
        (
            "time",
            f"{most}{_duration(found.seconds)} at the sample's {found.tokens_per_second:,.0f} tokens/s",
        ),
        ("on disk", f"{most}{found.bytes / 1e6:,.1f} MB at top-{found.top_k}"),
        ("price", "no teacher.price_per_million in the recipe" if found.money is None else f"{most}{found.money:,.2f}"),
    ]
    console = Console()
    facts = Table(box=box.SIMPLE_HEAD, show_header=False)
    for row in rows:
        facts.add_row(*row)
    console.print(facts)
    table = Table(title="From the sample", box=box.SIMPLE_HEAD)
    for column in ("top-k", "captured mass", "bytes a target"):
        table.add_column(column, justify="right")
    for at in found.at_k:
        table.add_row(str(at.k), f"{at.captured_mass:.2%}", f"{at.bytes_per_target:.0f}")
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
