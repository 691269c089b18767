"""Files that are there whole or not at all, and disks that take no more."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from bakery.errors import OutputError

# What a disk says when it is full, read-only or failing, or a process has too many files open.
REFUSALS = {"ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE", "ENFILE"}
TORCH_SAVE_FAILED = ("inline_container.cc", "iostream error", "PytorchStreamWriter")


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A path to write to; on leaving without an error it becomes `path`: tmp, fsync, rename, fsync of the directory."""
    tmp = path.with_name(path.name + ".tmp")
    if os.path.lexists(tmp):  # left by a crash, or a link to somewhere else
        tmp.unlink()
    try:
        yield tmp
    except Exception:
        tmp.unlink(missing_ok=True)  # on a full disk it is in the way
        raise
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


def make_directory(path: Path) -> None:
    """With all above it, each on disk under its name, which an fsync of what is inside does not promise."""
    missing = [parent for parent in (path, *path.parents) if not parent.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_directory(made.parent)


def file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def out_of_files(error: BaseException) -> bool:
    """Whether this process, or the machine, may open no other file: nothing is wrong with this one."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def reason(error: OSError) -> str:
    """What the system says, and a cure where there is one."""
    cure = " (raise the limit: ulimit -n)" if out_of_files(error) else ""
    return (os.strerror(error.errno) if error.errno else str(error)) + cure


@contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Raises OutputError where the disk does not take a file, whichever way the library that wrote it says so."""
    try:
        yield
    except Exception as error:
        if why := _refusal(error):
            forbidden = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            cure = "once it may be written, or write elsewhere" if forbidden else "once there is room"
            raise OutputError(
                f"{what} cannot be written: {why}; what was written before is kept, run the same command again {cure} "
                f"(distill: with --resume)"
            ) from error
        raise


def _refusal(error: Exception) -> str | None:
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return reason(error) if errno.errorcode.get(error.errno or 0) in REFUSALS else None
    if isinstance(error, SafetensorError):
        return str(error).removeprefix("Error while serializing: ") if "(os error" in str(error) else None
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_SAVE_FAILED):
        return f"torch.save fails ({error})"
    return None
