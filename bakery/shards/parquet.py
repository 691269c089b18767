"""How a shard is encoded: the measured choice among what plain Parquet allows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 32
# Bytes of floats and ids compress better when each byte of the word has a stream of its own.
SPLIT_BYTES = ("topk_ids", "topk_logprobs", "tail_logprob", "token_logprob", "log_norm_T")


def write_parquet(table: pa.Table, path: Path) -> None:
    columns = [f"{name}.list.element" for name in SPLIT_BYTES if name in table.schema.names]
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        compression_level=3,
        use_dictionary=["origin"],
        column_encoding=dict.fromkeys(columns, "BYTE_STREAM_SPLIT"),
        write_statistics=["id"],
        write_page_checksum=True,
    )
