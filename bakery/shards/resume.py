"""What a directory already holds of a cache, and whether a writer may go on with it."""

from pathlib import Path
from typing import Any

import bakery
from bakery.errors import CacheError
from bakery.shards.manifest import NAME, PARTIAL, STEPS, Identity, Manifest, window_number
from bakery.shards.versions import FORMAT_VERSION
from bakery.trees import Changes, told


def found_or_fresh(out: Path, identity: Identity, recipe: dict[str, Any], extend: bool) -> tuple[Manifest, bool]:
    """The manifest to go on from, and whether it is that of a complete cache. Raises CacheError for one of another
    identity (but for the prompts of one to extend) or of an older format."""
    fresh = Manifest(bakery_version=bakery.__version__, recipe=recipe, **dict(identity))
    # While an extension is under way both are there: readers use the old manifest, the writer the partial one.
    finished = not (out / PARTIAL).is_file() and (out / NAME).is_file()
    if not finished and not (out / PARTIAL).is_file():
        return fresh, False
    there = Manifest.load(out / (NAME if finished else PARTIAL))
    if there.format_version != FORMAT_VERSION:
        raise CacheError(
            f"{out} is of format {there.format_version}, this bakery writes {FORMAT_VERSION}; run `bakery upgrade "
            f"{out}`, which touches no shard, or pass another --out"
        )
    changed = identity.differences(there)
    if extend and list(changed) == ["prompts_sha"]:
        # An unfinished cache keeps what its journal answers; rows of prompts that went are left out.
        numbers = [window_number(entry) for entry in there.entries()]
        grown = {"splits": there.splits, "first_window": max(numbers, default=-1) + 1}
        return fresh.model_copy(update=grown), False
    if changed:
        raise CacheError(f"{out} was begun with another recipe ({told(changed)}); {_cure(changed, there)}")
    return there, finished


def _cure(changed: Changes, there: Manifest) -> str:
    if list(changed) == ["prompts_sha"]:
        return "pass --extend to ask for the new prompts only, or another --out"
    if {*changed} <= {*STEPS, "prompts_sha"}:  # as with a cache of format 1 and a recipe that names no step
        return f"set {there.steps_told} to go on with it, or pass another --out"
    return "pass another --out"
