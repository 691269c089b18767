"""A cache of an older format -> today's, in place. No shard is touched: their columns are those of version 1."""

import os
from pathlib import Path

from bakery.errors import CacheError
from bakery.files import disk_errors, publish
from bakery.shards.card import dataset_card
from bakery.shards.directory import begun, check_directory, locked
from bakery.shards.manifest import NAME, PARTIAL, Manifest
from bakery.shards.versions import FORMAT_VERSION


def upgrade(path: Path) -> bool:
    """Whether there was anything to do. Broken off at any moment, the cache is one of either version.

    Raises CacheError where there is no cache, or one of a newer version; OutputError while somebody writes to it.
    """
    if not begun(path):
        raise CacheError(f"{path} is no bakery cache: it has no {NAME}")
    check_directory(path)
    lock = locked(path)
    try:
        there = {name: Manifest.load(path / name) for name in (PARTIAL, NAME) if (path / name).is_file()}
        old = {name: manifest for name, manifest in there.items() if manifest.format_version < FORMAT_VERSION}
        with disk_errors(path):
            for name, manifest in old.items():
                if name == NAME:
                    publish(path / "README.md", dataset_card(manifest).encode())
                manifest.save(path / name)
        return bool(old)
    finally:
        os.close(lock)
