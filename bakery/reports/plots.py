"""Loss curves of a run as a PNG."""

from pathlib import Path
from typing import Any


def loss_curve(log_history: list[dict[str, Any]], label: str, path: Path) -> None:
    """`log_history` is the Trainer's: the training loss at logging steps, the held-out loss where it was asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, name, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.6, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{label}, nats a target")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
