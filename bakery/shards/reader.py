"""A finished cache -> records, one row group at a time."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bakery.errors import BakeryError, CacheError, first_line
from bakery.files import file_sha256, out_of_files, reason
from bakery.records import Record
from bakery.shards.footer import row_groups
from bakery.shards.grid import EXACT
from bakery.shards.manifest import NAME, Manifest, ShardEntry
from bakery.shards.pages import MOST_UNPACKED, damaged_row_groups
from bakery.shards.schema import from_arrow, shard_schema

# A parsed footer of 4,096 rows takes a megabyte of memory, and a millisecond to parse again.
FOOTERS_KEPT = 64
ROW_BYTES = 2048  # of memory that the objects of a record take, beside the numbers that they hold


class CacheReader:
    """Opens a cache directory; `records(split)` streams it and `read(split, i)` takes one row.

    Raises CacheError, naming the file, for whatever is missing, truncated, foreign or damaged. Pages carry checksums,
    so a flipped byte is an error where it is read; `bakery validate` reads everything.
    """

    def __init__(self, path: str | Path, manifest: Manifest | None = None) -> None:
        """`manifest` is the one of a cache that is still being filled."""
        self.path = Path(path)
        self.manifest = manifest or Manifest.load(self.path / NAME)
        self._files: dict[str, list[Shard]] = {}
        few = len(self.manifest.entries()) <= FOOTERS_KEPT
        for split, entries in self.manifest.splits.items():
            self._files[split] = [Shard(self.path, entry, self.manifest, few) for entry in entries]

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

    def ids(self, split: str) -> list[str]:
        return [key for shard in self._shards(split) for key in shard.ids()]

    def lengths(self, split: str, *columns: str) -> np.ndarray:
        """Tokens of each row in these columns, or else of all that the student reads. int64 [rows]"""
        columns = columns or ("student_context", "response")
        return np.concatenate([shard.lengths(*columns) for shard in self._shards(split)])

    def targets(self, split: str) -> np.ndarray:
        """Targets of each row. int64 [rows]"""
        return np.concatenate([shard.lengths("support_size") for shard in self._shards(split)])

    def check_sums(self) -> None:
        """Read every shard once against its checksum. Raises CacheError."""
        for shard in (shard for shards in self._files.values() for shard in shards):
            if (found := file_sha256(shard.path)) != shard.entry.sha256:
                told = f"has sha256 {found[:16]}…, the manifest says {shard.entry.sha256[:16]}…"
                raise CacheError(f"{shard.path} {told}: it is damaged")

    def verify(self) -> str:
        """The sha256 of a manifest whose shards are all what it says. Raises CacheError."""
        self.check_sums()
        checksum = file_sha256(self.path / NAME)
        if Manifest.load(self.path / NAME) != self.manifest:
            raise CacheError(f"{self.path} was changed while it was being opened; run the command again")
        return checksum

    def read(self, split: str, index: int) -> Record:
        """One row, for which its whole row group is decoded: whoever wants many takes `group`."""
        ends = np.cumsum(self.group_rows(split))
        if not 0 <= index < self.rows(split):
            raise IndexError(f"row {index} of {self.rows(split)}")
        number = int(np.searchsorted(ends, index, side="right"))
        return self.group(split, number)[index - int(ends[number])]  # from the group's end

    def group(self, split: str, number: int) -> list[Record]:
        """The records of row group `number`, counted over all shards of the split."""
        shards = self._shards(split)
        ends = list(accumulate(len(shard.group_ends) for shard in shards))
        shard = bisect_right(ends, number)
        return list(shards[shard].decode(number - ends[shard] + len(shards[shard].group_ends)))

    def group_rows(self, split: str) -> np.ndarray:
        """Rows of each row group, in order. int64 [groups]"""
        return np.concatenate([np.diff([0, *shard.group_ends]) for shard in self._shards(split)])

    def group_bytes(self, split: str) -> np.ndarray:
        """Bytes of memory that the records of each row group take, about: what its pages unpack to, as ids and floats
        are stored in four bytes. int64 [groups]"""
        unpacked = np.concatenate([np.asarray(shard.group_bytes, np.int64) for shard in self._shards(split)])
        return unpacked + ROW_BYTES * self.group_rows(split)

    def _shards(self, split: str) -> "list[Shard]":
        if split not in self._files:
            raise CacheError(f"{self.path} has no split {split!r}, only {', '.join(self._files) or 'none'}")
        return self._files[split]


class Shard:
    """One Parquet file, checked against its manifest entry as far as its footer goes.

    It is open only while it is read, so that a cache may have more shards than a process may have open files.
    """

    def __init__(self, root: Path, entry: ShardEntry, manifest: Manifest, keep_footer: bool = True) -> None:
        self.path, self.entry = root / entry.file, entry
        self.grid, self.temperatures = manifest.grid, manifest.temperatures
        if not self.path.is_file():
            raise CacheError(f"{self.path} is missing, though the manifest lists it")
        if (size := self.path.stat().st_size) != entry.bytes:
            raise CacheError(f"{self.path} has {size} bytes, the manifest says {entry.bytes}: truncated or replaced")
        self.footer: pq.FileMetaData | None = None
        with _naming(self.path), self._open() as file:
            footer, columns = file.metadata, file.schema_arrow
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            self.group_ends = list(accumulate(group.num_rows for group in groups))
            # Nothing of a column is asked for here: of a damaged footer pyarrow ends the process for that.
            self.group_bytes = [min(max(group.total_byte_size, 0), MOST_UNPACKED) for group in groups]
        if not columns.equals(shard_schema(self.temperatures)):
            raise CacheError(f"{self.path}: its columns are not those of a bakery shard (see `bakery schema`)")
        self.footer = footer if keep_footer else None
        self._damaged: dict[int, CacheError] | None = None  # row groups, once the shard was looked at
        if (self.group_ends or [0])[-1] != entry.rows:
            raise CacheError(f"{self.path} holds {(self.group_ends or [0])[-1]} rows, the manifest says {entry.rows}")

    def lengths(self, *columns: str) -> np.ndarray:
        """Summed list lengths of each row, without decoding the other columns."""
        tables = self._tables(range(len(self.group_ends)), list(columns))
        lengths = (map(pc.list_value_length, table.columns) for table in tables)
        return np.concatenate([sum(column.to_numpy().astype(np.int64) for column in group) for group in lengths])

    def ids(self) -> list[str]:
        tables = self._tables(range(len(self.group_ends)), ["id"])
        return [key for table in tables for key in table.column("id").to_pylist()]

    def decode(self, group: int, as_stored: bool = False) -> Iterator[Record]:
        """The records of a row group; `as_stored` leaves log-probs on their grid."""
        [table] = self._tables([group])
        with _naming(f"{self.path}, row group {group}"):
            yield from from_arrow(table, EXACT if as_stored else self.grid, self.temperatures)

    def _tables(self, groups: Iterable[int], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Row groups, each once its page headers say that it fits into memory."""
        with _naming(self.path), self._open() as file, self._mapped() as data:
            if self._damaged is None:  # all at once: to parse the footer takes longer than to read a row group
                self._damaged = damaged_row_groups(data, row_groups(data))
            for group in groups:
                if group in self._damaged:
                    raise self._damaged[group]
                yield file.read_row_group(group, columns=columns)

    @contextmanager
    def _mapped(self) -> Iterator[mmap]:
        with self.path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
            yield data

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, metadata=self.footer, memory_map=True, page_checksum_verification=True)


@contextmanager
def _naming(where: object) -> Iterator[None]:
    """Whatever a damaged file makes pyarrow or a type say becomes a CacheError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, BakeryError) as error:
        if isinstance(error, OSError) and error.errno:
            kind = BakeryError if out_of_files(error) else CacheError  # `validate` blames the cache for those
            raise kind(f"{where}: cannot be read: {reason(error)}") from error
        raise CacheError(f"{where}: damaged: {first_line(error)}") from error
