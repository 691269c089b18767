"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A path to write to; on leaving without an error it becomes `path`: tmp, fsync, rename, fsync of the directory."""
    tmp = path.with_name(path.name + ".tmp")
    yield tmp
    with tmp.open("rb") as stream:
        os.fsync(stream.fileno())
    tmp.replace(path)
    sync_directory(path.parent)


def publish(path: Path, data: bytes) -> None:
    with published(path) as tmp:
        tmp.write_bytes(data)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
