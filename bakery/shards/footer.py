"""Where the column chunks of a shard are, read from its footer without pyarrow's objects for them: of a footer that was
changed those end the process, since a C++ exception passes through them (pyarrow 26, `RowGroupMetaData.column`).

The names are pyarrow's; the fields are those of parquet.thrift (apache/parquet-format).
"""

from dataclasses import dataclass
from sys import intern
from typing import Any

from bakery.errors import CacheError
from bakery.shards.thrift import struct

MOST_BYTES = 64 << 20  # a footer has 2 KB for 32 rows
_BYTE_ARRAY = 6


@dataclass(frozen=True, slots=True)
class Column:
    path_in_schema: str
    physical_type: str  # only whether it is BYTE_ARRAY
    data_page_offset: int
    dictionary_page_offset: int | None
    total_compressed_size: int

    @property
    def has_dictionary_page(self) -> bool:
        return self.dictionary_page_offset is not None


@dataclass(frozen=True, slots=True)
class RowGroup:
    num_rows: int
    columns: tuple[Column, ...]

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    def column(self, number: int) -> Column:
        return self.columns[number]


def row_groups(data: Any) -> list[RowGroup]:
    """`data` is the whole file. Raises CacheError where its footer is none."""
    size = int.from_bytes(data[-8:-4], "little")
    if not 0 < size <= min(len(data) - 12, MOST_BYTES):
        raise CacheError(f"a footer of {size:,} bytes")
    try:
        fields, _ = struct(data[-8 - size : -8], 0)
        return [RowGroup(group[3], tuple(map(_column, group[1]))) for group in fields[4]]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CacheError(f"its footer is none ({error})") from error


def _column(chunk: dict[int, Any]) -> Column:
    found = chunk[3]
    return Column(
        path_in_schema=intern(b".".join(found[3]).decode()),  # the same few in every row group
        physical_type="BYTE_ARRAY" if found[1] == _BYTE_ARRAY else "of a fixed size",
        data_page_offset=found[9],
        dictionary_page_offset=found.get(11),
        total_compressed_size=found[7],
    )
