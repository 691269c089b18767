"""The before / after table and the sample answers, for a terminal."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakery.reports.samples import Sample

NAMES = {
    "kl": "KL(teacher ‖ student), nats a token",
    "perplexity": "perplexity on the teacher's responses",
    "top1_agreement": "top-1 agreement",
}


def measure_rows(heldout: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, before, after, change) as text."""
    rows = []
    for key, name in NAMES.items():
        before, after = heldout["before"][key], heldout["after"][key]
        if key == "top1_agreement":
            rows.append((name, f"{before:.1%}", f"{after:.1%}", f"{(after - before) * 100:+.1f} points"))
        else:
            change = f"{after / before - 1:+.0%}" if before else "–"
            rows.append((name, f"{before:.3f}", f"{after:.3f}", change))
    return rows


def print_run(metrics: dict[str, Any], samples: list[Sample]) -> None:
    console = Console()
    heldout = metrics["heldout"]
    if heldout:
        table = Table(title=f"Held out: {heldout['rows']} rows, {heldout['targets']:,} targets", box=box.SIMPLE_HEAD)
        for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for row in measure_rows(heldout):
            table.add_row(*row)
        console.print(table)
    if samples:
        table = Table(title="Held-out answers", box=box.SIMPLE_HEAD, show_lines=True, expand=True)
        for column in ("prompt", "teacher", "student before", "student after"):
            table.add_column(column, ratio=1)
        for s in samples:
            table.add_row(*(escape(text) for text in (s.prompt, s.teacher, s.before, s.after)))
        console.print(table)


def print_checkpoints(judged: list[dict[str, Any]]) -> None:
    """One line a checkpoint, the student before training first."""
    table = Table(title="Held out, checkpoint by checkpoint", box=box.SIMPLE_HEAD)
    for column in ("step", "KL, nats", "perplexity", "top-1", "baked"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for one in judged:
        m = one["measures"]
        baked = "–" if one["baked"] is None else f"{one['baked']:.0%}"
        figures = (f"{m['kl']:.3f}", f"{m['perplexity']:.3f}", f"{m['top1_agreement']:.1%}", baked)
        table.add_row(str(one["step"]), *figures, escape(Path(one["path"]).name) or "before training")
    Console().print(table)
