"""A run that is killed at whatever moment goes on where it stopped: the same bytes, next to nothing asked twice."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builders import write_jsonl
from caches_by_hand import identity, record
from conftest import ROOT
from forked import SlowTeacher, calls, run, start, wait_for

from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.shards.writer import CacheWriter
from bakery.teachers.hf import HFTeacher
from bakery.teachers.kept_prefix import KeptPrefix

ROWS, KILLS = 300, 12
COMMAND = ("cache-teacher", "-c", "../recipe.yaml")


class Crash(BaseException):
    pass


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# -- real processes, killed --------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """A recipe of five windows, and a directory for the run that nobody disturbs and one for the run that is killed."""
    rows = [{"prompt": f"{n} loaves?", "response": "Yes, " * (n % 9) + f"{n}."} for n in range(ROWS)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    recipe = {
        "teacher": {
            "backend": "fake",
            "model_name_or_path": str(ROOT / "data/golden-tokenizer"),
            "top_k": 8,
            "tokens_per_batch": 250,  # about three rows a call
        },
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "validation_fraction": 0.2, "prefix": {"text": "Bake."}},
        "cache": {"out": "cache", "rows_per_shard": 64, "temperatures": [2.0]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    return tmp_path


def cache_teacher_by_hand(directory: Path) -> str:
    """The command as people type it; what it says."""
    command = [sys.executable, "-m", "bakery.cli", *COMMAND]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True, check=True).stderr


def test_twelve_kills_change_no_byte(bench):
    chance, killed = random.Random(0), bench / "killed"
    kills = 0
    while kills < KILLS:
        enough = len(calls(killed)) + chance.randrange(0, 8)
        process = start(killed, *COMMAND, prepare=(SlowTeacher(),))
        wait_for(lambda enough=enough: len(calls(killed)) >= enough, process)
        time.sleep(0.04 * chance.random())  # in the middle of a question, of a journal, of a shard
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        assert process.exitcode == -9, (killed / "said").read_text(encoding="utf-8")
    code, said = run(killed, *COMMAND, prepare=(SlowTeacher(),))
    assert code == 0, said
    assert kills > KILLS / 2  # a slow machine may have let it finish

    cache_teacher_by_hand(bench / "whole")
    assert files(killed / "cache") == files(bench / "whole/cache")
    assert validate(killed / "cache") == []
    reader = CacheReader(killed / "cache")
    ids = [r.example.id for split in ("train", "validation") for r in reader.records(split)]
    assert len(ids) == len(set(ids)) == ROWS

    asked = calls(killed)
    assert len({key for call in asked for key in call}) == ROWS
    # one call may have been answered and not yet written down while the next was under way
    assert sum(map(len, asked)) <= ROWS + kills * 2 * max(map(len, asked))
    assert len(asked) > len({tuple(call) for call in asked})  # some kill did hit a call

    before = files(killed / "cache")
    assert "is complete: 300 rows, nothing to ask for" in cache_teacher_by_hand(killed)
    assert files(killed / "cache") == before


# -- a model that runs a shared prefix once ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [None, {"max_new_tokens": 6, "temperature": 0.9}], ids=["scored", "written"])
def test_a_broken_run_writes_the_bytes_of_a_whole_one(tiny_model, tmp_path, monkeypatch, sampling):
    """What is kept of a prefix, and the batches behind it, come of the plan alone: here to the last bit of a float."""
    rows = [{"prompt": f"{n} loaves?", "response": "Yes, " * (n % 9) + f"{n}."} for n in range(40)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)

    def recipe(out):
        tree = {
            "teacher": {"model_name_or_path": str(tiny_model), "top_k": 8, "dtype": "float32", "tokens_per_batch": 400},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "prefix": {"text": "Knead, and let it rise. " * 5}},
            "cache": {"out": str(tmp_path / out), "rows_per_shard": 16, "logprob_step": 0, "temperatures": [2.0]},
        }
        return Recipe.model_validate(tree | ({"sampling": sampling} if sampling else {}))

    runs, calls, name = [], [], "generate" if sampling else "score"
    whole, run = getattr(HFTeacher, name), KeptPrefix._run

    def noting(self, prefix):
        runs.append(len(prefix) // 4)
        return run(self, prefix)

    def breaking(self, *args):
        if len(calls) >= power:
            raise Crash
        calls.append(len(args[0]))
        return whole(self, *args)

    monkeypatch.setattr(KeptPrefix, "_run", noting)
    monkeypatch.setattr(HFTeacher, name, breaking)
    power = 10**6
    cache_teacher(recipe("whole"))
    head = len("<system\n>\n<user\n") + 24 * 5
    # Two windows share the same; each row of the third begins with a 3. The short one is the teacher trying itself.
    assert [n for n in runs if n > 8] == [head, head + 1]
    assert len(calls) > 6
    for answered in (1, 2, 1):
        power = len(calls) + answered
        with pytest.raises(Crash):
            cache_teacher(recipe("broken"))
    power = 10**6
    cache_teacher(recipe("broken"))
    assert files(tmp_path / "broken/data") == files(tmp_path / "whole/data")


# -- every step that a crash can fall between --------------------------------------------------------------------------


class Disk:
    """Lets so many steps through to the disk, then the power is gone."""

    def __init__(self, monkeypatch) -> None:
        self.left = self.steps = 0
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, step):
        def counted(*args, **kwargs):
            self.steps += 1
            if self.steps > self.left:
                raise Crash
            return step(*args, **kwargs)

        return counted

    def power(self, steps: int) -> None:
        self.left, self.steps = steps, 0


@pytest.fixture
def disk(monkeypatch):
    with monkeypatch.context() as patch:
        yield Disk(patch)


RECORDS = [record(n) for n in range(4)]


def fill(out: Path, asked: list[str]) -> None:
    """Two windows of two rows, each row an answer of its own, noted before it is written down."""
    with CacheWriter.open_or_resume(out, identity(rows_per_shard=2), {}) as writer:
        if writer.complete:
            return
        for window in writer.windows([r.example for r in RECORDS]):
            for example in writer.missing(window.examples):
                asked.append(example.id)
                writer.add([r for r in RECORDS if r.example.id == example.id])
            writer.publish(window, ["train", "validation"])
        writer.finish()


def test_two_crashes_between_any_steps_lose_one_answer_each_at_most(tmp_path, disk):
    disk.power(10**6)
    fill(tmp_path / "whole", [])
    steps, whole = disk.steps, files(tmp_path / "whole")
    assert steps > 30
    for first in range(steps):
        for second in range(first % 6, steps, 6):
            out, asked, crashes = tmp_path / f"{first}-{second}", [], 0
            for power in (first, second):
                disk.power(power)
                try:
                    fill(out, asked)
                except Crash:
                    crashes += 1
            disk.power(10**6)
            fill(out, asked)
            assert files(out) == whole, f"crashes after {first} and {second} steps"
            assert len(asked) <= 4 + crashes
            if crashes < 2:
                break  # the second run reached its end
