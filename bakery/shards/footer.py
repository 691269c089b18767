"""Where the column chunks of a shard are, read from its footer without pyarrow's objects for them: of a footer that was
changed those end the process, since a C++ exception passes through them (pyarrow 26, `RowGroupMetaData.column`).

The names are pyarrow's; the fields are those of parquet.thrift (apache/parquet-format).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import Any

from bakery.errors import CacheError
from bakery.shards.thrift import DEEPEST, struct

# A footer takes a hundred times its bytes as objects; it has 1 to 5 KB for 32 rows, and a shard 65,536 rows at most.
MOST_BYTES = 16 << 20
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
        elements = iter(fields[2])
        leaves = list(_leaves(elements, next(elements)[5], ()))
        return [RowGroup(index(group[3]), _columns(group[1], leaves)) for group in fields[4]]
    except (TypeError, ValueError, LookupError, AttributeError, StopIteration) as error:
        raise CacheError(f"its footer is none ({error})") from error


def _leaves(elements: Iterator[dict[int, Any]], children: int, above: tuple[bytes, ...]) -> Iterator[tuple[str, str]]:
    """Path and type of each column by the schema, which readers go by: a row group may say otherwise."""
    if len(above) > DEEPEST:
        raise ValueError(f"columns nested more than {DEEPEST} deep")
    for element in islice(elements, children):
        path = (*above, element[4])
        if element.get(5):
            yield from _leaves(elements, element[5], path)
        else:
            yield b".".join(path).decode(), "BYTE_ARRAY" if element[1] == _BYTE_ARRAY else "of a fixed size"


def _columns(chunks: list[dict[int, Any]], leaves: list[tuple[str, str]]) -> tuple[Column, ...]:
    return tuple(
        Column(
            path_in_schema=path,
            physical_type=kind,
            data_page_offset=chunk[3][9],
            dictionary_page_offset=chunk[3].get(11),
            total_compressed_size=chunk[3][7],
        )
        for chunk, (path, kind) in zip(chunks, leaves, strict=True)
    )
