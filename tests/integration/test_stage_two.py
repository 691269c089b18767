"""Stage two, whole: a cache of a tiny teacher, a tiny student, a run directory. On the CPU, in seconds."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from builders import write_jsonl
from conftest import save_tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import bakery.reports.evaluate as evaluation
from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.distillation import distill
from bakery.errors import CacheError, DataError, OutputError, RecipeError
from bakery.losses import sparse_loss
from bakery.prompts.tokenizers import tokenizer_fingerprint
from bakery.reports.artifacts import read_samples
from bakery.reports.evaluate import evaluate
from bakery.shards.reader import CacheReader
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.trainer import TrainingProgress

WORDS = ("flour", "water", "salt", "yeast", "oven", "crust", "crumb", "dough", "rye", "bran", "malt", "seed")
PREFIX = "Answer as a baker."
LORA = {"r": 16, "lora_alpha": 64}
TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_steps": 1,
}


def prompts(path, count=24):
    """Questions and answers of many lengths."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{i} {WORDS[i % 12]}?", "response": " ".join(rng.choice(WORDS, 1 + i % 4))} for i in range(count)
    ]
    return write_jsonl(path, rows)


def make_cache(out, teacher, rows, top_k=32, prefix=PREFIX, **cache):
    recipe = {
        "teacher": {"model_name_or_path": str(teacher), "top_k": top_k, "dtype": "float32", "device": "cpu"},
        "prompts": {"path": str(rows), "validation_fraction": 0.25, "prefix": {"text": prefix} if prefix else None},
        "cache": {"out": str(out), **cache},
    }
    return cache_teacher(Recipe.model_validate(recipe))


@pytest.fixture(scope="module")
def rival(home):
    """A student that is not the teacher."""
    return save_tiny_model(home / "rival", seed=1)


@pytest.fixture(scope="module")
def rows(home):
    return prompts(home / "rows.jsonl")


@pytest.fixture(scope="module")
def cache(home, rows, tiny_model):
    return make_cache(home / "cache", tiny_model, rows, temperatures=[2.0])


@pytest.fixture(scope="module")
def small_vocabulary(home):
    """Models without padding, so that a support can be all there is."""
    return [save_tiny_model(home / f"exact{seed}", seed, vocab_size=259) for seed in (2, 3)]


@pytest.fixture(scope="module")
def whole_cache(home, rows, small_vocabulary):
    """Every log-prob of the teacher, to the bit."""
    return make_cache(home / "whole", small_vocabulary[0], rows, 259, logprob_step=0)


def recipe(cache, student, out, lora=LORA, loss=None, drop_layers=(), **training):
    caches = cache if isinstance(cache, list) else [{"path": str(cache)}]
    return Recipe.model_validate(
        {
            "caches": caches,
            "student": {"model_name_or_path": str(student), "lora": lora, "drop_layers": drop_layers},
            "loss": loss or {},
            "training": TRAINING | {"output_dir": str(out)} | training,
        }
    )


def run(*args, resume=False, overwrite=False, **options):
    return distill(recipe(*args, **options), device="cpu", resume=resume, overwrite=overwrite)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def weights(out):
    from safetensors.torch import load_file

    [file] = out.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(ours, theirs, atol=1e-6):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def lora_run(home, cache, rival):
    return run(cache, rival, home / "lora", eval_strategy="epoch")


@pytest.fixture(scope="module")
def full_run(home, cache, rival):
    return run(cache, rival, home / "full", lora=None)


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_adapter_and_tokenizer_load_with_what_the_ecosystem_has(lora_run, rival, cache):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(rival), lora_run)
    heldout = CacheDataset([(CacheReader(cache), 1.0)], "validation", 1.0)
    assert evaluate(model, heldout) == pytest.approx(metrics_of(lora_run)["heldout"]["after"], rel=1e-4)
    assert AutoTokenizer.from_pretrained(lora_run).get_vocab() == AutoTokenizer.from_pretrained(rival).get_vocab()


def test_a_full_model_loads_with_transformers(full_run, cache):
    model = AutoModelForCausalLM.from_pretrained(full_run)
    heldout = CacheDataset([(CacheReader(cache), 1.0)], "validation", 1.0)
    assert evaluate(model, heldout) == pytest.approx(metrics_of(full_run)["heldout"]["after"], rel=1e-4)
    assert not list(full_run.glob("pytorch_model*"))


@pytest.mark.parametrize("kind", ["lora_run", "full_run"])
def test_the_students_kl_falls(kind, request):
    heldout = metrics_of(request.getfixturevalue(kind))["heldout"]
    assert heldout["after"]["kl"] < 0.85 * heldout["before"]["kl"]


def test_metrics_schema(lora_run, cache):
    metrics = metrics_of(lora_run)
    assert set(metrics) == {"heldout", "train", "seconds"}
    assert set(metrics["heldout"]) - {"rows", "targets"} == {"before", "after"}
    for when in ("before", "after"):
        assert set(metrics["heldout"][when]) == {"kl", "perplexity", "top1_agreement"}
        assert all(isinstance(value, float) for value in metrics["heldout"][when].values())
    reader = CacheReader(cache)
    assert metrics["train"]["rows"] == reader.rows("train")
    assert metrics["train"]["steps"] == 2 * -(-reader.rows("train") // 6)
    assert metrics["heldout"]["rows"] == reader.rows("validation")
    assert metrics["heldout"]["targets"] == reader.targets("validation").sum()


def test_the_card_names_cache_teacher_and_loss(lora_run, cache, tiny_model, rival):
    card = (lora_run / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {rival}\nlibrary_name: peft\n")
    for named in (str(cache), str(tiny_model), "forward_kl", "tail_bucket", "top-32"):
        assert named in card
    after = metrics_of(lora_run)["heldout"]["after"]
    assert f"{after['kl']:.3f}" in card


def test_the_curve_is_a_picture_and_the_page_needs_no_network(lora_run):
    from matplotlib.image import imread

    picture = imread(lora_run / "loss.png")
    assert picture.std() > 0.01  # something is drawn
    page = (lora_run / "report.html").read_text()
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", page)
    assert "data:image/png;base64," in page


def test_samples_are_held_out_prompts(lora_run, cache, rows):
    samples = read_samples(lora_run)
    asked = {s.prompt for s in samples}
    assert len(asked) == len(samples) == 3
    lines = rows.read_text().splitlines()
    assert asked <= {json.loads(line)["prompt"] for line in lines}
    heldout = [record.example.student_context.tolist() for record in CacheReader(cache).records("validation")]
    tokenizer = AutoTokenizer.from_pretrained(lora_run)
    assert all(any(s.prompt in tokenizer.decode(context) for context in heldout) for s in samples)


@pytest.mark.parametrize("batch_size", [64, 2])
def test_the_trainers_held_out_loss_is_the_kl_of_the_metrics(batch_size, home, cache, rival, monkeypatch):
    """However it is cut into batches, with forward KL on the tail bucket at temperature 1."""
    logs = []
    monkeypatch.setattr(
        TrainingProgress, "on_evaluate", lambda self, *a, metrics, **kw: logs.append(metrics), raising=False
    )
    one = {"eval_strategy": "epoch", "num_train_epochs": 1, "per_device_eval_batch_size": batch_size}
    out = run(cache, rival, home / f"judged-{batch_size}", **one)
    assert logs[-1]["eval_loss"] == pytest.approx(metrics_of(out)["heldout"]["after"]["kl"], rel=1e-4)


# -- the same run again, and after a stop ----------------------------------------------------------------------------


def test_the_same_recipe_gives_the_same_weights(home, lora_run, cache, rival):
    torch.manual_seed(99)  # whatever ran before
    again = run(cache, rival, home / "again", eval_strategy="epoch")
    assert_same_weights(again, lora_run, atol=0)


def test_another_seed_gives_other_weights(home, full_run, cache, rival):
    """The order of the rows, here; of LoRA, the adapter's start as well."""
    other = run(cache, rival, home / "seed", lora=None, seed=7)
    assert (weights(other)["lm_head.weight"] - weights(full_run)["lm_head.weight"]).abs().max() > 1e-4


class StoppedError(Exception):
    pass


def steps_taken(monkeypatch, stop=None):
    """The optimizer steps as they end; at `stop` a kill, before anything of that step is saved."""
    taken = []

    def on_step_end(self, args, state, control, **kwargs):
        taken.append(state.global_step)
        if state.global_step == stop:
            raise StoppedError

    monkeypatch.setattr(TrainingProgress, "on_step_end", on_step_end)
    return taken


def stop_at(step, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        steps_taken(patch, step)
        with pytest.raises(StoppedError):
            run(*args, **options)


SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module", params=["lora", "full"])
def unbroken(request, home, cache, rival):
    lora = LORA if request.param == "lora" else None
    torch.manual_seed(0)
    return run(cache, rival, home / f"unbroken-{request.param}", lora=lora, **SAVING), lora


@pytest.mark.parametrize("stop", [5, 7])
def test_a_stopped_run_goes_on_to_the_same_weights(stop, unbroken, tmp_path, cache, rival, monkeypatch):
    expected, lora = unbroken
    out = tmp_path / "run"
    torch.manual_seed(0)
    stop_at(stop, cache, rival, out, lora=lora, **SAVING)
    assert not (out / "metrics.json").exists()
    torch.manual_seed(1)
    taken = steps_taken(monkeypatch)
    run(cache, rival, out, lora=lora, resume=True, **SAVING)
    steps = metrics_of(expected)["train"]["steps"]
    assert taken == list(range(stop, steps + 1))  # `stop` is odd, and the step before it was saved
    assert_same_weights(out, expected)
    ours, theirs = (metrics_of(path)["train"] for path in (out, expected))
    assert ours == theirs  # the loss is that of all steps, not of those since
    for when in ("before", "after"):
        ours, theirs = (metrics_of(path)["heldout"][when] for path in (out, expected))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_finished_run_of_another_recipe_is_refused(unbroken, cache, rival):
    out, lora = unbroken
    run(cache, rival, out, lora=lora, resume=True, **SAVING)  # nothing to do
    with pytest.raises(RecipeError, match=r"was begun otherwise \(.*learning_rate"):
        run(cache, rival, out, lora=lora, resume=True, **{**SAVING, "learning_rate": 0.125})


def test_a_checkpoint_torn_by_a_kill_is_passed_over(unbroken, tmp_path, cache, rival):
    """The state is the last file of a checkpoint: without it the save was cut short, and the one before is whole."""
    expected, lora = unbroken
    out = tmp_path / "run"
    torch.manual_seed(0)
    stop_at(5, cache, rival, out, lora=lora, **SAVING)
    (out / "checkpoint-4/trainer_state.json").unlink()
    (out / "checkpoint-4/optimizer.pt").unlink()
    run(cache, rival, out, lora=lora, resume=True, **SAVING)
    assert_same_weights(out, expected)


def test_a_stopped_run_of_batches_of_like_length_goes_on_to_the_same_weights(tmp_path, cache, rival):
    """And evaluates on the way, in the order of the rows. The loss of the run is the same however seldom it is logged,
    and whoever loads the sum of it."""
    grouped = SAVING | {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "logging_steps": 3}
    grouped |= {"restore_callback_states_from_checkpoint": True}
    expected = run(cache, rival, tmp_path / "unbroken", lora=None, **grouped)
    stop_at(7, cache, rival, tmp_path / "run", lora=None, **grouped)
    run(cache, rival, tmp_path / "run", lora=None, resume=True, **grouped)
    assert_same_weights(tmp_path / "run", expected)
    assert metrics_of(tmp_path / "run")["train"]["loss"] == metrics_of(expected)["train"]["loss"]


def test_batches_for_several_processes_are_refused(cache, rival, out):
    with pytest.raises(RecipeError, match=r"batch_rebalance .* group_by_length saves padding"):
        run(cache, rival, out, train_sampling_strategy="batch_rebalance")
    assert not out.exists()


def test_resume_before_the_first_checkpoint_begins_again(unbroken, tmp_path, cache, rival):
    expected, lora = unbroken
    torch.manual_seed(0)
    stop_at(1, cache, rival, tmp_path / "run", lora=lora, **SAVING)
    torch.manual_seed(0)
    run(cache, rival, tmp_path / "run", lora=lora, resume=True, **SAVING)
    assert_same_weights(tmp_path / "run", expected)


def test_resuming_a_finished_run_leaves_it_as_it_is(full_run, cache, rival):
    before = {p: p.stat().st_mtime_ns for p in full_run.glob("*.safetensors")}
    run(cache, rival, full_run, lora=None, resume=True)
    assert {p: p.stat().st_mtime_ns for p in full_run.glob("*.safetensors")} == before


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_another_tokenizer(cache, rival, tmp_path, out):
    student = tmp_path / "foreign"
    shutil.copytree(rival, student)
    tokenizer = AutoTokenizer.from_pretrained(rival)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(student)
    there, here = CacheReader(cache).manifest.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)
    with pytest.raises(CacheError, match=rf"{there[:12]}.*foreign.*{here[:12]}.*(--student|re-run)"):
        run(cache, student, out)
    assert not out.exists()


def test_a_smaller_vocabulary(cache, tmp_path, out):
    student = save_tiny_model(tmp_path / "few", vocab_size=258, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    with pytest.raises(CacheError, match=r"258.*258 rows"):
        run(cache, student, out)
    assert not out.exists()


def test_a_temperature_that_the_cache_lists_not(cache, rival, out):
    with pytest.raises(RecipeError, match=r"temperature is 3\.0.*\[2\.0\].*cache\.temperatures.*renormalized"):
        run(cache, rival, out, loss={"temperature": 3.0})
    assert not out.exists()


def test_a_temperature_that_only_a_whole_vocabulary_could_give(home, rows, tiny_model, rival, out):
    """All 259 tokens are stored, but the output has 264 rows: what lies in the other five is not known at T = 2."""
    all_tokens = make_cache(home / "tokens", tiny_model, rows, top_k=259)
    with pytest.raises(RecipeError, match=r"temperature"):
        run(all_tokens, rival, out, loss={"temperature": 2.0})
    assert not out.exists()


def test_rows_longer_than_the_student_can_read(cache, tmp_path, out):
    with pytest.raises(DataError, match=r"tokens, the student .* takes 40"):
        run(cache, save_tiny_model(tmp_path / "short", max_position_embeddings=40), out)
    assert not out.exists()


def test_a_layer_that_the_student_has_not(cache, rival, out):
    with pytest.raises(RecipeError, match="layer 3"):
        run(cache, rival, out, lora=None, drop_layers=[3])
    assert not out.exists()


def test_a_cache_that_is_none(rival, tmp_path, out):
    with pytest.raises(CacheError, match="no finished bakery cache"):
        run(tmp_path, rival, out)
    assert not out.exists()


def test_a_finished_run_stays_until_overwritten(cache, rival, home):
    mine = run(cache, rival, home / "short", num_train_epochs=1, max_steps=1)
    before = weights(mine)
    with pytest.raises(OutputError, match=r"finished run.*--overwrite"):
        run(cache, rival, mine, num_train_epochs=1, max_steps=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(mine).items())
    run(cache, rival, mine, num_train_epochs=1, max_steps=2, overwrite=True)
    assert metrics_of(mine)["train"]["steps"] == 2


def test_a_refused_recipe_does_not_take_the_run_that_overwrite_would_replace(cache, rival, full_run):
    files = sorted(p.name for p in full_run.iterdir())
    with pytest.raises(RecipeError):
        run(cache, rival, full_run, lora=None, loss={"temperature": 3.0}, overwrite=True)
    assert sorted(p.name for p in full_run.iterdir()) == files


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_directory_that_holds_something_else(flags, cache, rival, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        run(cache, rival, out, **flags)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_says_how_to_go_on_and_takes_no_other_recipe(cache, rival, out):
    stop_at(1, cache, rival, out)
    with pytest.raises(OutputError, match=r"unfinished run.*--resume"):
        run(cache, rival, out)
    with pytest.raises(RecipeError, match=r"learning_rate: 0\.01 there, 0\.5 here"):
        run(cache, rival, out, resume=True, learning_rate=0.5)


def test_a_run_goes_on_only_with_the_cache_and_the_student_it_began_with(rows, tiny_model, rival, tmp_path, out):
    """Not with others that have come to stand under the same names."""
    mine, student = tmp_path / "cache", tmp_path / "student"
    shutil.copytree(rival, student)
    make_cache(mine, tiny_model, rows)
    stop_at(1, mine, student, out)
    shutil.rmtree(mine)
    make_cache(mine, tiny_model, rows, prefix="Answer as a miller.")
    with pytest.raises(RecipeError, match=rf"{mine}.*there"):
        run(mine, student, out, resume=True)
    shutil.rmtree(mine)
    make_cache(mine, tiny_model, rows)
    shutil.rmtree(student)
    save_tiny_model(student, seed=5)
    with pytest.raises(RecipeError, match=r"begun.*student_fingerprint") as refused:
        run(mine, student, out, resume=True)
    assert str(mine) not in str(refused.value)


# -- several caches --------------------------------------------------------------------------------------------------


def test_two_caches_with_weights(home, cache, rival, tiny_model, out):
    second = make_cache(home / "second", tiny_model, prompts(home / "more.jsonl", 9), prefix="Be brief.")
    sources = [{"path": str(cache), "weight": 2}, {"path": str(second), "weight": 0.5}]
    run(sources, rival, out, num_train_epochs=1)
    a, b = CacheReader(cache).rows("train"), CacheReader(second).rows("train")
    assert metrics_of(out)["train"]["rows"] == 2 * a + round(b / 2)
    # Weights are for training: what is measured is each held-out row, once.
    held_out = [CacheReader(path).rows("validation") for path in (cache, second)]
    assert metrics_of(out)["heldout"]["rows"] == sum(held_out)
    card = (out / "README.md").read_text()
    assert f"{cache}, top-32" in card
    assert re.search(rf"{second}.*weight 0\.5", card)


def test_training_rows_and_held_out_rows_are_disjoint(home, tiny_model):
    """By prompt: several answers to one question never fall on both sides."""
    twice = write_jsonl(
        home / "twice.jsonl",
        [{"prompt": f"{w} {i % 2}?", "response": f"{i} {w}"} for w in WORDS for i in range(4)],
    )
    reader = CacheReader(make_cache(home / "twice", tiny_model, twice))
    asked = {
        split: Counter(record.example.student_context.tobytes() for record in reader.records(split))
        for split in ("train", "validation")
    }
    assert asked["train"]
    assert asked["validation"]
    assert not set(asked["train"]) & set(asked["validation"])
    assert set((asked["train"] + asked["validation"]).values()) == {2}


# -- numbers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense(path, contexts_and_records):
    """Full log-softmax at the targets, one record at a time. [(logits [N,V], labels [N])]"""
    model, rows = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for context, record in contexts_and_records:
        response = record.example.response
        ids = torch.tensor(np.concatenate([context, response])).long()
        logits = model(input_ids=ids[None]).logits[0, len(context) - 1 : -1]
        mask = torch.tensor(record.example.is_target)
        rows.append((logits[mask], torch.tensor(response).long()[mask]))
    return rows


def both_sides(models, reader, split="validation"):
    """(teacher logits, student logits, labels) over all targets of a split, each behind its own context."""
    records = list(reader.records(split))
    teacher = dense(models[0], [(r.example.teacher_context, r) for r in records])
    student = dense(models[1], [(r.example.student_context, r) for r in records])
    return torch.cat([t for t, _ in teacher]), torch.cat([s for s, _ in student]), torch.cat([y for _, y in student])


def dense_kl(teacher, student, temperature=1.0):
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_measures_are_the_dense_ones_where_the_support_is_all_there_is(small_vocabulary, whole_cache, monkeypatch):
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 100)  # several batches
    reader = CacheReader(whole_cache)
    teacher, student, labels = both_sides(small_vocabulary, reader)
    model = AutoModelForCausalLM.from_pretrained(small_vocabulary[1])
    measures = evaluate(model, CacheDataset([(reader, 1.0)], "validation", 1.0))
    assert measures["kl"] == pytest.approx(float(dense_kl(teacher, student).mean()), rel=1e-4)
    nll = -student.log_softmax(-1).gather(1, labels[:, None]).mean()
    assert measures["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)
    agreement = (teacher.argmax(-1) == student.argmax(-1)).float().mean()
    assert measures["top1_agreement"] == pytest.approx(float(agreement), abs=1e-6)


def test_a_smaller_support_measures_less(home, rows, small_vocabulary, whole_cache):
    reader = CacheReader(whole_cache)
    teacher, student, _ = both_sides(small_vocabulary, reader)
    full = float(dense_kl(teacher, student).mean())
    model = AutoModelForCausalLM.from_pretrained(small_vocabulary[1])
    kls = []
    for k in (4, 32):
        path = make_cache(home / f"top{k}", small_vocabulary[0], rows, k, logprob_step=0)
        kls.append(evaluate(model, CacheDataset([(CacheReader(path), 1.0)], "validation", 1.0))["kl"])
    assert 0 < kls[0] < kls[1] < full


def test_measuring_leaves_the_model_in_its_mode(small_vocabulary, whole_cache):
    model = AutoModelForCausalLM.from_pretrained(small_vocabulary[1]).train()
    heldout = CacheDataset([(CacheReader(whole_cache), 1.0)], "validation", 1.0)
    evaluate(model, heldout)
    assert model.training
    evaluate(model.eval(), heldout)
    assert not model.training


@pytest.mark.parametrize(("k", "step"), [(16, 0), (16, 1 / 64), (259, 0)])
def test_temperature_2_is_below_the_dense_kl_and_equal_where_all_is_stored(k, step, home, rows, small_vocabulary):
    path = make_cache(home / f"warm-{k}-{step}", small_vocabulary[0], rows, k, logprob_step=step, temperatures=[2.0])
    reader = CacheReader(path)
    teacher, student, _ = both_sides(small_vocabulary, reader)
    full = dense_kl(teacher, student, 2.0)
    data = CacheDataset([(reader, 1.0)], "validation", 2.0)
    batch = collate([data[i] for i in range(len(data))])
    ours = sparse_loss(
        student,
        batch["topk_ids"],
        batch["topk_logprobs"],
        tail_logprob_N=batch["tail_logprob"],
        log_norm_N=batch["log_norm"],
        temperature=2.0,
    )
    slack = 0.02 if step else 1e-5  # a rounded support is half a step off
    if k == 259:
        torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)
    else:
        assert (ours <= full + slack).all()
        assert float(ours.mean()) > 0.1 * float(full.mean())
        assert float(ours.mean()) < float(full.mean())


def test_temperature_2_trains_on_the_tail_bucket(cache, rival, out):
    loss = {"temperature": 2.0, "support": "tail_bucket"}
    run(cache, rival, out, loss=loss, num_train_epochs=3)
    metrics = metrics_of(out)
    assert metrics["train"]["last_loss"] < 0.95 * metrics["train"]["loss"]
    assert metrics["heldout"]["after"]["kl"] < metrics["heldout"]["before"]["kl"]
    assert "temperature 2.0" in (out / "README.md").read_text()
