"""The directory of a run: what may be in it when a run begins, and whether one can go on from there."""

import json
import shutil
from pathlib import Path
from typing import Any

from bakery.config import Recipe
from bakery.errors import OutputError, RecipeError
from bakery.shards.manifest import differing, publish

RECIPE = "recipe.json"  # written first: this is a run of bakery's
METRICS = "metrics.json"  # written last: the run is finished


def check_run(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """`training.output_dir`, if a run may go there. Nothing is written.

    Raises OutputError for a directory that holds anything but a run, or a run that neither flag says what to do with;
    RecipeError when a resumed run was begun with another recipe.
    """
    if not recipe.training.get("output_dir"):
        raise RecipeError("the recipe names no `training.output_dir`; set it or pass --out")
    out = Path(recipe.training["output_dir"])
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory")
    if not (out / RECIPE).is_file():
        if out.is_dir() and (names := sorted(p.name for p in out.iterdir())):
            raise OutputError(f"{out} holds something else ({names[0]}); name an empty or new directory")
    elif resume and not overwrite:
        begun = json.loads((out / RECIPE).read_text(encoding="utf-8"))
        if changed := differing(_own_part(recipe), begun):
            cure = "pass --overwrite or another --out"
            raise RecipeError(f"{out} was begun with another recipe ({'; '.join(changed)}); {cure}")
    elif not overwrite:
        state = "a finished run; pass" if is_finished(out) else "an unfinished run; pass --resume to go on with it,"
        raise OutputError(f"{out} holds {state} --overwrite to replace it, or another --out")
    return out


def begin_run(out: Path, recipe: Recipe, overwrite: bool) -> None:
    if overwrite and (out / RECIPE).is_file():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    publish(out / RECIPE, (json.dumps(_own_part(recipe), indent=2) + "\n").encode())


def finish_run(out: Path, metrics: dict[str, Any]) -> None:
    publish(out / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def is_finished(out: Path) -> bool:
    return (out / METRICS).is_file()


def last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(out))


def _own_part(recipe: Recipe) -> dict[str, Any]:
    """What decides the weights that a run reaches."""
    own = recipe.model_dump(mode="json", include={"cache", "caches", "student", "loss", "training"})
    own["training"].pop("output_dir")
    return own
