"""What a finished run leaves beside its weights: model card, loss curve, samples, HTML report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bakery.reports.page import write_page
from bakery.reports.plots import loss_curve
from bakery.reports.samples import Sample

SAMPLES = "samples.json"


def write_artifacts(
    out: Path,
    *,
    card: str,
    facts: dict[str, str],
    metrics: dict[str, Any],
    samples: list[Sample],
    log: list[dict],
    loss: str,
) -> None:
    """`log` is the Trainer's log_history, `loss` the name of what it logged."""
    (out / "README.md").write_text(card, encoding="utf-8")
    loss_curve(log, loss, out / "loss.png")
    tree = [asdict(sample) for sample in samples]
    (out / SAMPLES).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(
        out / "report.html", title=out.name, metrics=metrics, samples=samples, curve=out / "loss.png", facts=facts
    )


def read_samples(out: Path) -> list[Sample]:
    return [Sample(**tree) for tree in json.loads((out / SAMPLES).read_text(encoding="utf-8"))]
