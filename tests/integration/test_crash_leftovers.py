"""What a crash leaves behind at an unlucky moment: found again, swept up, or refused by name; never in the way."""

import errno
import fcntl
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from caches_by_hand import bits, fill, identity, record, write_cache
from forked import processes
from safetensors.torch import load_file
from test_on_policy_run import LONG
from test_on_policy_run import run as run_on_policy
from test_stage_two import SAVING, make_cache, prompts, run, stop_at

from bakery import cache as stage_one
from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.errors import CacheError, OutputError
from bakery.shards.directory import locked
from bakery.shards.grid import EXACT
from bakery.shards.journal import Journal
from bakery.shards.manifest import Manifest
from bakery.shards.reader import CacheReader
from bakery.shards.schema import shard_schema, to_arrow
from bakery.shards.validate import validate
from bakery.shards.writer import CacheWriter
from bakery.student.on_policy_cache import DIRECTORY
from bakery.student.run_directory import is_whole
from bakery.teachers.fake import FakeTeacher
from bakery.teachers.hf import HFTeacher

RECORDS = [record(n) for n in range(9)]


class Crash(BaseException):
    pass


# -- caches ------------------------------------------------------------------------------------------------------------


def test_shards_that_other_prompts_want_no_more_are_swept(tmp_path, monkeypatch):
    """A crash between a shard and the manifest that lists it, and then a prompt was left out: its split has no row in
    that window, so nothing would write over the shard, and `data/validation-*.parquet` would find it."""
    out = tmp_path / "c"

    def crash(*args):
        raise Crash

    with CacheWriter.open_or_resume(out, identity(), {}) as writer:
        [window] = writer.windows([r.example for r in RECORDS])
        writer.add(RECORDS)
        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "save", crash)
            with pytest.raises(Crash):
                writer.publish(window, ["validation", *["train"] * 8])
    (out / "data/train-00007.parquet.tmp").write_bytes(b"PAR1")
    (out / "data/thesis.tex").write_text("years of work")
    with CacheWriter.open_or_resume(out, identity(prompts_sha="others"), {}, extend=True) as writer:
        fill(writer, RECORDS[1:])
    assert sorted(path.name for path in (out / "data").iterdir()) == ["thesis.tex", "train-00000.parquet"]
    (out / "data/thesis.tex").unlink()
    assert validate(out) == []
    assert [bits(r) for r in CacheReader(out).records()] == [bits(r) for r in RECORDS[1:]]


@contextmanager
def no_more_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_journal_that_cannot_be_read_now_is_not_taken_for_torn(tmp_path):
    """Or its answers would be asked for again, and it would be cleared with them in it."""
    with Journal(tmp_path / "journal", shard_schema(())) as journal:
        journal.append(to_arrow(RECORDS, EXACT, ()))
    again = Journal(tmp_path / "journal", shard_schema(()))
    assert again.recover()[0].num_rows == 9
    real = sorted((tmp_path / "journal").glob("*.arrows"))
    again.directory = type(
        "Listed", (), {"glob": lambda self, pattern: real}
    )()  # to list a directory takes a file, too
    with no_more_files(), pytest.raises(CacheError, match=r"00000.arrows: cannot be read: Too many open files"):
        again.recover()


def test_validate_has_nothing_against_an_extension_that_is_under_way(tmp_path):
    out = write_cache(tmp_path / "c", RECORDS[:4])
    with CacheWriter.open_or_resume(out, identity(prompts_sha="more"), {}, extend=True) as writer:
        [window] = writer.windows([r.example for r in RECORDS])
        writer.add(RECORDS[4:])
        writer.publish(window, ["train"] * 5)
        (out / "data/train-00002.parquet").write_bytes(b"a shard that is not listed yet")
        assert validate(out) == []
        (out / "data/train-00002.parquet").unlink()
        writer.finish()
    (out / "data/train-00002.parquet").write_bytes(b"")
    assert [problem.what for problem in validate(out)] == ["is in no manifest"]


def test_a_cache_that_grows_while_it_is_opened_is_no_run_of_either(tmp_path):
    """The checksum by which a run knows its cache again would be that of rows it never saw."""
    out = write_cache(tmp_path / "c", RECORDS[:4])
    reader = CacheReader(out)
    checksum = reader.verify()
    with CacheWriter.open_or_resume(out, identity(prompts_sha="more"), {}, extend=True) as writer:
        fill(writer, RECORDS)
    with pytest.raises(CacheError, match=r"c was changed while it was being opened; run the command again"):
        reader.verify()
    assert CacheReader(out).verify() != checksum


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "c").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match=r"c cannot be locked \(No locks available\), and two processes might"):
        CacheWriter.open_or_resume(tmp_path / "c", identity(), {})


def test_reuse_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    """Rows are taken over some at a time, so that another cache need not fit into memory."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n}?", "response": "Yes."}}\n' for n in range(30)))

    def recipe(out, k):
        teacher = {"backend": "fake", "model_name_or_path": "data/golden-tokenizer", "top_k": k}
        cache = {"out": str(tmp_path / out), "logprob_step": 0, "rows_per_shard": 20}
        tree = {"teacher": teacher, "prompts": {"path": str(tmp_path / "p.jsonl")}, "cache": cache}
        return Recipe.model_validate(tree)

    other = cache_teacher(recipe("other", 8))
    whole = cache_teacher(recipe("whole", 8))
    monkeypatch.setattr(stage_one, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(FakeTeacher, "score", lambda *args: pytest.fail("the teacher was asked"))
    add, sizes = CacheWriter.add, []

    def crash_at_the_third(writer, records):
        sizes.append(len(records))
        if len(sizes) == 3:
            raise Crash
        return add(writer, records)

    monkeypatch.setattr(CacheWriter, "add", crash_at_the_third)
    with pytest.raises(Crash):
        cache_teacher(recipe("mine", 8), reuse=[other])
    cache_teacher(recipe("mine", 8), reuse=[other])
    assert sizes == [7, 7, 7, 7, 7, 2]  # 14 of 30 were taken over already
    rows = [[bits(r) for r in CacheReader(out).records()] for out in (whole, tmp_path / "mine")]
    assert rows[0] == rows[1]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(home, tiny_model):
    return make_cache(home / "cache", tiny_model, prompts(home / "rows.jsonl"))


def same_weights(ours, theirs):
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def unbroken(home, cache, student):
    return run(cache, student, home / "unbroken", **SAVING)


@pytest.mark.parametrize("left", [b"", b'{"best_metric": nu'])
def test_a_checkpoint_whose_last_file_is_cut_short_is_passed_over(left, unbroken, cache, student, tmp_path):
    out = tmp_path / "run"
    stop_at(5, cache, student, out, **SAVING)
    assert is_whole(out / "checkpoint-4")
    (out / "checkpoint-4/trainer_state.json").write_bytes(left)
    (out / "checkpoint-4/optimizer.pt").write_bytes(b"")
    assert not is_whole(out / "checkpoint-4")
    run(cache, student, out, resume=True, **SAVING)
    assert same_weights(out, unbroken)


def test_a_whole_checkpoint_is_not_written_again(cache, student, tmp_path):
    """As where a teacher goes away right behind a checkpoint: a kill amid the second writing would leave a mixture."""
    out = tmp_path / "run"
    stop_at(3, cache, student, out, **SAVING)
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoint-2").iterdir()}
    from bakery.student.trainer import DistillTrainer

    real = DistillTrainer.training_step

    def save_first(trainer, *args, **kwargs):
        trainer._save_checkpoint(trainer.model, trial=None)
        return real(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", save_first)
        run(cache, student, out, resume=True, **SAVING)
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoint-2").iterdir()} == before
    assert is_whole(out / "checkpoint-3")


def test_a_run_that_was_killed_before_its_mark_stood_can_begin_again(unbroken, cache, student, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "bakery-run.json.tmp").write_bytes(b'{"bak')
    run(cache, student, out, **SAVING)
    assert same_weights(out, unbroken)


def test_overwriting_that_was_broken_off_is_finished_and_nothing_goes_on_from_its_remains(
    unbroken, cache, student, tmp_path, monkeypatch
):
    out = shutil.copytree(unbroken, tmp_path / "run")
    real, left = shutil.rmtree, []

    def crash(path, *args, **kwargs):
        (path / "trainer_state.json").unlink()
        left.append(path)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(Crash):
            run(cache, student, out, overwrite=True, **SAVING)
    assert left
    with pytest.raises(OutputError, match=r"bakery-run.json is not readable; pass --overwrite"):
        run(cache, student, out, resume=True, **SAVING)
    with pytest.raises(OutputError, match=r"an unfinished run"):
        run(cache, student, out, **SAVING)
    monkeypatch.setattr(shutil, "rmtree", real)
    run(cache, student, out, overwrite=True, **SAVING)
    assert same_weights(out, unbroken)


def hold(out, held, done):
    """In a process of its own: a run's directory, until told that it is done, or killed."""
    lock = locked(out)
    held.set()
    done.wait(60)
    assert lock


def test_two_runs_in_one_directory_are_one_too_many(unbroken, cache, student, tmp_path):
    """The second is told so, whatever its flags; the lock goes with the process that is killed."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    (out / "metrics.json").unlink()
    before = sorted(path.name for path in out.iterdir())
    held, done = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(out, held, done))
    other.start()
    assert held.wait(60)
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="run is being filled by another process"):
            run(cache, student, out, **flags, **SAVING)
    assert sorted(path.name for path in out.iterdir()) == before
    other.kill()
    other.join()
    run(cache, student, out, resume=True, **SAVING)
    assert same_weights(out, unbroken)


def test_a_run_broken_off_amid_the_answers_to_a_step_reaches_the_same_weights(
    cache, student, home, tiny_model, monkeypatch
):
    """What is drawn for a row depends on the rows beside it, so those whose answers are on record are drawn with the
    others again, and the teacher is asked in the calls of an unbroken run."""
    plan = HFTeacher.plan
    monkeypatch.setattr(HFTeacher, "plan", lambda *args: [call[i : i + 2] for call in plan(*args) for i in (0, 2, 4)])
    options = {"fraction": 1.0, **LONG}
    whole = run_on_policy(cache, student, home / "whole-steps", tiny_model, **options)
    score, calls = HFTeacher.score, []

    def crash_amid_a_step(teacher, *args):
        calls.append(len(args[0]))
        if len(calls) == 3 * 4 + 2:
            raise Crash
        return score(teacher, *args)

    out = home / "amid-a-step"
    with monkeypatch.context() as patch:
        patch.setattr(HFTeacher, "score", crash_amid_a_step)
        with pytest.raises(Crash):
            run_on_policy(cache, student, out, tiny_model, **options)
    run_on_policy(cache, student, out, tiny_model, resume=True, **options)
    assert same_weights(out, whole)
    rows = [[bits(r) for r in CacheReader(o / DIRECTORY).records()] for o in (out, whole)]
    assert rows[0] == rows[1]
