"""Signals, full disks and lost devices: one line that says how to go on, and going on ends at the same bytes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml
from builders import write_jsonl
from caches_by_hand import files
from conftest import ROOT, save_tiny_model
from forked import FewFiles, Limited, NotedSteps, SlowTeacher, calls, run, start, steps, wait_for
from safetensors.torch import load_file

from bakery.cache import cache_teacher
from bakery.config import load_recipe
from bakery.distillation import distill
from bakery.errors import DeviceError
from bakery.shards.journal import Journal
from bakery.shards.reader import CacheReader
from bakery.shards.schema import shard_schema
from bakery.shards.validate import validate
from bakery.student.trainer import DistillTrainer
from bakery.teachers.fake import FakeTeacher

ROWS, STEPS = 120, 8
COMMAND = ("cache-teacher", "-c", "../recipe.yaml")
DISTILL = ("distill", "-c", "../recipe.yaml", "--cache", "../whole/cache", "--device", "cpu")
GO_ON = "run the same command again to go on (distill: with --resume)"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A recipe of both stages, and in `whole` the cache of a run that nobody disturbs."""
    home = tmp_path_factory.mktemp("limits")
    write_jsonl(home / "prompts.jsonl", [{"prompt": f"{n}?", "response": "Yes, " * (n % 9) + "."} for n in range(ROWS)])
    recipe = {
        "teacher": {
            "backend": "fake",
            "model_name_or_path": str(ROOT / "data/golden-tokenizer"),
            "top_k": 8,
            "tokens_per_batch": 200,
        },
        "prompts": {"path": str(home / "prompts.jsonl"), "validation_fraction": 0.2},
        "cache": {"out": "cache", "rows_per_shard": 50},
        "student": {"model_name_or_path": str(save_tiny_model(home / "tiny")), "lora": {"r": 2}},
        "training": {"output_dir": "run", "max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (home / "whole").mkdir()
    code, said = run(home / "whole", *COMMAND)
    assert code == 0, said
    return home


@pytest.fixture
def there(home, request):
    """A directory of the test's own beside the recipe."""
    there = home / request.node.name
    there.mkdir()
    return there


def assert_goes_on(there, home, kept=0):
    """Run again to the end: the bytes of an undisturbed run, and of `kept` answers none is asked for again."""
    before = len(calls(there))
    code, said = run(there, *COMMAND, prepare=(SlowTeacher(0),))
    assert code == 0, said
    assert files(there / "cache") == files(home / "whole/cache")
    assert sum(map(len, calls(there)[before:])) <= ROWS - kept


def last_line(there):
    return (there / "said").read_text(encoding="utf-8").splitlines()[-1]


def in_journal(cache):
    return sum(batch.num_rows for batch in Journal(cache / "journal", shard_schema(())).recover())


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_stage_one_and_says_how_to_go_on(number, there, home):
    process = start(there, *COMMAND, prepare=(SlowTeacher(0.05),))
    wait_for(lambda: len(calls(there)) >= 6, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert last_line(there) == f"bakery: stopped by {number.name}; {GO_ON}"
    assert_goes_on(there, home, kept=sum(map(len, calls(there)[:-2])))  # two calls at most were under way


def test_a_signal_does_not_wait_for_a_call_that_takes_its_time(there, home):
    process = start(there, *COMMAND, prepare=(SlowTeacher(600),))
    wait_for(lambda: bool(calls(there)), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert not (there / "cache").exists()


@dataclass(frozen=True)
class SignalInJournal:
    """In the process: SIGTERM comes just before answer number `nth` is written down."""

    nth: int

    def __call__(self):
        append, count = Journal.append, iter(range(1, 1000))

        def append_under_signal(journal, batch):
            if next(count) == self.nth:
                os.kill(os.getpid(), signal.SIGTERM)
            return append(journal, batch)

        Journal.append = append_under_signal


def test_a_flush_is_finished_before_a_signal_ends_the_run(there, home):
    code, said = run(there, *COMMAND, prepare=(SlowTeacher(0), SignalInJournal(3)))
    assert (code, said[-1]) == (143, f"bakery: stopped by SIGTERM; {GO_ON}")
    assert in_journal(there / "cache") == sum(map(len, calls(there)[:3]))
    assert_goes_on(there, home, kept=sum(map(len, calls(there)[:3])))


@pytest.fixture(scope="module")
def trained(home):
    """The adapter of a run that nobody disturbs."""
    code, said = run(home / "whole", *DISTILL)
    assert code == 0, said
    return load_file(home / "whole/run/adapter_model.safetensors")


def test_a_signal_ends_stage_two_with_a_checkpoint_of_its_last_step(there, trained):
    """Though the recipe saves none, and from there the run goes on to the same weights."""
    process = start(there, *DISTILL, prepare=(NotedSteps(0.3),))
    wait_for(lambda: len(steps(there)) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert last_line(there) == f"bakery: stopped by SIGTERM; {GO_ON}"
    [checkpoint] = (there / "run").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{steps(there)[-1]}"
    assert not (there / "run/metrics.json").exists()

    done = len(steps(there))
    code, said = run(there, *DISTILL, "--resume", prepare=(NotedSteps(0),))
    assert code == 0, said
    assert steps(there)[done:] == list(range(steps(there)[done - 1] + 1, STEPS + 1))
    ours = load_file(there / "run/adapter_model.safetensors")
    assert ours.keys() == trained.keys()
    assert all(torch.equal(ours[name], trained[name]) for name in trained)


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1_000, 6_000, 20_000])
def test_a_file_that_may_not_grow_ends_stage_one(largest, there, home):
    """The manifest does not fit, then the journal, early and late."""
    room = Limited(resource.RLIMIT_FSIZE, largest)
    code, said = run(there, *COMMAND, prepare=(SlowTeacher(0), room))
    assert code == 1
    assert said[-1].startswith("bakery: cache cannot be written: File too large; what was written before is kept, run")
    assert not [line for line in said if "Traceback" in line]
    kept = in_journal(there / "cache")
    assert (kept > 0) == (largest > 1_000)
    assert_goes_on(there, home, kept)


@pytest.mark.parametrize("largest", [2_000, 20_000])
def test_a_file_that_may_not_grow_ends_stage_two(largest, there, trained):
    """The adapter does not fit, then the optimizer; each library says it in its own way."""
    room = Limited(resource.RLIMIT_FSIZE, largest)
    code, said = run(
        there, *DISTILL, "--set", "training.save_strategy=steps", "--set", "training.save_steps=2", prepare=(room,)
    )
    assert code == 1
    assert said[-1].startswith("bakery: run cannot be written: ")
    assert not [line for line in said if "Traceback" in line]


def mounted(*options):
    return (
        shutil.which("mount") and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )


@pytest.fixture
def small_disk(there):
    """A real disk of 64 KiB for the cache, where this machine lets a test mount one."""
    (there / "cache").mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(there / "cache")):
        pytest.skip("no right to mount a disk")
    yield
    subprocess.run(["umount", str(there / "cache")], check=True)


def test_a_disk_that_is_full_ends_stage_one_and_with_room_it_goes_on(there, home, small_disk):
    code, said = run(there, *COMMAND, prepare=(SlowTeacher(0),))
    assert code == 1
    assert said[-1].startswith(
        "bakery: cache cannot be written: No space left on device; what was written before is kept"
    )
    kept = in_journal(there / "cache")
    assert kept > 0
    assert mounted("-o", "remount,size=4m", str(there / "cache"))
    assert_goes_on(there, home, kept)


def test_a_directory_that_cannot_be_made(there):
    """/sys takes no directory from anyone, root neither."""
    code, said = run(there, *COMMAND, "--out", "/sys/cache")
    assert code == 1
    assert said[-1].startswith("bakery: /sys/cache cannot be written: ")


def test_a_cache_of_more_shards_than_files_may_be_open(there):
    flags = ["--set", "cache.rows_per_shard=1", "--out", "many"]
    assert run(there, *COMMAND, *flags)[0] == 0
    assert len(list((there / "many/data").iterdir())) == ROWS
    code, said = run(there, "validate", "many", prepare=(Limited(resource.RLIMIT_NOFILE, 50),))
    assert (code, said) == (0, ["many: sound"])


# -- open files --------------------------------------------------------------------------------------------------------

EVALUATE = ("evaluate", "-c", "../recipe.yaml", "--set", "cache.out=../whole/cache", "--device", "cpu")
OUT_OF_FILES = "Too many open files (raise the limit: ulimit -n)"
ANSWER = "bakery.teachers.fake:FakeTeacher.score"
STEP = "bakery.student.trainer:TrainingProgress.on_step_end"


def out_of_files(home, name, frees, *argv, **few):
    """Run with as many files more than are open, until they are enough; the directories of the runs that had fewer,
    each of which ended in one line."""
    failed = []
    for free in frees:
        there = home / f"{name}-{free}"
        there.mkdir()
        code, said = run(there, *argv, prepare=(SlowTeacher(0), FewFiles(free, **few)))
        if code == 0:
            break
        assert (code, [line for line in said if line.startswith("bakery: ")]) == (1, said[-1:])
        assert OUT_OF_FILES in said[-1]
        assert not [line for line in said if "Traceback" in line]
        assert not list(there.rglob("*.tmp"))
        failed.append(there)
    print(f"\n{name}: {len(failed)} runs had too few files", end="")
    return failed


@pytest.mark.parametrize("nth", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in (0, 2, 7))])
def test_a_process_that_may_open_no_more_files_ends_stage_one(nth, home):
    """Before an answer is written down; 0: from the start."""
    failed = out_of_files(home, f"files-{nth}", range(8), *COMMAND, nth=nth, method=ANSWER)
    assert 0 < len(failed) < 8
    for there in failed:
        assert_goes_on(there, home, kept=in_journal(there / "cache"))


def test_validate_does_not_blame_a_cache_for_too_few_files(home):
    failed = out_of_files(home, "validate", range(8), "validate", "../whole/cache")
    assert 1 < len(failed) < 8
    assert validate(home / "whole/cache") == []


@pytest.mark.parametrize(
    ("nth", "frees"), [(2, [1]), *(pytest.param(n, range(8), marks=pytest.mark.soak) for n in (0, 2, 5))]
)
def test_a_process_that_may_open_no_more_files_ends_stage_two(nth, frees, home, trained):
    """From a step on, of which the second writes a checkpoint; the run goes on to the same weights."""
    flags = ("--set", "training.save_strategy=steps", "--set", "training.save_steps=2")
    failed = out_of_files(home, f"train-{nth}-{len(frees)}", frees, *DISTILL, *flags, nth=nth, method=STEP)
    assert 0 < len(failed) < 8
    for there in failed[-1:] if len(frees) < 8 else failed:
        code, said = run(there, *DISTILL, *flags, "--resume")
        assert code == 0, said
        ours = load_file(there / "run/adapter_model.safetensors")
        assert all(torch.equal(ours[name], trained[name]) for name in trained)


def test_a_process_that_may_open_no_more_files_ends_evaluate(home, trained):
    failed = out_of_files(home, "evaluate", range(3), *EVALUATE, "--set", "training.output_dir=../whole/run")
    assert len(failed) > 1


def test_nor_does_evaluate_take_a_checkpoint_for_damaged_that_it_may_not_open(home, trained):
    """From the last row on that the untrained student is judged by."""
    last, row = CacheReader(home / "whole/cache").rows("validation"), "bakery.student.dataset:CacheDataset.__getitem__"
    run_of = (*EVALUATE, "--set", "training.output_dir=../whole/run")
    failed = out_of_files(home, "evaluate-late", range(3), *run_of, nth=last, method=row)
    assert failed
    assert "safetensors" in (failed[0] / "said").read_text() or "whole/run" in (failed[0] / "said").read_text()


COMMANDS = [COMMAND, ("validate", "../whole/cache"), DISTILL, EVALUATE]
LIMITED = """
import resource, sys
import bakery.cli
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv.pop(1)), limits[1]))
bakery.cli.main()
"""


@pytest.mark.soak
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
def test_nor_is_there_a_traceback_where_modules_cannot_be_imported_any_more(argv, home, trained):
    """In a process that has imported the command line alone, as each does that a user starts."""
    for limit in range(3, 20):
        there = home / f"{argv[0]}-limit-{limit}"
        there.mkdir()
        command = [sys.executable, "-c", LIMITED, str(limit), *argv]
        if argv == EVALUATE:
            command += ["--set", "training.output_dir=../whole/run"]
        ended = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
        said = ended.stderr.splitlines()
        if ended.returncode == 0:
            break
        assert (ended.returncode, [line for line in said if line.startswith("bakery: ")]) == (1, said[-1:])
        assert OUT_OF_FILES in said[-1]
    assert 4 < limit < 19
    print(f"\n{argv[0]}: {limit - 3} processes had too few files", end="")


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_lost_device_ends_stage_one_and_what_was_answered_is_kept(home, tmp_path, monkeypatch):
    recipe = load_recipe(home / "recipe.yaml", [f"cache.out={tmp_path / 'cache'}"])
    asked, score = [], FakeTeacher.score

    def lost_at_the_third(teacher, contexts, *args):
        asked.append(len(contexts))
        if len(asked) >= 3:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")
        return score(teacher, contexts, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FakeTeacher, "score", lost_at_the_third)
        with pytest.raises(
            DeviceError, match=r"the device is lost \(CUDA error: unspecified launch failure\); what was"
        ):
            cache_teacher(recipe)
    assert in_journal(tmp_path / "cache") == sum(asked[:2])
    assert files(cache_teacher(recipe) / "data") == files(home / "whole/cache/data")


def test_a_student_that_does_not_fit_into_memory_names_the_setting(home, tmp_path, monkeypatch):
    recipe = load_recipe(
        home / "recipe.yaml", [f"caches=[{{path: {home}/whole/cache}}]", f"training.output_dir={tmp_path / 'run'}"]
    )
    monkeypatch.setattr(DistillTrainer, "compute_loss", lambda *args, **kwargs: torch.empty(10**15))
    with pytest.raises(
        DeviceError, match=r"DefaultCPUAllocator.*lower training\.per_device_train_batch_size and raise"
    ):
        distill(recipe, device="cpu")
