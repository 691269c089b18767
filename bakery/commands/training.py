"""Commands that train: stage two, and both stages in one."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bakery.commands.options import Debug, Device, Out, Overwrite, RecipeFile, Resume, Sets, overrides


def distill_command(
    config: RecipeFile,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR[=WEIGHT]", help="Train on this cache instead of the recipe's; repeat for several."),
    ] = None,
    out: Out = None,
    student: Annotated[str | None, typer.Option(help="Model to train instead of the recipe's.")] = None,
    support: Annotated[
        str | None, typer.Option(help="renormalized, tail_bucket, truncated, residual_to_label, sampled.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="forward_kl, reverse_kl, mixed_kl, jsd, skew_kl, tvd …")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of mixed_kl and jsd.")] = None,
    temperature: Annotated[float | None, typer.Option(help="On both sides.")] = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Stage two: train a student on cached teacher distributions, and measure it on the held-out split."""
    flags = {
        "caches": _cache_sources(cache),
        "training.output_dir": out,
        "student.model_name_or_path": student,
        "loss.support": support,
        "loss.divergence": divergence,
        "loss.beta": beta,
        "loss.temperature": temperature,
    }
    _distill(config, overrides(flags, set_), device, resume, overwrite)


def run_command(
    config: RecipeFile,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Both stages of a recipe, and the evaluation."""
    from bakery.cache import cache_teacher
    from bakery.config import load_recipe
    from bakery.distillation import check_before_teacher

    given = overrides({"teacher.device": device}, set_)
    recipe = load_recipe(config, given)
    check_before_teacher(recipe, device, resume, overwrite)
    cache_teacher(recipe)
    _distill(config, given, device, resume, overwrite)


def evaluate_command(
    config: RecipeFile,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for machines.")] = False,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Measure every checkpoint of a run on the held-out rows, for a student that is to be baked by half."""
    from bakery.config import load_recipe
    from bakery.evaluation import evaluate_run
    from bakery.reports.table import print_checkpoints

    judged = [one.as_dict() for one in evaluate_run(load_recipe(config, overrides({}, set_)), device)]
    typer.echo(json.dumps(judged, indent=2)) if as_json else print_checkpoints(judged)


def _distill(config: Path, given: list[str], device: str | None, resume: bool, overwrite: bool) -> None:
    from bakery.config import load_recipe
    from bakery.distillation import distill
    from bakery.reports.artifacts import read_samples
    from bakery.reports.table import print_run

    out = distill(load_recipe(config, given), device=device, resume=resume, overwrite=overwrite)
    print_run(json.loads((out / "metrics.json").read_text(encoding="utf-8")), read_samples(out))
    typer.echo(f"model:  {out}\nreport: {out / 'report.html'}")


def _cache_sources(caches: list[str] | None) -> list[dict[str, Any]] | None:
    if not caches:
        return None
    sources = []
    for text in caches:
        path, _, weight = text.rpartition("=")
        whole = not path or Path(text).exists()  # a directory's name may hold a = of its own
        sources.append({"path": text} if whole else {"path": path, "weight": weight})
    return sources
