"""A finished cache -> records, one row group at a time."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bakery.errors import BakeryError, CacheError
from bakery.files import file_sha256
from bakery.records import Record
from bakery.shards.manifest import NAME, Manifest, ShardEntry
from bakery.shards.schema import from_arrow, shard_schema

GROUPS_KEPT = 8


class CacheReader:
    """Opens a cache directory; `records(split)` streams it and `read(split, i)` takes one row.

    Raises CacheError, naming the file, for whatever is missing, truncated, foreign or damaged. Pages carry checksums,
    so a flipped byte is an error where it is read; `bakery validate` reads everything.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path / NAME)
        self._files: dict[str, list[Shard]] = {}
        for split, entries in self.manifest.splits.items():
            self._files[split] = [Shard(self.path, entry, self.manifest) for entry in entries]
        self._group = lru_cache(maxsize=GROUPS_KEPT)(self._decode)

    @property
    def splits(self) -> list[str]:
        return list(self._files)

    def rows(self, split: str) -> int:
        return self.manifest.total("rows", split)

    def records(self, split: str = "train") -> Iterator[Record]:
        """Every record of a split, in the order of the prompts."""
        for shard in self._shards(split):
            for group in range(len(shard.group_ends)):
                yield from shard.decode(group)

    def lengths(self, split: str) -> np.ndarray:
        """Tokens that the student reads of each row, context and response, without decoding the rest. int64 [rows]"""
        return np.concatenate([shard.lengths("student_context", "response") for shard in self._shards(split)])

    def targets(self, split: str) -> np.ndarray:
        """Targets of each row. int64 [rows]"""
        return np.concatenate([shard.lengths("support_size") for shard in self._shards(split)])

    def verify(self) -> str:
        """Read every shard once against its checksum; the manifest's own sha256. Raises CacheError."""
        for shard in (shard for shards in self._files.values() for shard in shards):
            if (found := file_sha256(shard.path)) != shard.entry.sha256:
                told = f"has sha256 {found[:16]}…, the manifest says {shard.entry.sha256[:16]}…"
                raise CacheError(f"{shard.path} {told}: it is damaged")
        return file_sha256(self.path / NAME)

    def read(self, split: str, index: int) -> Record:
        shards = self._shards(split)
        ends = list(accumulate(shard.entry.rows for shard in shards))
        if not 0 <= index < (ends[-1] if ends else 0):
            raise IndexError(f"row {index} of {ends[-1] if ends else 0}")
        number = bisect_right(ends, index)
        row = index - (ends[number - 1] if number else 0)
        group = bisect_right(shards[number].group_ends, row)
        return self._group(split, number, group)[row - (shards[number].group_ends[group - 1] if group else 0)]

    def _decode(self, split: str, shard: int, group: int) -> list[Record]:
        return list(self._files[split][shard].decode(group))

    def _shards(self, split: str) -> "list[Shard]":
        if split not in self._files:
            raise CacheError(f"{self.path} has no split {split!r}, only {', '.join(self._files) or 'none'}")
        return self._files[split]


class Shard:
    """One Parquet file, checked against its manifest entry as far as its footer goes."""

    def __init__(self, root: Path, entry: ShardEntry, manifest: Manifest) -> None:
        self.path, self.entry = root / entry.file, entry
        self.step, self.temperatures = manifest.logprob_step, manifest.temperatures
        if not self.path.is_file():
            raise CacheError(f"{self.path} is missing, though the manifest lists it")
        if (size := self.path.stat().st_size) != entry.bytes:
            raise CacheError(f"{self.path} has {size} bytes, the manifest says {entry.bytes}: truncated or replaced")
        with _naming(self.path):
            self.file = pq.ParquetFile(self.path, memory_map=True, page_checksum_verification=True)
        if not self.file.schema_arrow.equals(shard_schema(self.temperatures)):
            raise CacheError(f"{self.path}: its columns are not those of a bakery shard (see `bakery schema`)")
        groups = self.file.metadata
        self.group_ends = list(accumulate(groups.row_group(i).num_rows for i in range(groups.num_row_groups)))
        if (self.group_ends or [0])[-1] != entry.rows:
            raise CacheError(f"{self.path} holds {(self.group_ends or [0])[-1]} rows, the manifest says {entry.rows}")

    def lengths(self, *columns: str) -> np.ndarray:
        """Summed list lengths of each row, without decoding the other columns."""
        with _naming(self.path):
            table = self.file.read(columns=list(columns))
        return sum(pc.list_value_length(column).to_numpy().astype(np.int64) for column in table.columns)

    def decode(self, group: int, as_stored: bool = False) -> Iterator[Record]:
        """The records of a row group; `as_stored` leaves log-probs on their grid."""
        with _naming(f"{self.path}, row group {group}"):
            table = self.file.read_row_group(group)
            yield from from_arrow(table, 0 if as_stored else self.step, self.temperatures)


@contextmanager
def _naming(where: object) -> Iterator[None]:
    """Whatever a damaged file makes pyarrow or a type say becomes a CacheError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, IndexError, BakeryError) as error:
        raise CacheError(f"{where}: damaged: {error}") from error
