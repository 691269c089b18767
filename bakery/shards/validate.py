"""Is this cache what its manifest says? Every problem with its file, row and reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bakery.errors import CacheError, printable
from bakery.files import file_sha256
from bakery.records import Record, topk_problem
from bakery.shards.manifest import NAME, PARTIAL, Manifest, ShardEntry, window_number
from bakery.shards.reader import Shard

# Of support and tail together, for float32; what a grid moves comes on top.
MASS_SLACK = 1e-3


@dataclass(frozen=True)
class Problem:
    file: str
    row: int | None
    what: str

    def __str__(self) -> str:
        return printable(f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.what}")


def validate(path: Path) -> list[Problem]:
    """All problems of the cache at `path`; an empty list means that it is sound."""
    # In this order: a new shard of a cache that grows is in the manifest, read last, or its writer is still there.
    files = sorted(f"data/{file.name}" for file in (path / "data").glob("*"))
    growing = (path / PARTIAL).is_file()
    try:
        manifest = Manifest.load(path / NAME)
    except CacheError as error:
        return [Problem(NAME, None, str(error))]
    return list(_problems(path, manifest, [] if growing else files))


def _problems(path: Path, manifest: Manifest, files: list[str]) -> Iterator[Problem]:
    """`files`: all that is in data/, where nobody writes to it."""
    if not manifest.entries():
        yield Problem(NAME, None, "lists no shards")
    listed = [entry.file for entry in manifest.entries()]
    for name in sorted({name for name in listed if listed.count(name) > 1}):
        yield Problem(NAME, None, f"lists {name} twice")
    for extra in sorted({*files} - {*listed}):
        yield Problem(extra, None, "is in no manifest")
    seen: dict[str, str] = {}
    for split, entries in manifest.splits.items():
        for entry in entries:
            if not entry.file.startswith(f"data/{split}-"):
                yield Problem(entry.file, None, f"is listed under the split {split}")
            index, of = manifest.part or (0, 1)
            if window_number(entry) % of != index:
                yield Problem(entry.file, None, f"is not of part {index} of {of}")
            yield from _shard_problems(path, entry, manifest, seen)


def _shard_problems(path: Path, entry: ShardEntry, manifest: Manifest, seen: dict[str, str]) -> Iterator[Problem]:
    file = path / entry.file
    if file.is_file() and (found := file_sha256(file)) != entry.sha256:
        yield Problem(entry.file, None, f"has sha256 {found[:16]}…, the manifest says {entry.sha256[:16]}…")
        return
    try:
        shard = Shard(path, entry, manifest)
    except CacheError as error:
        yield Problem(entry.file, None, str(error))
        return
    row, targets = 0, 0
    try:
        for group in range(len(shard.group_ends)):
            for record in shard.decode(group, as_stored=True):
                for what in _record_problems(record, manifest, seen, f"{entry.file}, row {row}"):
                    yield Problem(entry.file, row, what)
                targets += len(record.topk)
                row += 1
    except CacheError as error:
        yield Problem(entry.file, row, str(error).partition(": ")[2])
        return
    if targets != entry.targets:
        yield Problem(entry.file, None, f"holds {targets} targets, the manifest says {entry.targets}")


def _record_problems(record: Record, manifest: Manifest, seen: dict[str, str], where: str) -> Iterator[str]:
    example, topk = record.example, record.topk
    if example.id in seen:
        yield f"the id {example.id} is also in {seen[example.id]}"
    seen[example.id] = where
    for name in ("student_context", "teacher_context", "response"):
        ids = getattr(example, name)
        if len(ids) and not (ids.min() >= 0 and ids.max() < manifest.vocab_size):
            yield f"{name} has an id outside the vocabulary of {manifest.vocab_size}"
    if not len(example.response) and not (manifest.sampling and manifest.sampling.prompts_alone):
        yield "an empty response, where the manifest tells of responses"
    if problem := topk_problem(topk, manifest.vocab_size, manifest.draws):
        yield f"target {problem[0]}: {problem[1]}"
        return
    if manifest.draws:
        return
    sizes = topk.support_size
    if manifest.top_mass is None and (sizes != manifest.k).any():
        yield f"target {int(np.flatnonzero(sizes != manifest.k)[0])}: a support that is not of k = {manifest.k}"
    elif (sizes > manifest.k).any():
        yield f"target {int(np.flatnonzero(sizes > manifest.k)[0])}: a support larger than k = {manifest.k}"
    slack = MASS_SLACK + manifest.grid.mass_slack(topk)
    mass = topk.sum_over_support(np.exp(topk.logprobs.astype(float))) + np.exp(topk.tail_logprob.astype(float))
    if (wrong := np.flatnonzero(np.abs(mass - 1) > slack)).size:
        yield f"target {int(wrong[0])}: support and tail hold {mass[wrong[0]]:.6f} of the mass, not 1"
