"""A run that is killed at whatever moment goes on where it stopped: the same bytes, next to nothing asked twice."""

import multiprocessing
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

from bakery.records import content_id
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.shards.writer import CacheWriter

ROWS, KILLS = 300, 12


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# -- real processes, killed --------------------------------------------------------------------------------------------


def ask_slowly(directory: Path) -> None:
    """`bakery cache-teacher` in `directory`, with a teacher that takes its time and notes each call as a line."""
    from bakery.cli import main
    from bakery.teachers.fake import FakeTeacher

    score = FakeTeacher.score

    def slow_score(self, contexts, *args):
        with open("asked", "a", encoding="utf-8") as notes:
            notes.write(" ".join(map(content_id, contexts)) + "\n")
        time.sleep(0.01)
        return score(self, contexts, *args)

    FakeTeacher.score = slow_score
    os.chdir(directory)
    silence = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.argv = ["bakery", "cache-teacher", "-c", "../recipe.yaml"]
    main()


@pytest.fixture(scope="module")
def processes():
    """Forked from a server that has imported everything, so that a kill costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "transformers.models.auto.tokenization_auto", "bakery.cache", "bakery.cli"]
    )
    return context


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
    command = [sys.executable, "-m", "bakery.cli", "cache-teacher", "-c", "../recipe.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True, check=True).stderr


def calls(directory: Path) -> list[list[str]]:
    notes = directory / "asked"
    return [line.split() for line in notes.read_text(encoding="utf-8").splitlines()] if notes.exists() else []


def test_twelve_kills_change_no_byte(bench, processes):
    chance, killed = random.Random(0), bench / "killed"
    kills = 0
    while kills < KILLS:
        process = processes.Process(target=ask_slowly, args=(killed,))
        enough = len(calls(killed)) + chance.randrange(0, 8)
        process.start()
        deadline = time.monotonic() + 30
        while len(calls(killed)) < enough and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.04 * chance.random())  # in the middle of a question, of a journal, of a shard
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        assert process.exitcode == -9, (killed / "said").read_text(encoding="utf-8")
    last = processes.Process(target=ask_slowly, args=(killed,))
    last.start()
    last.join()
    assert last.exitcode == 0, (killed / "said").read_text(encoding="utf-8")
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


# -- every step that a crash can fall between --------------------------------------------------------------------------


class Crash(BaseException):
    pass


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


def run(out: Path, asked: list[str]) -> None:
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
    run(tmp_path / "whole", [])
    steps, whole = disk.steps, files(tmp_path / "whole")
    assert steps > 30
    for first in range(steps):
        for second in range(first % 6, steps, 6):
            out, asked, crashes = tmp_path / f"{first}-{second}", [], 0
            for power in (first, second):
                disk.power(power)
                try:
                    run(out, asked)
                except Crash:
                    crashes += 1
            disk.power(10**6)
            run(out, asked)
            assert files(out) == whole, f"crashes after {first} and {second} steps"
            assert len(asked) <= 4 + crashes
            if crashes < 2:
                break  # the second run reached its end
