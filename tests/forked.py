"""The command line in processes of their own, forked from a server that has imported everything: one starts in
milliseconds, so that it can be killed hundreds of times."""

import importlib
import itertools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bakery.records import content_id

PRELOAD = ["pytest", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"]
PRELOAD += ["peft", "bakery.cache", "bakery.distillation", "bakery.reports.plots", "bakery.cli"]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class SlowTeacher:
    """In the process: the fake teacher takes `seconds` a call, and notes each call as a line before it answers."""

    seconds: float = 0.01

    def __call__(self) -> None:
        from bakery.teachers.fake import FakeTeacher

        score = FakeTeacher.score

        def slow_score(teacher, contexts, *args):
            with open("asked", "a", encoding="utf-8") as notes:
                notes.write(" ".join(map(content_id, contexts)) + "\n")
            time.sleep(self.seconds)
            return score(teacher, contexts, *args)

        FakeTeacher.score = slow_score


@dataclass(frozen=True)
class NotedSteps:
    """In the process: an optimizer step takes `seconds` more, and is noted as it ends."""

    seconds: float = 0.01

    def __call__(self) -> None:
        from bakery.student.trainer import TrainingProgress

        def on_step_end(progress, args, state, control, **kwargs):
            with open("steps", "a", encoding="utf-8") as notes:
                notes.write(f"{state.global_step}\n")
            time.sleep(self.seconds)

        TrainingProgress.on_step_end = on_step_end


@dataclass(frozen=True)
class Limited:
    """In the process: a resource limit, such as the largest file."""

    limit: int
    value: int

    def __call__(self) -> None:
        resource.setrlimit(self.limit, (self.value, resource.getrlimit(self.limit)[1]))


@dataclass(frozen=True)
class FewFiles:
    """In the process: from the `nth` call of a method on (0: from the start), `free` more files may be open at once."""

    free: int
    nth: int = 0
    method: str = ""  # module:class.name

    def __call__(self) -> None:
        if not self.nth:
            self._limit()
            return
        module, _, path = self.method.partition(":")
        holder, name = path.split(".")
        kind = getattr(importlib.import_module(module), holder)
        real, count = getattr(kind, name), itertools.count(1)

        def limited(*args: Any, **kwargs: Any) -> Any:
            if next(count) == self.nth:
                self._limit()
            return real(*args, **kwargs)

        setattr(kind, name, limited)

    def _limit(self) -> None:
        """A file takes the lowest number that is free, and the limit is one for numbers."""
        free = [number for number in range(1_000) if not os.path.exists(f"/proc/self/fd/{number}")]
        Limited(resource.RLIMIT_NOFILE, free[self.free])()


def start(directory: Path, *argv: Any, prepare: tuple[Callable[[], None], ...] = ()) -> Any:
    """`bakery *argv` in `directory`, after each of `prepare`; what it says goes into the file `said`."""
    process = processes.Process(target=_main, args=(directory, [str(arg) for arg in argv], prepare))
    process.start()
    return process


def run(directory: Path, *argv: Any, prepare: tuple[Callable[[], None], ...] = ()) -> tuple[int, list[str]]:
    """The exit code, and the lines that it said this time."""
    said = directory / "said"
    before = len(said.read_bytes()) if said.exists() else 0
    process = start(directory, *argv, prepare=prepare)
    process.join()
    return process.exitcode, said.read_bytes()[before:].decode().splitlines()


def calls(directory: Path) -> list[list[str]]:
    """What a SlowTeacher was asked: a list of contexts for each call."""
    notes = directory / "asked"
    return [line.split() for line in notes.read_text(encoding="utf-8").splitlines()] if notes.exists() else []


def steps(directory: Path) -> list[int]:
    """The optimizer steps that NotedSteps saw."""
    notes = directory / "steps"
    return [int(line) for line in notes.read_text(encoding="utf-8").split()] if notes.exists() else []


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)


def _main(directory: Path, argv: list[str], prepare: tuple[Callable[[], None], ...]) -> None:
    from bakery.cli import main

    os.chdir(directory)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    for step in prepare:
        step()
    sys.argv = ["bakery", *argv]
    main()
