"""The directory of a run: what may be in it when a run begins, and whether one can go on from there."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bakery
from bakery.config import Recipe
from bakery.errors import OutputError, RecipeError, first_line
from bakery.files import publish
from bakery.shards.directory import locked
from bakery.trees import changes, told

MARK = "bakery-run.json"  # written first: this is a run of bakery's, and these decide the weights it reaches
# As torch and safetensors say that a file is not what it should be.
UNREADABLE = ("UnpicklingError", "PytorchStreamReader", "Error while deserializing")
TRAINER_STATE_NAME = "trainer_state.json"  # transformers'
METRICS = "metrics.json"  # written last: the run is finished
MEASURED = ("student_fingerprint", "caches")  # of an identity: what no recipe tells
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

log = logging.getLogger("bakery")


def output_directory(recipe: Recipe) -> Path:
    named = recipe.training.get("output_dir")
    if not isinstance(named, str) or not named:
        raise RecipeError("the recipe names no `training.output_dir`; set it or pass --out")
    return Path(named)


def check_run(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """`training.output_dir`, if a run may go there. Nothing is written.

    Raises OutputError for a directory that holds anything but a run, or a run that neither flag says what to do with.
    """
    out = output_directory(recipe)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory")
    if not (out / MARK).is_file():
        begun_only = {f"{MARK}.tmp"}  # killed in its first moment
        if out.is_dir() and (names := sorted({p.name for p in out.iterdir()} - begun_only)):
            raise OutputError(f"{out} holds something else ({names[0]}); name an empty or new directory")
    elif not resume and not overwrite:
        state = "a finished run; pass" if is_finished(out) else "an unfinished run; pass --resume to go on with it,"
        raise OutputError(f"{out} holds {state} --overwrite to replace it, or another --out")
    return out


def run_identity(recipe: Recipe, student_fingerprint: str, cache_checksums: dict[str, str]) -> dict[str, Any]:
    """All that decides the weights a run reaches."""
    return {**_told_by(recipe), "student_fingerprint": student_fingerprint, "caches": cache_checksums}


def _told_by(recipe: Recipe) -> dict[str, Any]:
    asked = {"on_policy", "teacher"} if recipe.on_policy.fraction else set()
    own = recipe.model_dump(mode="json", include={"student", "loss", "training", *asked})
    own["training"].pop("output_dir")
    return {**own, "weights": {str(source.path): source.weight for source in recipe.caches}}


def check_finished(out: Path, recipe: Recipe) -> None:
    """Raises RecipeError where the finished run in `out` is of another recipe, as far as recipes tell."""
    begun = {name: value for name, value in _begun(out).items() if name not in MEASURED}
    _refuse_others(out, _told_by(recipe), begun)


@contextmanager
def begin_run(out: Path, identity: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The run's directory, for this process alone as long as the context lasts. Raises OutputError where another
    process trains there, RecipeError when the run that is there and goes on was begun from something else."""
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out)
    try:
        mark = out / MARK
        if mark.is_file() and overwrite:
            _remove_run(out)
        elif mark.is_file():
            _refuse_others(out, identity, _begun(out))
        _mark(out, identity)
        yield
    finally:
        os.close(lock)


def _begun(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / MARK).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{out / MARK} is not readable; pass --overwrite or another --out") from error


def _refuse_others(out: Path, identity: dict[str, Any], begun: dict[str, Any]) -> None:
    if changed := changes(identity, begun):
        raise RecipeError(f"{out} was begun otherwise ({told(changed)}); pass --overwrite or another --out")


def _mark(out: Path, identity: dict[str, Any] | None) -> None:
    tree = {"bakery_version": bakery.__version__, "identity": identity}
    publish(out / MARK, (json.dumps(tree, indent=2) + "\n").encode())


def _remove_run(out: Path) -> None:
    """All but its mark, which says from now on that nothing can go on here: a crash may come in the middle."""
    (out / METRICS).unlink(missing_ok=True)
    _mark(out, None)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def finish_run(out: Path, metrics: dict[str, Any]) -> None:
    publish(out / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def is_finished(out: Path) -> bool:
    return (out / METRICS).is_file()


@contextmanager
def checkpoint_errors(checkpoint: str | None) -> Iterator[None]:
    """Raises OutputError where the checkpoint that a run goes on from is damaged. torch reads it with weights_only, so
    that a pickle in it which would run code is one of these, too."""
    try:
        yield
    except Exception as error:
        if checkpoint and any(sign in f"{type(error).__name__}: {error}" for sign in UNREADABLE):
            raise OutputError(
                f"{checkpoint} does not load ({first_line(error)[:200]}); delete it to go on from the one before, or "
                f"pass --overwrite"
            ) from error
        raise


def last_checkpoint(out: Path) -> str | None:
    found = [path for _, path in _begun_checkpoints(out) if is_whole(path)]
    return str(found[-1]) if found else None


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each whole checkpoint and, last, of the finished model; a warning names those cut short."""
    found = []
    for step, path in _begun_checkpoints(out):
        if is_whole(path):
            found.append((step, path))
        else:
            log.warning("%s was cut short while it was saved, or half deleted: it is passed over", path)
    if is_finished(out):
        try:
            steps = int(json.loads((out / METRICS).read_bytes())["train"]["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{out / METRICS} is not readable; train again with --overwrite") from error
        found.append((steps, out))
    return found


def is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last, so a kill while saving leaves none, or one that is cut short."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _begun_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """By step; a directory of another name, such as somebody's copy, is none."""
    names = ((CHECKPOINT.fullmatch(path.name), path) for path in out.glob("checkpoint-*"))
    return sorted((int(name[1]), path) for name, path in names if name)
