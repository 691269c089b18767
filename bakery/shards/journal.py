"""Answers that are in no shard yet: append-only Arrow IPC streams beside the shard in progress, fsynced per batch.

A crash can tear the last batch of a stream; everything before it is recovered. Each batch carries a checksum, since
Arrow's streams have none. A stream is never appended to by a second process: each run opens a file of its own.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from bakery.errors import CacheError
from bakery.files import reason, sync_directory

CHECKSUM = b"crc32"


class Journal:
    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self.directory = directory
        self.schema = schema
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def recover(self) -> list[pa.RecordBatch]:
        """Every whole batch of every stream. Raises CacheError for a stream that is there and cannot be read now: taken
        for torn, it would be asked for again and forgotten."""
        batches: list[pa.RecordBatch] = []
        for path in sorted(self.directory.glob("*.arrows")):
            try:
                for batch, told in _stream(path):
                    if batch.schema.equals(self.schema) and told == _checksum(batch):
                        batches.append(batch)
            except (pa.ArrowException, OSError, EOFError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise CacheError(f"{path}: cannot be read: {reason(error)}") from error
                # else a torn end: the stream stops
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
        try:
            self._writer.write_batch(batch, custom_metadata={CHECKSUM: _checksum(batch)})
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            self.close()  # nothing may stand behind a torn batch
            raise
        return self._file.tell() - before

    def rewrite(self, batches: list[pa.RecordBatch]) -> None:
        """Keep these and forget the rest: they stand in a stream of their own before an older one goes."""
        self.close()
        older = list(self.directory.glob("*.arrows"))
        for batch in batches:
            self.append(batch)
        for path in older:
            path.unlink()

    def clear(self) -> None:
        """Forget everything: it stands in published shards now."""
        self.close()
        if self.directory.is_dir():
            for path in self.directory.glob("*.arrows"):
                path.unlink()
            self.directory.rmdir()

    def close(self) -> None:
        """What counts is on disk by now; a stream needs no end, and on a full disk it gets none."""
        if self._writer is not None:
            with suppress(OSError):
                self._file.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stream(path: Path) -> Iterator[tuple[pa.RecordBatch, bytes | None]]:
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as stream, suppress(StopIteration):
        while True:
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
            yield batch, (metadata or {}).get(CHECKSUM)


def _checksum(batch: pa.RecordBatch) -> bytes:
    return b"%08x" % zlib.crc32(batch.serialize())
