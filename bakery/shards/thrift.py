"""Thrift's compact protocol, as far as the headers and the footer of a Parquet file use it (apache/thrift,
thrift-compact-protocol.md). What is none raises ValueError, LookupError or TypeError, sooner or later."""

from typing import Any

STRUCT, DEEPEST = 12, 8


def struct(data: Any, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The struct that begins at a place, by the numbers of its fields, and where it ends."""
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
        else:
            fields[number], at = _value(data, at, kind, depth + 1)
    return fields, at + 1


def _value(data: Any, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    match kind:
        case 1 | 2 | 3:  # booleans of a list, and bytes
            return data[at], at + 1
        case 4 | 5 | 6:
            return _integer(data, at)
        case 7:
            if at + 8 > len(data):  # a list of them would go on behind the end of the file
                raise IndexError("index out of range: a double is cut short")
            return None, at + 8
        case 8:
            size, at = _varint(data, at)
            return bytes(data[at : at + min(size, 256)]), at + size  # a name; what is longer is none
        case 9 | 10:
            return _list(data, at, depth)
        case _ if kind == STRUCT:
            return struct(data, at, depth)
    raise ValueError("a field of no type")


def _list(data: Any, at: int, depth: int) -> tuple[list[Any], int]:
    head, at = data[at], at + 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, at = _varint(data, at)
    found = []
    for _ in range(size):  # each takes a byte at least, so that the file ends before a claim does
        item, at = _value(data, at, kind, depth + 1)
        found.append(item)
    return found, at


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
            raise ValueError("a number without end")
