"""Eight processes read a cache while another extends it: each sees it as it was before or after."""

import json
import time
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from builders import write_jsonl
from caches_by_hand import bits
from conftest import ROOT
from forked import SlowTeacher, processes, run

from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate

READERS, ROWS = 8, 24
EXTENSIONS = [2, pytest.param(12, marks=pytest.mark.soak)]


def state_of(cache: Path) -> str:
    """Of every row, to the bit."""
    reader = CacheReader(cache)
    rows = [bits(row) for split in reader.splits for row in reader.records(split)]
    assert len(rows) == sum(map(reader.rows, reader.splits))
    return sha256(repr(rows).encode()).hexdigest()


def read_on(home: Path, number: int) -> None:
    """In a process of its own: read and validate until told to stop; what was seen goes into a file."""
    seen, problems = [], []
    while not seen or not (home / "stop").exists():
        seen.append(state_of(home / "cache"))
        problems += map(str, validate(home / "cache"))
        if len(seen) == 1:
            (home / f"reading-{number}").touch()
        time.sleep(0.1)  # eight that never rest leave the writer nothing of two cores
    (home / f"saw-{number}").write_text(json.dumps([seen, problems]), encoding="utf-8")


@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_nobody_sees_a_cache_in_between(extensions, tmp_path):
    recipe = {
        "teacher": {
            "backend": "fake",
            "model_name_or_path": str(ROOT / "data/golden-tokenizer"),
            "top_k": 8,
            "tokens_per_batch": 200,
        },
        "prompts": {"path": "prompts.jsonl", "validation_fraction": 0.2},
        "cache": {"out": "cache", "rows_per_shard": 6},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def grow_to(rows):
        write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n}?", "response": "Yes. " * 3} for n in range(rows)])
        code, said = run(tmp_path, "cache-teacher", "-c", "recipe.yaml", "--extend", prepare=(SlowTeacher(0.02),))
        assert code == 0, said
        return state_of(tmp_path / "cache")

    states = [grow_to(ROWS)]
    readers = [processes.Process(target=read_on, args=(tmp_path, number)) for number in range(READERS)]
    for reader in readers:
        reader.start()
    while not all((tmp_path / f"reading-{number}").exists() for number in range(READERS)):
        assert all(reader.is_alive() for reader in readers)
        readers[0].join(0.05)
    states += [grow_to(ROWS * (2 + i)) for i in range(extensions)]
    (tmp_path / "stop").touch()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * READERS
    reads = 0
    for number in range(READERS):
        seen, problems = json.loads((tmp_path / f"saw-{number}").read_text(encoding="utf-8"))
        assert problems == []
        assert {*seen} <= {*states}
        assert seen == sorted(seen, key=states.index)  # it only grows
        assert seen[0] == states[0]
        reads += len(seen)
    print(f"\n{READERS} readers beside {extensions} extensions: {reads} whole reads, none of a state in between")
