"""Coverage-guided fuzzing of what bakery reads from others: `make fuzz`, and no test of pytest's.

    python tests/fuzz/atheris_targets.py recipe|manifest|thrift|pages|shard [libFuzzer's flags]

A target may raise what it catches and nothing else. What raises more, hangs, or ends the process inside pyarrow is kept
by libFuzzer as a file `crash-…`, `timeout-…` or `oom-…`; given as an argument, it runs once more. The seeds are made
from the repository's own files.
"""

import json
import random
import re
import sys
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bakery", "yaml", "json"]):
    from bakery.config import load_recipe
    from bakery.errors import CacheError, RecipeError
    from bakery.shards.footer import row_groups
    from bakery.shards.manifest import Manifest
    from bakery.shards.pages import damaged_row_groups
    from bakery.shards.reader import Shard
    from bakery.shards.thrift import struct

import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "data/golden-2"
SHARD = "data/train-00002.parquet"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
MANIFEST.pop("checksum")  # which no mutation would survive
VALUES = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"[]",
    b"{}",
    b'""',
    b'"../../x"',
    b"[[]]",
    b"0.5",
]
PLACE = Path(tempfile.mkdtemp(prefix="bakery-fuzz-"))


def one_line(error: Exception) -> None:
    assert 0 < len(str(error)) < 2_000
    assert str(error).isprintable()


def recipe(data: bytes) -> None:
    (PLACE / "recipe.yaml").write_bytes(data)
    try:
        load_recipe(PLACE / "recipe.yaml")
    except RecipeError as error:
        one_line(error)


def manifest(data: bytes) -> None:
    (PLACE / "manifest.json").write_bytes(data)
    try:
        Manifest.load(PLACE / "manifest.json")
    except CacheError as error:
        one_line(error)


def thrift(data: bytes) -> None:
    """The parser below `pages`, whose callers take these for CacheErrors."""
    with suppress(ValueError, LookupError, TypeError):
        struct(data, 0)


def pages(data: bytes) -> None:
    """A whole file: its footer, and all page headers."""
    with suppress(CacheError):
        damaged_row_groups(data, row_groups(data))


def shard(data: bytes) -> None:
    """A whole file that the manifest tells the truth about, down to every record: the reader, and pyarrow below it."""
    (PLACE / SHARD).write_bytes(data)
    with suppress(CacheError):
        rows = sum(max(0, group.num_rows) for group in row_groups(data))
        if not 0 < rows <= len(data):  # the manifest refuses it
            return
        entry = {"file": SHARD, "rows": rows, "targets": 0, "bytes": len(data), "sha256": sha256(data).hexdigest()}
        told = Manifest.model_validate(MANIFEST | {"splits": {"train": [entry]}})
        found = Shard(PLACE, told.splits["train"][0], told)
        for group in range(len(found.group_ends)):
            for record in found.decode(group):
                assert len(record.topk) == record.example.is_target.sum()


def mutated_json(data: bytes, most: int, seed: int) -> bytes:
    """A key or a value at a time, as hardly anything else stays JSON."""
    chance = random.Random(seed)
    tokens = list(re.finditer(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null', data))
    if not tokens or chance.random() < 0.1:
        return atheris.Mutate(data, most)
    token = chance.choice(tokens)
    new = chance.choice(VALUES) if chance.random() < 0.5 else atheris.Mutate(token[0], 64)
    return (data[: token.start()] + new + data[token.end() :])[:most]


def mutated_shard(data: bytes, most: int, seed: int) -> bytes:
    """Half of the time within the footer alone, whose length is put right: it is a small part of the file, and the
    only one without a checksum."""
    size = int.from_bytes(data[-8:-4], "little")
    if seed % 2 or not 0 < size <= len(data) - 12:
        return atheris.Mutate(data, most)
    head, footer = data[: -8 - size], data[-8 - size : -8]
    footer = atheris.Mutate(footer, max(1, most - len(head) - 8))
    return head + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def seeds(target: str) -> list[bytes]:
    if target == "recipe":
        return [path.read_bytes() for path in (ROOT / "pipelines").glob("*.yaml")]
    if target == "manifest":
        return [json.dumps(MANIFEST).encode(), (GOLDEN / "manifest.json").read_bytes()]
    shards = [(GOLDEN / SHARD).read_bytes()]
    table = pq.read_table(GOLDEN / SHARD).slice(0, 2)
    for options in (  # small, and without checksums, so that what is changed is reached
        {"compression": "none", "use_dictionary": ["origin"], "write_statistics": ["id"]},
        {"compression": "zstd", "data_page_version": "2.0", "write_statistics": False},
        {"compression": "none", "use_dictionary": False, "row_group_size": 1},
    ):
        pq.write_table(table, PLACE / SHARD, **options)
        shards.append((PLACE / SHARD).read_bytes())
    if target == "thrift":
        return [data[-8 - int.from_bytes(data[-8:-4], "little") : -8] for data in shards]
    return shards


def main() -> None:
    targets = {function.__name__: function for function in (recipe, manifest, thrift, pages, shard)}
    name, *flags = sys.argv[1:]
    corpus = PLACE / "corpus"
    for directory in (corpus, (PLACE / SHARD).parent):
        directory.mkdir()
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    mutators = {"manifest": mutated_json, "pages": mutated_shard, "shard": mutated_shard}
    mutator = {"custom_mutator": mutators[name]} if name in mutators else {}
    given = [flag for flag in flags if not flag.startswith("-")] or [str(corpus)]
    argv = [sys.argv[0], *(flag for flag in flags if flag.startswith("-")), *given]
    atheris.Setup(argv, targets[name], **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
