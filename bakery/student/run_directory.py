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


def open_run(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """`training.output_dir`, ready to be trained into.

    Raises OutputError for a directory that holds anything but a run, or a run that neither flag says what to do with;
    RecipeError when a resumed run was begun with another recipe.
    """
    if not recipe.training.get("output_dir"):
        raise RecipeError("the recipe names no `training.output_dir`; set it or pass --out")
    out = Path(recipe.training["output_dir"])
    own = json.loads(recipe.model_dump_json(include={"cache", "caches", "student", "loss", "training"}))
    own["training"].pop("output_dir")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory")
    is_run = (out / RECIPE).is_file()
    if out.is_dir() and any(out.iterdir()) and not is_run:
        raise OutputError(
            f"{out} holds something else ({min(p.name for p in out.iterdir())}); name an empty or new directory"
        )
    if is_run and overwrite:
        shutil.rmtree(out)
    elif is_run and not resume:
        state = (
            "a finished run; pass"
            if (out / METRICS).is_file()
            else "an unfinished run; pass --resume to go on with it,"
        )
        raise OutputError(f"{out} holds {state} --overwrite to replace it, or another --out")
    elif is_run and (changed := differing(own, json.loads((out / RECIPE).read_text(encoding="utf-8")))):
        raise RecipeError(
            f"{out} was begun with another recipe ({'; '.join(changed)}); pass --overwrite or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    publish(out / RECIPE, (json.dumps(own, indent=2) + "\n").encode())
    return out


def is_finished(out: Path) -> bool:
    return (out / METRICS).is_file()


def last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(out))


def finish_run(out: Path, metrics: dict[str, Any]) -> None:
    publish(out / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
