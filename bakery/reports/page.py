"""A run as one self-contained HTML file. Everything a model said is escaped."""

from base64 import b64encode
from pathlib import Path
from typing import Any

from bakery.reports.samples import Sample
from bakery.reports.table import measure_rows


def write_page(
    path: Path, *, title: str, metrics: dict[str, Any], samples: list[Sample], curve: Path, facts: dict[str, str]
) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("bakery.reports"), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.j2").render(
        title=title,
        heldout=metrics["heldout"],
        measures=measure_rows(metrics["heldout"]) if metrics["heldout"] else [],
        samples=samples,
        curve=b64encode(curve.read_bytes()).decode(),
        facts=facts,
        train=metrics["train"],
        seconds=metrics["seconds"],
    )
    path.write_text(html, encoding="utf-8")
