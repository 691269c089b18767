"""The wire format of a shard, record <-> Arrow. docs/cache-format.md says the same in words; change both or neither.

Every list column of a row is flat: `topk_ids` of a row holds its targets' supports end to end, `support_size` says
where each ends, and `log_norm_T` holds T values a target, target after target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bakery.errors import CacheError
from bakery.records import Example, Record, TopK
from bakery.shards.grid import Grid, rescaled

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("student_context", pa.list_(pa.int32()), nullable=False),
        pa.field("teacher_context", pa.list_(pa.int32()), nullable=False),
        pa.field("response", pa.list_(pa.int32()), nullable=False),
        pa.field("is_target", pa.list_(pa.bool_()), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("topk_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("support_size", pa.list_(pa.int32()), nullable=False),
        pa.field("tail_logprob", pa.list_(pa.float32()), nullable=False),
        pa.field("token_logprob", pa.list_(pa.float32()), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
    ]
)
LOG_NORM = pa.field("log_norm_T", pa.list_(pa.float32()), nullable=False)
ORIGINS = ("dataset", "teacher", "student")


def shard_schema(temperatures: tuple[float, ...]) -> pa.Schema:
    return SCHEMA.append(LOG_NORM) if temperatures else SCHEMA


def to_arrow(records: list[Record], grid: Grid, temperatures: tuple[float, ...]) -> pa.RecordBatch:
    """Records as they are stored."""
    stored = [grid.rounded(r.topk, temperatures) for r in records]
    columns: dict[str, list[Any]] = {
        "id": [r.example.id for r in records],
        **{name: [getattr(r.example, name) for r in records] for name in SCHEMA.names[1:5]},
        "topk_ids": [t.ids for t in stored],
        "topk_logprobs": [t.logprobs for t in stored],
        **{name: [getattr(t, name) for t in stored] for name in ("support_size", "tail_logprob", "token_logprob")},
        "origin": [r.origin for r in records],
        "log_norm_T": [t.log_norm.reshape(-1) for t in stored],
    }
    schema = shard_schema(temperatures)
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def from_arrow(table: pa.Table | pa.RecordBatch, grid: Grid, temperatures: tuple[float, ...]) -> Iterator[Record]:
    """The records of a table, row by row, as views into it. Where a grid rounded the support it is rescaled to the
    stored tail, for all rows at once."""
    parts = {name: _lists(table, name) for name in table.schema.names if name not in ("id", "origin")}
    ids, origins = table.column("id").to_pylist(), table.column("origin").to_pylist()
    if grid:
        names = ("topk_ids", "topk_logprobs", "support_size", "tail_logprob", "token_logprob")
        parts["topk_logprobs"].values = rescaled(TopK(*(parts[name].values for name in names))).logprobs
    for i, (key, origin) in enumerate(zip(ids, origins, strict=True)):
        row = {name: lists[i] for name, lists in parts.items()}
        norm = row["log_norm_T"] if temperatures else np.zeros(0, np.float32)
        topk = TopK(
            row["topk_ids"],
            row["topk_logprobs"],
            row["support_size"],
            row["tail_logprob"],
            row["token_logprob"],
            norm.reshape(len(row["support_size"]), len(temperatures)),
        )
        example = Example(key, row["student_context"], row["teacher_context"], row["response"], row["is_target"])
        if origin not in ORIGINS:
            raise CacheError(f"origin {origin!r} is none of {', '.join(ORIGINS)}")
        yield Record(example, topk, origin)


@dataclass
class _Lists:
    """A list column: the lists of all rows end to end, and where each row's begins and ends."""

    values: np.ndarray
    offsets: list[int]

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


def _lists(table: pa.Table | pa.RecordBatch, name: str) -> _Lists:
    column = table.column(name)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)  # which copies even a single one
    flat = array.flatten()
    if array.null_count or flat.null_count:
        raise CacheError(f"column {name} holds a null")
    values = flat.to_numpy(zero_copy_only=False)
    return _Lists(values, (array.offsets.to_numpy() - array.offsets[0].as_py()).tolist() if len(array) else [])
