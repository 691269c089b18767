"""On-policy steps, whole: a tiny student writes, a tiny teacher scores, the run's own cache keeps what it said."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import torch
from test_stage_two import assert_same_weights, make_cache, metrics_of, prompts, recipe, weights

from bakery import stopping
from bakery.config import Recipe
from bakery.distillation import distill
from bakery.errors import CacheError, DataError, RecipeError, TeacherError
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.student.on_policy_cache import DIRECTORY
from bakery.student.trainer import DistillTrainer
from bakery.teachers.hf import HFTeacher

K = 32
ROWS_A_STEP = 6


@pytest.fixture(scope="module")
def cache(home, tiny_model):
    return make_cache(home / "cache", tiny_model, prompts(home / "rows.jsonl"), K)


def on_policy_recipe(cache, student, out, teacher, fraction, lag=0, backend="hf", **more):
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0}
    tree = recipe(cache, student, out, **(options | more)).model_dump(mode="json")
    tree["teacher"] = {"backend": backend, "model_name_or_path": str(teacher), "top_k": K, "dtype": "float32"}
    tree["on_policy"] = {"fraction": fraction, "max_new_tokens": 8, "lag": lag}
    return Recipe.model_validate(tree)


def run(*args, resume=False, **options):
    return distill(on_policy_recipe(*args, **options), device="cpu", resume=resume)


def contexts(record):
    return record.example.student_context.tolist(), record.example.teacher_context.tolist()


def history(out):
    [*_, last] = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


class Counting:
    """Stands before HFTeacher.score: counts the tokens scored, and goes away after `calls` of them."""

    def __init__(self, monkeypatch, calls=None):
        self.tokens = self.calls = 0
        real = HFTeacher.score

        def score(teacher, contexts, responses, targets, k):
            self.calls += 1
            if calls is not None and self.calls > calls:
                raise TeacherError("gone fishing")
            self.tokens += sum(map(len, responses))
            return real(teacher, contexts, responses, targets, k)

        monkeypatch.setattr(HFTeacher, "score", score)


def test_at_0_no_teacher_is_loaded(cache, student, home, monkeypatch):
    counting = Counting(monkeypatch)
    out = run(cache, student, home / "none", home / "no-such-model", 0.0)
    assert counting.calls == 0
    assert not (out / DIRECTORY).exists()


@pytest.fixture(scope="module")
def one_step(cache, student, home, tiny_model):
    return run(cache, student, home / "one", tiny_model, 1.0, max_steps=1)


def test_a_finished_run_with_on_policy_steps_is_not_taken_for_one_without(one_step, cache, student, tiny_model):
    with pytest.raises(RecipeError, match=r"was begun otherwise .*on_policy\.fraction: 1\.0 there, None here"):
        run(cache, student, one_step, tiny_model, 0.0, max_steps=1, resume=True)


def test_at_1_every_response_is_the_students(one_step, cache):
    records = list(CacheReader(one_step / DIRECTORY).records())
    assert validate(one_step / DIRECTORY) == []
    assert [record.origin for record in records] == ["student"] * ROWS_A_STEP
    asked = {
        r.example.student_context.tobytes(): r.example.teacher_context.tobytes() for r in CacheReader(cache).records()
    }
    for record in records:
        assert asked[record.example.student_context.tobytes()] == record.example.teacher_context.tobytes()
        assert record.example.is_target.all()


def test_the_teachers_distributions_are_of_its_own_context(one_step, tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for record in CacheReader(one_step / DIRECTORY).records():
        example = record.example
        ids = torch.as_tensor(np.concatenate([example.teacher_context, example.response])).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(example.teacher_context) - 1 : -1]
        expected = logits.log_softmax(-1)[
            torch.arange(len(example.response)), torch.tensor(example.response.astype(int))
        ]
        np.testing.assert_allclose(record.topk.token_logprob, expected, atol=2e-5)


def test_a_step_is_that_of_its_records_and_another_run_trains_on_them(one_step, student, home):
    """One batch of six from the on-policy cache, no accumulation: the same sum over the same number of targets."""
    again = run(
        one_step / DIRECTORY, student, home / "from-it", home / "none", 0.0,
        max_steps=1, per_device_train_batch_size=ROWS_A_STEP, gradient_accumulation_steps=1,
    )  # fmt: skip
    assert_same_weights(again, one_step)
    start = run(one_step / DIRECTORY, student, home / "start", home / "none", 0.0, max_steps=1, learning_rate=0.0)
    moved = max((tensor - weights(start)[name]).abs().max() for name, tensor in weights(one_step).items())
    assert moved > 1e-3


def test_half_of_the_steps_and_both_losses_are_logged(cache, student, home, tiny_model):
    out = run(cache, student, home / "half", tiny_model, 0.5, save_strategy="steps", save_steps=6)
    steps = [entry for entry in history(out) if "loss" in entry]
    kinds = [("on_policy/loss" in entry, "off_policy/loss" in entry) for entry in steps]
    assert kinds == [(False, True), (True, False)] * 3
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry.get("on_policy/loss", entry.get("off_policy/loss")), rel=1e-5)
    logged = steps[1]
    records = list(CacheReader(out / DIRECTORY).records())[:ROWS_A_STEP]
    assert logged["on_policy/response_tokens"] == pytest.approx(np.mean([len(r.example.response) for r in records]))
    assert logged["on_policy/truncated"] == pytest.approx(np.mean([r.example.response[-1] != 258 for r in records]))
    assert {"on_policy/teacher_seconds", "on_policy/student_tokens_per_second"} <= logged.keys()
    assert metrics_of(out)["train"]["on_policy/response_tokens"] > 0


LONG = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}


def assert_same_runs(ours, theirs):
    assert_same_weights(ours, theirs, atol=0)
    rows = [
        [(r.example.id, r.topk.logprobs.tobytes()) for r in CacheReader(o / DIRECTORY).records()]
        for o in (ours, theirs)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 20
    assert validate(ours / DIRECTORY) == []


def test_a_teacher_that_goes_away_stops_the_run_at_a_checkpoint_and_no_token_is_scored_twice(
    cache, student, home, tiny_model, monkeypatch
):
    whole = Counting(monkeypatch)
    unbroken = run(cache, student, home / "whole", tiny_model, 1.0, **LONG)
    monkeypatch.undo()

    broken, out = Counting(monkeypatch, calls=5), home / "broken"
    with pytest.raises(TeacherError, match=r"step \d+ stays unanswered .*gone fishing.*--resume"):
        run(cache, student, out, tiny_model, 1.0, **LONG)
    monkeypatch.undo()
    assert (out / "checkpoint-5").is_dir()
    assert not (out / "metrics.json").exists()
    rest = Counting(monkeypatch)
    run(cache, student, out, tiny_model, 1.0, resume=True, **LONG)
    assert broken.tokens + rest.tokens == whole.tokens
    assert_same_runs(out, unbroken)


@pytest.fixture(scope="module")
def unbroken_at(cache, student, home, tiny_model):
    """Of a lag: a run that nothing breaks, and the tokens that its teacher scored."""

    @functools.cache
    def of(lag):
        with pytest.MonkeyPatch.context() as patch:
            counting = Counting(patch)
            return run(cache, student, home / f"unbroken{lag}", tiny_model, 1.0, lag=lag, **LONG), counting.tokens

    return of


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_run_that_breaks_anywhere_goes_on_to_the_same_weights(
    step, lag, unbroken_at, cache, student, home, tiny_model, monkeypatch
):
    """What is ahead at a checkpoint was sampled from weights that are gone; its answers are on record."""
    unbroken, tokens = unbroken_at(lag)
    broken, real = Counting(monkeypatch), DistillTrainer.training_step

    def breaking(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", breaking)
    out = home / f"broken{step}-{lag}"
    with pytest.raises(KeyboardInterrupt):
        run(cache, student, out, tiny_model, 1.0, lag=lag, **LONG)
    monkeypatch.undo()
    rest = Counting(monkeypatch)
    run(cache, student, out, tiny_model, 1.0, lag=lag, resume=True, **LONG)
    assert broken.tokens + rest.tokens == tokens
    assert_same_runs(out, unbroken)


def test_a_signal_forgets_nothing_of_what_is_ahead(unbroken_at, cache, student, home, tiny_model, monkeypatch):
    """It ends the run as if the run were whole, at a step after which an answer is written down that waits its turn."""
    unbroken, tokens = unbroken_at(2)
    stopped, real = Counting(monkeypatch), DistillTrainer.training_step

    def signalled(trainer, *args, **kwargs):
        if trainer.state.global_step == 3 and not stopping.stopping():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", signalled)
    monkeypatch.setattr(stopping, "_signals", stopping._Signals())
    before, out = signal.signal(signal.SIGTERM, stopping._signals.on_signal), home / "signalled"
    try:
        with pytest.raises(stopping.Stopped):
            run(cache, student, out, tiny_model, 1.0, lag=2, **LONG)
    finally:
        signal.signal(signal.SIGTERM, before)
        monkeypatch.undo()
    rest = Counting(monkeypatch)
    run(cache, student, out, tiny_model, 1.0, lag=2, resume=True, **LONG)
    assert stopped.tokens + rest.tokens == tokens
    assert_same_runs(out, unbroken)


def test_lag_0_samples_from_the_weights_as_they_are_and_lag_1_from_those_of_a_step_before(
    cache, student, home, tiny_model, monkeypatch
):
    """With greedy sampling and steps that change much, what lag 1 writes at step 1 is what the fresh student writes."""
    from bakery.student import on_policy

    seen = []
    real = on_policy.sample_responses

    def watched(model, *args):
        seen.append(float(sum(p.detach().abs().sum() for n, p in model.named_parameters() if "lora_B" in n)))
        return real(model, *args)

    monkeypatch.setattr(on_policy, "sample_responses", watched)
    run(cache, student, home / "lag0", tiny_model, 1.0, lag=0, max_steps=3)
    strict, seen[:] = list(seen), []
    run(cache, student, home / "lag1", tiny_model, 1.0, lag=1, max_steps=3)
    assert strict[0] == 0 < strict[1]
    assert len({*strict}) == 3
    assert seen[:2] == [0, 0]
    assert seen[2] > 0
    assert len(seen) == 3


def test_local_toggle_is_the_base_itself(cache, student, home, monkeypatch):
    """The same weights as a teacher that is a copy of the base, though no copy is loaded."""
    from bakery.teachers import hf

    copy = run(cache, student, home / "copy", student, 1.0, num_train_epochs=1)
    monkeypatch.setattr(hf, "load_causal_lm", lambda *a, **k: pytest.fail("a second copy was loaded"))
    toggled = run(cache, student, home / "toggled", student, 1.0, backend="local_toggle", lag=1, num_train_epochs=1)
    strict = run(cache, student, home / "strict", student, 1.0, backend="local_toggle", num_train_epochs=1)
    assert_same_weights(strict, copy, atol=1e-6)
    assert weights(toggled).keys() == weights(copy).keys()
    info = CacheReader(strict / DIRECTORY).manifest.teacher
    assert (info.backend, info.dtype) == ("local_toggle", "float32")


def test_local_toggle_fills_a_cache_like_any_teacher(student, home):
    rows = prompts(home / "few.jsonl", 4)
    one = make_cache(home / "by-hf", student, rows)
    tree = {
        "teacher": {"backend": "local_toggle", "top_k": 32, "dtype": "float32", "device": "cpu"},
        "student": {"model_name_or_path": str(student)},
        "prompts": {"path": str(rows), "validation_fraction": 0.25, "prefix": {"text": "Answer as a baker."}},
        "cache": {"out": str(home / "by-toggle")},
    }
    from bakery.cache import cache_teacher

    other = cache_teacher(Recipe.model_validate(tree))
    for split in ("train",):
        for a, b in zip(CacheReader(one).records(split), CacheReader(other).records(split), strict=True):
            assert a.example.id == b.example.id
            assert a.topk.logprobs.tobytes() == b.topk.logprobs.tobytes()


def test_what_cannot_be_is_refused_before_anything_trains(cache, student, home, tiny_model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="local_toggle is the student with its adapters off"):
        on_policy_recipe(cache, student, out, student, 1.0, backend="local_toggle", lora=None)
    with pytest.raises(RecipeError, match=r"teacher.model_name_or_path is .*, student.model_name_or_path is"):
        on_policy_recipe(cache, student, out, tiny_model, 1.0, backend="local_toggle")
    tree = on_policy_recipe(cache, student, out, tiny_model, 0.5).model_dump(mode="json") | {"teacher": None}
    with pytest.raises(RecipeError, match="no `teacher:` section"):
        distill(Recipe.model_validate(tree), device="cpu")
    tree = on_policy_recipe(cache, student, out, tiny_model, 0.5).model_dump(mode="json")
    tree["on_policy"]["max_new_tokens"] = 500
    with pytest.raises(
        DataError, match=r"a context of \d+ tokens and on_policy.max_new_tokens of 500, the student takes 512"
    ):
        distill(Recipe.model_validate(tree), device="cpu")
    assert not out.exists()


@pytest.mark.parametrize("stage", ["new_trainer", "begin_run", "evaluate"])
def test_a_run_that_ends_before_it_trains_lets_go_of_its_teacher(
    stage, cache, student, home, tiny_model, tmp_path, monkeypatch
):
    teachers, opened = [], HFTeacher.open
    monkeypatch.setattr(HFTeacher, "open", lambda teacher: teachers.append(teacher) or opened(teacher))

    def broken(*args, **kwargs):
        assert "model" in vars(teachers[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bakery.distillation.{stage}", broken)
    with pytest.raises(KeyboardInterrupt):
        run(cache, student, tmp_path / "out", tiny_model, 1.0)
    assert "model" not in vars(teachers[0])


def test_a_teacher_that_cannot_be_asked_is_let_go_of(cache, student, tiny_model, tmp_path, monkeypatch):
    """Refused once it is open: a context and a response of 500 tokens are more than it takes."""
    closed, close = [], HFTeacher.close
    monkeypatch.setattr(HFTeacher, "close", lambda teacher: closed.append(teacher) or close(teacher))
    tree = on_policy_recipe(cache, student, tmp_path / "out", tiny_model, 0.5).model_dump(mode="json")
    tree["on_policy"]["max_new_tokens"] = 500
    with pytest.raises(DataError):
        distill(Recipe.model_validate(tree), device="cpu")
    assert len(closed) == 1


def test_a_teacher_of_another_tokenizer_is_refused(cache, student, home, tmp_path, smollm2):
    with pytest.raises(CacheError, match=r"was made with tokenizer .*…, the teacher .* has .*on_policy.fraction=0"):
        run(cache, student, tmp_path / "out", smollm2, 0.5)
    assert not (tmp_path / "out").exists()
