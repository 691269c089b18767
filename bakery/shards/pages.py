"""What a row group unpacks to, read from its page headers before anything is unpacked.

A footer may claim 10¹² rows, and a kilobyte of zstd may stand for a gigabyte: whoever reads a cache of somebody else's
must not find out by running out of memory. A page header is a Thrift struct in the compact protocol
(apache/parquet-format, parquet.thrift; apache/thrift, thrift-compact-protocol.md).
"""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from bakery.errors import CacheError

MOST_UNPACKED = 1 << 31  # bytes of a row group, of which a cache of long rows and wide supports takes a tenth
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY, BYTE_STREAM_SPLIT. In the others a value may repeat the one
# before, so that no size says what they unpack to.
ENCODINGS = {0, 2, 3, 4, 8, 9}
BYTES_PER_VALUE = 8  # of an array: four, and as many for the levels of a list

_UNPACKED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of a PageHeader
_STRUCT = 12


def check_row_group(data: Any, group: pq.RowGroupMetaData) -> None:
    """`data` is the whole file. Raises CacheError for a row group that unpacks to more than a reader can be asked for,
    that has not the rows that the footer claims, or whose page headers are none."""
    unpacked = 0
    for number in range(group.num_columns):
        column = group.column(number)
        try:
            size, values = _unpacked(data, column)
        except (TypeError, ValueError, LookupError) as error:
            raise CacheError(f"column {column.path_in_schema}: its page headers are none ({error})") from error
        unpacked += size
        if column.path_in_schema == "id" and values != group.num_rows:
            raise CacheError(f"a row group of {group.num_rows} rows holds {values} ids")
    if unpacked > MOST_UNPACKED:
        raise CacheError(f"a row group of {unpacked:,} bytes, {MOST_UNPACKED:,} are the most that is read")


def _unpacked(data: Any, column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Bytes and values of a column chunk, at most."""
    size = values = dictionary = 0
    for header in _headers(data, column):
        size += header[_UNPACKED]
        page = header.get(_DATA) or header.get(_DATA_V2)
        if page is None:
            dictionary = header[_UNPACKED]
        else:
            values += page[1]
            if page[2 if _DATA in header else 4] not in ENCODINGS:
                raise ValueError("in an encoding that no shard has")
    width = BYTES_PER_VALUE + (dictionary if column.physical_type == "BYTE_ARRAY" else 0)
    return size + values * width, values


def _headers(data: Any, column: pq.ColumnChunkMetaData) -> Iterator[dict[int, Any]]:
    """The page headers of a column chunk."""
    starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
    at = min(start for start in starts if start is not None)
    end = at + column.total_compressed_size
    if not 0 < at < end <= len(data):
        raise ValueError("outside the file")
    while at < end:
        header, at = _struct(data, at)
        if min(header[_UNPACKED], header[_COMPRESSED]) < 0:
            raise ValueError("a page of a negative size")
        yield header
        at += header[_COMPRESSED]


def _struct(data: Any, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 8:
            size, at = _varint(data, at)
            at += size
        elif kind == _STRUCT and depth < 2:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            raise ValueError("a page header that is none")
    return fields, at + 1


def _integer(data: Any, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without end in a page header")
