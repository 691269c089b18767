"""The parts that several processes filled -> the cache that one would have filled, to the byte."""

import logging
from pathlib import Path

from bakery.errors import CacheError
from bakery.shards.manifest import NAME, Identity, Manifest, ShardEntry, window_number
from bakery.shards.writer import CacheWriter
from bakery.trees import told

log = logging.getLogger("bakery")
Found = dict[str, tuple[Path, ShardEntry]]  # by split, a shard and where it is


def merge(parts: list[Path], out: Path) -> Path:
    """Join finished parts, each once, in any order; the parts stay as they are. Goes on where it was broken off.

    Raises CacheError where they are not all the parts of one cache, or a shard is not what its manifest says.
    """
    manifests = {path: Manifest.load(path / NAME) for path in parts}
    identity = _together(manifests)
    windows = _windows(manifests)
    with CacheWriter.open_or_resume(out, identity, next(iter(manifests.values())).recipe) as writer:
        if not writer.complete:
            there = {window_number(entry) for entry in writer.manifest.entries()}
            for number in sorted(windows.keys() - there):
                writer.adopt(windows[number])
            writer.finish()
    log.info("%s: %d rows, %d targets", out, writer.manifest.total("rows"), writer.manifest.total("targets"))
    return out


def _together(manifests: dict[Path, Manifest]) -> Identity:
    """The identity of the whole."""
    (first, known), *others = manifests.items()
    whole = Identity.model_validate({**known.model_dump(include={*Identity.model_fields}), "part": None})
    for path, manifest in manifests.items():
        if manifest.part is None:
            raise CacheError(f"{path} is a whole cache, no part of one; merge what --shard-index made")
    for path, manifest in others:
        changed = manifest.differences(known)
        changed = {name: both for name, both in changed.items() if name != "part" or both[0][1] != both[1][1]}
        if changed:
            raise CacheError(f"{path} and {first} are not of one cache ({told(changed)})")
    indices = sorted(manifest.part[0] for manifest in manifests.values() if manifest.part)
    of = known.part[1] if known.part else 1
    if missing := sorted({*range(of)} - {*indices}):
        raise CacheError(f"part {missing[0]} of {of} is missing; name all {of} directories")
    if len(indices) > of:
        raise CacheError(f"{len(indices)} directories for {of} parts; name each once")
    return whole


def _windows(manifests: dict[Path, Manifest]) -> dict[int, Found]:
    windows: dict[int, Found] = {}
    for path, manifest in manifests.items():
        for split, entries in manifest.splits.items():
            for entry in entries:
                windows.setdefault(window_number(entry), {})[split] = path / entry.file, entry
    if absent := sorted({*range(max(windows, default=-1) + 1)} - windows.keys()):
        raise CacheError(f"window {absent[0]} is in none of the parts; fill them again")
    return windows
