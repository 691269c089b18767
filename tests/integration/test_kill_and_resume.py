"""A run that is killed at whatever moment goes on where it stopped: the same bytes, next to nothing asked twice."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import write_jsonl
from caches_by_hand import bits, files, identity, record
from conftest import ROOT
from forked import SlowTeacher, calls, start, wait_for

from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.records import Record
from bakery.shards.merge import merge
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.shards.writer import CacheWriter
from bakery.student.on_policy_cache import DIRECTORY, OnPolicyCache
from bakery.teachers.hf import HFTeacher
from bakery.teachers.kept_prefix import KeptPrefix

ROWS = 300
KILLS = [12, pytest.param(200, marks=pytest.mark.soak)]
COMMAND = ("cache-teacher", "-c", "../recipe.yaml")


class Crash(BaseException):
    pass


# -- real processes, killed --------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """A recipe of five windows, and in `whole` the cache of a run that nobody disturbs."""
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
    (tmp_path / "whole").mkdir()
    cache_teacher_by_hand(tmp_path / "whole")
    return tmp_path


def cache_teacher_by_hand(directory: Path) -> str:
    """The command as people type it; what it says."""
    command = [sys.executable, "-m", "bakery.cli", *COMMAND]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=True).stderr


def kill_again_and_again(there: Path, most: int, chance: random.Random) -> int:
    """Begin a run there, kill it and go on with it, `most` times or until it is done; how often it was killed."""
    kills, code = 0, None
    while code != 0:
        enough = len(calls(there)) + chance.randrange(0, 8)
        process = start(there, *COMMAND, prepare=(SlowTeacher(),))
        if kills < most:
            wait_for(lambda enough=enough: len(calls(there)) >= enough, process)
            time.sleep(0.04 * chance.random())  # in the middle of a question, of a journal, of a shard
            process.kill()
        process.join()
        code = process.exitcode
        assert code in (0, -9), (there / "said").read_text(encoding="utf-8")
        kills += code != 0
    return kills


@pytest.mark.parametrize("wanted", KILLS)
def test_kills_change_no_byte(wanted, bench):
    chance, kills, runs, again = random.Random(wanted), 0, 0, 0
    expected = files(bench / "whole/cache")
    while kills < wanted:
        runs += 1
        killed = bench / f"killed{runs}"
        killed.mkdir()
        there = kill_again_and_again(killed, wanted - kills, chance)
        kills += there
        assert files(killed / "cache") == expected
        assert validate(killed / "cache") == []
        reader = CacheReader(killed / "cache")
        ids = [r.example.id for split in ("train", "validation") for r in reader.records(split)]
        assert len(ids) == len(set(ids)) == ROWS

        asked = calls(killed)
        assert len({key for call in asked for key in call}) == ROWS
        # one call may have been answered and not yet written down while the next was under way
        assert sum(map(len, asked)) <= ROWS + there * 2 * max(map(len, asked))
        again += sum(map(len, asked)) - ROWS
    assert again > 0  # some kill did hit a call
    print(f"\nstage one: {kills} kills in {runs} runs of {ROWS} rows, the same bytes, {again} rows asked for twice")

    assert f"is complete: {ROWS} rows, nothing to ask for" in cache_teacher_by_hand(killed)
    assert files(killed / "cache") == expected


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
        monkeypatch.setattr(os, "fsync", lambda _: None)  # what counts is that it is called: no power is lost here
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


RECORDS = [record(n) for n in range(7)]


def answer(writer: CacheWriter, records: list[Record], asked: list[str]) -> None:
    """Windows of two rows, each row an answer of its own, noted before it is written down."""
    for window in writer.windows([r.example for r in records]):
        for example in writer.missing(window.examples):
            asked.append(example.id)
            writer.add([r for r in records if r.example.id == example.id])
        writer.publish(window, ["train", "validation"][: len(window.examples)])
    writer.finish()


def fill(out: Path, asked: list[str]) -> None:
    with CacheWriter.open_or_resume(out, identity(rows_per_shard=2), {}) as writer:
        if not writer.complete:
            answer(writer, RECORDS[:4], asked)


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_two_crashes_between_any_steps_lose_one_answer_each_at_most(stride, tmp_path, disk):
    disk.power(10**6)
    fill(tmp_path / "whole", [])
    steps, whole, tried = disk.steps, files(tmp_path / "whole"), 0
    assert steps > 30
    for first in range(steps):
        for second in range(first % stride, steps, stride):
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
            tried += crashes
            if crashes < 2:
                break  # the second run reached its end
    print(f"\n{tried:,} crashes between two of {steps} steps to the disk: the same bytes, an answer each at most")


def crash_at_every_step(
    disk: Disk, begin: Callable[[str], Path], go: Callable[[Path], None], check, seen: Callable[[Path], Any] = files
) -> int:
    """`go` on what `begin` makes, broken off after each of its steps and gone on with; `check` what a crash left. In
    the end `seen` sees what it sees of an unbroken one. How many steps there are."""
    disk.power(10**6)
    go(whole := begin("whole"))
    expected, step, crashed = seen(whole), 0, True
    while crashed:
        disk.power(10**6)
        out = begin(f"{step:03d}")
        disk.power(step)
        try:
            go(out)
            crashed = False
        except Crash:
            step += 1
        disk.power(10**6)
        check(out)
        go(out)
        assert seen(out) == expected, f"a crash after {step} steps"
    assert step > 10
    return step


def test_a_crash_between_any_steps_of_an_extension(tmp_path, disk):
    """Readers have the old cache all the while, and the extension goes on where it stopped."""

    def begin(name):
        fill(tmp_path / name, [])
        return tmp_path / name

    def extend(out):
        with CacheWriter.open_or_resume(out, identity(rows_per_shard=2, prompts_sha="more"), {}, True) as writer:
            if not writer.complete:
                answer(writer, RECORDS, [])

    def check(out):
        assert validate(out) == []
        reader = CacheReader(out)
        rows = sum(map(reader.rows, reader.splits))
        assert rows == (4 if (out / "manifest.partial.json").exists() or reader.manifest.prompts_sha == "q" else 7)

    crash_at_every_step(disk, begin, extend, check)


def test_a_crash_between_any_steps_of_a_merge(tmp_path, disk):
    disk.power(10**6)
    for i in range(2):
        with CacheWriter.open_or_resume(tmp_path / f"part{i}", identity(rows_per_shard=2, part=(i, 2)), {}) as writer:
            answer(writer, RECORDS, [])
    parts = [tmp_path / "part0", tmp_path / "part1"]
    crash_at_every_step(disk, lambda name: tmp_path / name, lambda out: merge(parts, out) and None, lambda out: None)
    assert validate(tmp_path / "whole") == []


def test_a_crash_between_any_steps_of_an_on_policy_cache(tmp_path, disk):
    """Rows are published at checkpoints, while others are ahead in the journal: no row twice, and none lost."""

    def go(out):
        for end in (2, 4, 6):  # as from checkpoint to checkpoint
            with OnPolicyCache(out, identity(rows_per_shard=2), {}) as cache:
                for row in RECORDS[: end + 1]:  # one is ahead
                    if cache.find(row.example.id) is None:
                        cache.add([row])
                cache.publish([row.example.id for row in RECORDS[:end]])
                if end == 6:
                    cache.finish()

    def check(out):
        with OnPolicyCache(out, identity(rows_per_shard=2), {}) as cache:
            for row in RECORDS:
                found = cache.find(row.example.id)
                assert found is None or found.example.id == row.example.id

    def rows(out):
        """Where the shards are cut depends on the crash, their rows do not."""
        assert validate(out / DIRECTORY) == []
        return [bits(row) for row in CacheReader(out / DIRECTORY).records()]

    assert crash_at_every_step(disk, lambda name: tmp_path / name, go, check, rows) > 40
    assert len(rows(tmp_path / "whole")) == 6
