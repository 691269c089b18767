"""What a row group unpacks to, read from its page headers before anything is unpacked.

A footer may claim 10¹² rows, and a kilobyte of zstd may stand for a gigabyte: whoever reads a cache of somebody else's
must not find out by running out of memory. The numbers are those of parquet.thrift (apache/parquet-format).
"""

from collections.abc import Iterator
from typing import Any

from bakery.errors import CacheError
from bakery.shards.footer import Column, RowGroup
from bakery.shards.thrift import struct

MOST_UNPACKED = 1 << 31  # bytes of a row group, of which a cache of long rows and wide supports takes a tenth
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY, BYTE_STREAM_SPLIT. In the others a value may repeat the one
# before, so that no size says what they unpack to.
ENCODINGS = {0, 2, 3, 4, 8, 9}
MOST_HEADER = 1 << 16  # bytes of a page header, which with the statistics of an id has a few thousand
BYTES_PER_VALUE = 8  # of an array: four, and as many for the levels of a list

_UNPACKED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of a PageHeader


def damaged_row_groups(data: Any, groups: list[RowGroup]) -> dict[int, CacheError]:
    """What is wrong with the row groups of a file, by number; those that are well are not in it."""
    damaged = {}
    for number, group in enumerate(groups):
        try:
            check_row_group(data, group)
        except CacheError as error:
            damaged[number] = error
    return damaged


def check_row_group(data: Any, group: RowGroup) -> None:
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


def _unpacked(data: Any, column: Column) -> tuple[int, int]:
    """Bytes and values of a column chunk, at most."""
    size = values = dictionary = 0
    for header in _headers(data, column):
        size += header[_UNPACKED]
        [kind] = header.keys() & {_DATA, _DICTIONARY, _DATA_V2}  # of several a reader may take another than is counted
        page = header[kind]
        if page[1] < 0:
            raise ValueError("a page of negative values")
        if kind == _DICTIONARY:
            dictionary += header[_UNPACKED]
            continue
        values += page[1]
        if page[2 if kind == _DATA else 4] not in ENCODINGS:
            raise ValueError("in an encoding that no shard has")
    width = BYTES_PER_VALUE + (dictionary if column.physical_type == "BYTE_ARRAY" else 0)
    return size + values * width, values


def _headers(data: Any, column: Column) -> Iterator[dict[int, Any]]:
    """The page headers of a column chunk."""
    starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
    at = min(start for start in starts if start is not None)
    end = at + column.total_compressed_size
    if not 0 < at < end <= len(data):
        raise ValueError("outside the file")
    while at < end:
        header, size = struct(data[at : min(end, at + MOST_HEADER)], 0)
        if min(header[_UNPACKED], header[_COMPRESSED]) < 0:
            raise ValueError("a page of a negative size")
        yield header
        at += size + header[_COMPRESSED]
