"""What the teacher said of the student's own responses: a cache like any other, in the run's directory.

Rows are written down before they are trained on, and read back to be trained on: a run that goes on finds the answers
of the run that was broken off, to the bit, and no token is scored twice.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bakery.records import Record
from bakery.shards.manifest import Identity
from bakery.shards.reader import CacheReader
from bakery.shards.schema import from_arrow
from bakery.shards.writer import CacheWriter, Window

DIRECTORY = "on-policy"


class OnPolicyCache:
    def __init__(self, out: Path, identity: Identity, recipe: dict[str, Any]) -> None:
        self.writer = CacheWriter.open_or_resume(out / DIRECTORY, identity, recipe)
        manifest = self.writer.manifest
        self.grid, self.temperatures = manifest.grid, manifest.temperatures
        self.vocab_size = manifest.vocab_size
        self.published = CacheReader(self.writer.out, manifest)
        splits = self.published.splits
        self.places = {key: (split, row) for split in splits for row, key in enumerate(self.published.ids(split))}
        for key in self.places.keys() & self.writer.answered.keys():  # a crash came before the journal's end
            del self.writer.answered[key]

    def __contains__(self, key: str) -> bool:
        return key in self.writer.answered or key in self.places

    def find(self, key: str) -> Record | None:
        """The row of that id, as a reader of the cache will have it."""
        if key in self.writer.answered:
            return next(from_arrow(self.writer.answered[key], self.grid, self.temperatures))
        return self.published.read(*self.places[key]) if key in self.places else None

    def add(self, records: list[Record]) -> None:
        """Durable when this returns."""
        self.writer.add(records)

    def publish(self, keys: list[str]) -> None:
        """Those of `keys` that only the journal holds become shards."""
        new = [key for key in keys if key in self.writer.answered]
        size = self.writer.manifest.rows_per_shard
        for at in range(0, len(new), size):
            examples = [record.example for key in new[at : at + size] if (record := self.find(key))]
            number = len(self.writer.manifest.entries())
            self.writer.publish(Window(number, examples), ["train"] * len(examples))
        if new and self.writer.answered:
            self.writer.journal.rewrite(list(self.writer.answered.values()))

    def finish(self) -> None:
        """What is published is a finished cache; without a single row there is none."""
        if self.writer.manifest.entries() and (self.writer.begun or not self.writer.complete):
            self.writer.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)
