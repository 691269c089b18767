"""Ways to write targets into plain Parquet and to read them back, for measuring what each costs.

`BAKERY` writes what a shard has, short of the columns that belong to a row; the others differ in what they name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bakery.records import TopK
from bakery.shards.grid import Grid, rescaled

SPLIT, DELTA, DICTIONARY = "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "dictionary"
SUPPORT = ("topk_ids", "topk_logprobs")  # columns with a value an entry; the others have one a target
Columns = dict[str, np.ndarray]  # each flat, all rows end to end


def grid(finest: float, coarsest: float) -> Callable[[TopK], TopK]:
    return partial(Grid(finest, coarsest).rounded, temperatures=())


FORMAT_2 = grid(1 / 256, 1 / 16)


@dataclass(frozen=True)
class Encoding:
    """What bakery writes, where nothing else is said."""

    name: str
    rounded: Callable[[TopK], TopK] | None = FORMAT_2
    sort_keys: Callable[[TopK], tuple[np.ndarray, ...]] | None = None  # of entries in a support, the last one first
    ids: str = SPLIT
    logprobs: str = SPLIT
    dtype: type = np.float32
    level: int = 3
    rows: int = 32  # of a row group

    def columns(self, topk: TopK) -> Columns:
        if self.rounded:
            topk = self.rounded(topk)
        if self.sort_keys:
            topk = entries_sorted(topk, *self.sort_keys(topk))
        columns = {name: values for name, values in vars(topk).items() if name != "log_norm"}
        ids, logprobs = columns.pop("ids"), columns.pop("logprobs").astype(self.dtype)
        return {"topk_ids": ids, "topk_logprobs": logprobs, **columns}

    def topk(self, columns: Columns) -> TopK:
        """A rounded support is scaled to the mass that the tail leaves, as readers do."""
        topk = TopK(*columns.values())
        return rescaled(topk) if self.rounded else topk

    def write(self, topk: TopK, targets: np.ndarray, path: Path) -> None:
        """`targets` of each row."""
        columns = self.columns(topk)
        rows = np.concatenate([[0], np.cumsum(targets)])
        ends = dict.fromkeys(columns, rows)
        ends |= dict.fromkeys(SUPPORT, np.concatenate([[0], np.cumsum(topk.support_size)])[rows])
        arrays = [pa.ListArray.from_arrays(pa.array(ends[n], pa.int32()), pa.array(columns[n])) for n in columns]
        how = {name: SPLIT for name in columns if name != "support_size"}
        how |= {"topk_ids": self.ids, "topk_logprobs": self.logprobs}
        pq.write_table(
            pa.table(arrays, list(columns)),
            path,
            row_group_size=self.rows,
            compression="zstd",
            compression_level=self.level,
            use_dictionary=[f"{name}.list.element" for name in how if how[name] == DICTIONARY],
            column_encoding={f"{name}.list.element": how[name] for name in how if how[name] != DICTIONARY},
            write_statistics=False,
            write_page_checksum=True,
        )

    def read(self, path: Path) -> TopK:
        table = pq.read_table(path, use_threads=False)
        return self.topk({name: flat(table.column(name)).to_numpy() for name in table.column_names})


class Codes(Encoding):
    """Log-probs as 8-bit fractions of a support's lowest, which stands beside them as float32."""

    def columns(self, topk: TopK) -> Columns:
        columns = super().columns(topk)
        lowest = np.minimum.reduceat(topk.logprobs, np.cumsum(topk.support_size) - topk.support_size)
        codes = np.round(topk.logprobs / np.repeat(lowest, topk.support_size) * 255).astype(np.uint8)
        return columns | {"topk_logprobs": codes, "lowest": lowest}

    def topk(self, columns: Columns) -> TopK:
        lowest = columns.pop("lowest")
        logprobs = columns["topk_logprobs"] * np.repeat(lowest / np.float32(255), columns["support_size"])
        return rescaled(TopK(*(columns | {"topk_logprobs": logprobs}).values()))


class Naive(Encoding):
    """A list of lists of int64 and of float32, as the library writes them when told nothing."""

    def write(self, topk: TopK, targets: np.ndarray, path: Path) -> None:
        rows, entries = (
            pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32()) for sizes in (targets, topk.support_size)
        )
        flat_columns = {"topk_ids": topk.ids.astype(np.int64), "topk_logprobs": topk.logprobs}
        lists = {name: pa.ListArray.from_arrays(entries, values) for name, values in flat_columns.items()}
        lists |= {"tail_logprob": topk.tail_logprob, "token_logprob": topk.token_logprob}
        pq.write_table(pa.table({name: pa.ListArray.from_arrays(rows, values) for name, values in lists.items()}), path)

    def read(self, path: Path) -> TopK:
        table = pq.read_table(path, use_threads=False)
        ids, logprobs, tail, token = (flat(table.column(name)) for name in table.column_names)
        sizes = np.diff(ids.offsets.to_numpy()).astype(np.int32)
        return TopK(ids.flatten().to_numpy(), logprobs.flatten().to_numpy(), sizes, tail.to_numpy(), token.to_numpy())


def flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks).flatten()


def entries_sorted(topk: TopK, *keys: np.ndarray) -> TopK:
    order = np.lexsort((*keys, topk.row_of_entry()))
    return replace(topk, ids=topk.ids[order], logprobs=topk.logprobs[order])


BAKERY = Encoding("**grid 1/256 to 1/16: bakery, format 2**")
