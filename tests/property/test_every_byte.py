"""A golden cache with one byte changed, or cut short, at every place: it is found, or it changes nothing.

Each shard stands in a cache of its own, whose manifest lists no other: what is wrong with one is found without the
others. The quick suite takes a sample of the places, the soak all of today's format and a fifth of the one before.
"""

import random
import shutil

import pytest
from caches_by_hand import bits
from conftest import ROOT

from bakery.errors import CacheError
from bakery.shards.manifest import Manifest
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate

STEPS = {ROOT / "data/golden-2": (211, 1), ROOT / "data/golden": (211, 5)}  # between the places: quick, soak
CASES = [
    pytest.param(golden, str(path.relative_to(golden)), step, marks=marks, id=f"{golden.name}-{path.name}-{step}")
    for golden, steps in STEPS.items()
    for step, marks in zip(steps, ((), pytest.mark.soak), strict=True)
    for path in sorted(golden.rglob("*"))
    if path.is_file()
]


def cache_of(golden, file, out):
    """The golden cache, with the one shard alone where `file` is a shard."""
    shutil.copytree(golden, out)
    if file.endswith(".parquet"):
        manifest = Manifest.load(golden / "manifest.json")
        splits = {split: [e for e in entries if e.file == file] for split, entries in manifest.splits.items()}
        one = manifest.model_copy(update={"splits": {split: found for split, found in splits.items() if found}})
        one.save(out / "manifest.json")
        for path in (out / "data").iterdir():
            if path.name != (out / file).name:
                path.unlink()
    return out


def read(cache):
    """All rows to the bit; None where the reader refuses. Whatever else it raises fails the test."""
    try:
        reader = CacheReader(cache)
        return [bits(row) for split in reader.splits for row in reader.records(split)]
    except CacheError:
        return None


def spoilt(whole, step):
    """(what, bytes): each place flipped in some of its bits, and the file cut off there."""
    chance = random.Random(0)
    start = 0 if step == 1 else chance.randrange(step)
    for at in range(start, len(whole), step):
        yield "flips", whole[:at] + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1 :]
        yield "cuts", whole[:at]


@pytest.mark.parametrize(("golden", "file", "step"), CASES)
def test_a_changed_byte_is_found_or_harmless(golden, file, step, tmp_path):
    cache = cache_of(golden, file, tmp_path / "cache")
    whole, rows = (cache / file).read_bytes(), read(cache)
    assert validate(cache) == []
    tried, found, refused = {"flips": 0, "cuts": 0}, 0, 0
    for what, data in spoilt(whole, step):
        (cache / file).write_bytes(data)
        problems, there = validate(cache), read(cache)
        # what the reader takes is what was written, though nobody validated it
        assert there in (rows, None), f"{what} {tried[what]}"
        assert problems or there == rows, f"{what} {tried[what]}"
        if file.endswith(".parquet"):
            assert problems
        tried[what] += 1
        found += bool(problems)
        refused += there is None
    flips, cuts = tried.values()
    print(
        f"\n{golden.name}/{file}: {flips:,} flips, {cuts:,} cuts; {found:,} found by validate, "
        f"{refused:,} refused by the reader, the rest changed no row"
    )
