"""Answers that are in no shard yet: append-only Arrow IPC streams beside the shard in progress, fsynced per batch.

A crash can tear the last batch of a stream; everything before it is recovered. A stream is never appended to by a
second process: each run opens a file of its own.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from bakery.files import sync_directory


class Journal:
    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self.directory = directory
        self.schema = schema
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def recover(self) -> list[pa.RecordBatch]:
        """Every whole batch of every stream."""
        batches: list[pa.RecordBatch] = []
        for path in sorted(self.directory.glob("*.arrows")):
            try:
                with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as stream:
                    for batch in stream:
                        if batch.schema.equals(self.schema):
                            batches.append(batch)
            except (pa.ArrowException, OSError, EOFError):
                continue  # the torn end of a run that was killed
        return batches

    def append(self, batch: pa.RecordBatch) -> int:
        """Durable when this returns; gives the bytes written."""
        if self._writer is None:
            self.directory.mkdir(exist_ok=True)
            numbers = [int(path.stem) for path in self.directory.glob("*.arrows")]
            self._file = (self.directory / f"{max(numbers, default=-1) + 1:05d}.arrows").open("xb")
            sync_directory(self.directory)
            sync_directory(self.directory.parent)
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._writer = pa.ipc.new_stream(self._file, self.schema, options=options)
        before = self._file.tell()
        self._writer.write_batch(batch)
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell() - before

    def clear(self) -> None:
        """Forget everything: it stands in published shards now."""
        self.close()
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                path.unlink()
            self.directory.rmdir()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
