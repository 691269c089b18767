"""Records -> a cache directory, window by window, so that a crash at any moment loses nothing that was answered.

A window is the next `rows_per_shard` examples in prompt order; it becomes at most one shard a split. What shards hold
therefore depends on the prompts alone, never on the order of the answers or on how often the run was killed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from bakery.errors import BakeryError, CacheError, OutputError, RecipeError
from bakery.files import disk_errors, file_sha256, make_directory, publish, published, sync_directory
from bakery.records import Example, Record
from bakery.shards.card import dataset_card
from bakery.shards.directory import SHARD_NAME, begun, check_directory, locked
from bakery.shards.journal import Journal
from bakery.shards.manifest import MOST_WINDOWS, NAME, PARTIAL, Identity, Manifest, ShardEntry, window_number
from bakery.shards.parquet import write_parquet
from bakery.shards.reader import CacheReader
from bakery.shards.resume import found_or_fresh
from bakery.shards.schema import shard_schema, to_arrow
from bakery.stopping import finishing


@dataclass(frozen=True)
class Window:
    number: int
    examples: list[Example]


class CacheWriter:
    """Made by `open_or_resume`. Then, for each of `windows(examples)`: `add` until nothing is missing, `publish`."""

    def __init__(self, out: Path, manifest: Manifest, complete: bool, lock: int | None) -> None:
        self.out = out
        self.lock = lock
        self.manifest = manifest
        self.complete = complete
        self.begun = False
        self.schema = shard_schema(manifest.temperatures)
        self.journal = Journal(out / "journal", self.schema)
        self.answered: dict[str, pa.RecordBatch] = {}
        for batch in self.journal.recover():
            self._remember(batch)

    @classmethod
    def open_or_resume(cls, out: Path, identity: Identity, recipe: dict, extend: bool = False) -> Self:
        """A new cache, an unfinished one to go on with, or a complete one (`complete` is true, nothing is to do).

        Raises CacheError when the directory holds a cache of another identity, OutputError when it holds anything else.
        """
        check_directory(out)
        lock = locked(out) if out.is_dir() else None
        try:
            manifest, complete = found_or_fresh(out, identity, recipe, extend)
            return cls(out, manifest, complete, lock)
        except BakeryError:
            if lock is not None:
                os.close(lock)
            raise

    def windows(self, examples: list[Example]) -> list[Window]:
        """The windows that are in no shard yet, in order, each whole; see `missing`.

        Answers to anything else, as a crash leaves them, are forgotten: while one is remembered, the journal stays.
        Raises RecipeError for more windows than there are names of shards.
        """
        first, size = self.manifest.first_window, self.manifest.rows_per_shard
        plan = [example for example in examples if example.id not in self._extended]
        published = {window_number(entry) for entry in self.manifest.entries()}
        cuts = [Window(first + at // size, plan[at : at + size]) for at in range(0, len(plan), size)]
        if (count := first + len(cuts)) > MOST_WINDOWS:
            raise RecipeError(
                f"{count:,} windows of {size:,} rows (cache.rows_per_shard), a cache has {MOST_WINDOWS:,} at most; set "
                f"cache.rows_per_shard={-(-len(examples) // MOST_WINDOWS)} or more, with another --out if this is begun"
            )
        index, of = self.manifest.part or (0, 1)
        todo = [window for window in cuts if window.number % of == index and window.number not in published]
        wanted = {example.id for window in todo for example in window.examples}
        self.answered = {key: row for key, row in self.answered.items() if key in wanted}
        return todo

    def missing(self, batch: list[Example]) -> list[Example]:
        return [example for example in batch if example.id not in self.answered]

    def add(self, records: list[Record]) -> int:
        """Durable when this returns; gives the bytes it took in the journal. The caller has checked the records."""
        batch = to_arrow(records, self.manifest.grid, self.manifest.temperatures)
        with self._writing():
            self._begin()
            size = self.journal.append(batch)
        self._remember(batch)
        return size

    def publish(self, window: Window, splits: list[str]) -> None:
        """Turn an answered window into shards: one for each name in `splits`, which gives each example's."""
        added = {}
        with self._writing():
            for split in sorted(set(splits)):
                rows = [self.answered[e.id] for e, name in zip(window.examples, splits, strict=True) if name == split]
                name = f"data/{split}-{window.number:05d}.parquet"
                added[split] = self._write_shard(name, pa.Table.from_batches(rows))
            self._list(added)
            for example in window.examples:
                del self.answered[example.id]
            if not self.answered:
                self.journal.clear()

    def adopt(self, shards: dict[str, tuple[Path, ShardEntry]]) -> None:
        """A window that another process has published elsewhere: by split, its shard. Raises CacheError for one that is
        not what its manifest says."""
        with self._writing():
            self._begin()
            for path, entry in shards.values():
                with published(self.out / entry.file) as tmp:
                    shutil.copyfile(path, tmp)
                    if (found := file_sha256(tmp)) != entry.sha256:
                        raise CacheError(f"{path} has sha256 {found[:16]}…, its manifest says {entry.sha256[:16]}…")
            self._list({split: entry for split, (_, entry) in shards.items()})

    def _list(self, added: dict[str, ShardEntry]) -> None:
        shards = {name: list(self.manifest.splits.get(name, [])) for name in {*self.manifest.splits, *added}}
        for split, entry in added.items():
            shards[split].append(entry)
        self.manifest = self.manifest.model_copy(update={"splits": dict(sorted(shards.items()))})
        self.manifest.save(self.out / PARTIAL)

    def finish(self) -> None:
        """The dataset card, then the manifest, last of all."""
        with self._writing():
            self._begin()
            self.journal.clear()
            self._sweep()
            publish(self.out / "README.md", dataset_card(self.manifest).encode())
            (self.out / PARTIAL).replace(self.out / NAME)
            sync_directory(self.out)
        self.complete = True

    def _sweep(self) -> None:
        """A crash leaves a shard that is torn, or not listed yet; other prompts since then may want it no more, and
        `data/train-*.parquet` in the card would take it for a part of the cache."""
        listed = {entry.file for entry in self.manifest.entries()}
        for path in (self.out / "data").iterdir():
            if f"data/{path.name}" not in listed and SHARD_NAME.fullmatch(f"data/{path.name.removesuffix('.tmp')}"):
                path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A flush, which a signal lets end. Raises OutputError where the disk is full, read-only, or out of files."""
        with finishing(), disk_errors(self.out):
            yield

    def _begin(self) -> None:
        """The first thing on disk, once there is an answer to keep: a refused run leaves nothing behind."""
        if not self.begun:
            make_directory(self.out / "data")
            if self.lock is None:
                self.lock = locked(self.out)
                if begun(self.out):
                    raise OutputError(f"{self.out} has been begun by another process; run the command again")
            self.manifest.save(self.out / PARTIAL)
            self.begun = True

    def _write_shard(self, name: str, table: pa.Table) -> ShardEntry:
        path = self.out / name
        with published(path) as tmp:
            write_parquet(table, tmp)
        targets = sum(len(sizes) for sizes in table.column("support_size"))
        return ShardEntry(
            file=name, rows=len(table), targets=targets, bytes=path.stat().st_size, sha256=file_sha256(path)
        )

    def _remember(self, batch: pa.RecordBatch) -> None:
        for i, key in enumerate(batch.column("id").to_pylist()):
            self.answered[key] = batch.slice(i, 1)

    @cached_property
    def _extended(self) -> set[str]:
        """The ids in the shards that were there before the last --extend. Raises CacheError for one that is damaged."""
        splits = {
            split: old
            for split, entries in self.manifest.splits.items()
            if (old := [entry for entry in entries if window_number(entry) < self.manifest.first_window])
        }
        if not splits:
            return set()
        reader = CacheReader(self.out, self.manifest.model_copy(update={"splits": splits}))
        reader.check_sums()
        return {key for split in splits for key in reader.ids(split)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()
        if self.lock is not None:
            os.close(self.lock)
