"""Whose is this directory: a cache of bakery's, filled by one process at a time, and nothing else."""

import fcntl
import os
import re
from pathlib import Path

from bakery.errors import OutputError
from bakery.shards.manifest import NAME, PARTIAL

SHARD_NAME = re.compile(r"data/[a-z]+-\d{5}\.parquet")
OWN_FILES = {NAME, PARTIAL, "README.md", "data", "journal"}


def begun(out: Path) -> bool:
    return (out / PARTIAL).is_file() or (out / NAME).is_file()


def check_directory(out: Path) -> None:
    """Raises OutputError where a cache cannot be, or cannot go on; nothing is written."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory")
    if foreign := _foreign(out, own=OWN_FILES if begun(out) else {"data"}):
        raise OutputError(f"{out} holds something else ({foreign}); name an empty or new directory")
    if links := [name for name in OWN_FILES if (out / name).is_symlink()]:
        raise OutputError(f"{out / links[0]} is a link to somewhere else; a cache is one directory, name another")


def locked(out: Path) -> int:
    """The directory itself, held for this process alone: no file to leave behind, and a crash lets go of it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"{out} is being filled by another process; wait for it, or pass another --out") from error
    except OSError as error:
        os.close(descriptor)
        raise OutputError(
            f"{out} cannot be locked ({error.strerror}), and two processes might fill it; name a directory on a disk "
            f"that has locks, and copy what is finished"
        ) from error
    return descriptor


def _foreign(out: Path, own: set[str]) -> str | None:
    """The first thing in it that no cache would hold; before there is a manifest, anything but an empty `data/`."""
    if not out.is_dir():
        return None
    names = {path.name for path in out.iterdir() if path.suffix != ".tmp"} - own
    if PARTIAL not in own and (out / "data").is_dir():
        names |= {f"data/{path.name}" for path in (out / "data").iterdir()}
    return min(names, default=None)
