"""`support: sampled` from the command line to a student: what is drawn, kept, refused, trained on and measured."""

import json
import logging
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import write_jsonl
from caches_by_hand import bits, edit_manifest, trust
from conftest import save_tiny_model
from test_on_policy_run import on_policy_recipe
from test_stage_two import make_cache, metrics_of, prompts
from test_stage_two import recipe as run_recipe

from bakery.cache import cache_teacher
from bakery.cli import main
from bakery.config import Recipe
from bakery.distillation import check_before_teacher, distill
from bakery.errors import CacheError, RecipeError, TeacherError
from bakery.estimate import estimate
from bakery.prompts.tokenizers import load_tokenizer
from bakery.shards.merge import merge
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.teachers.fake import FakeTeacher

TINY = "data/golden-tokenizer"
DRAWS = 20
SHARD = "data/train-00000.parquet"
WRITE = {"sampling": {"max_new_tokens": 7, "n": 2}}
SAMPLED = {"support": "sampled", "draws": DRAWS}


@pytest.fixture
def recipe(tmp_path):
    def recipe(numbers=range(12), **sections) -> Recipe:
        rows = [{"prompt": f"Is it {n}?", "response": "It is " + "so " * (n % 5) + f"{n}."} for n in numbers]
        write_jsonl(tmp_path / "p.jsonl", rows)
        tree = {
            "teacher": {"backend": "fake", "model_name_or_path": TINY, **SAMPLED},
            "prompts": {"path": str(tmp_path / "p.jsonl"), "prefix": {"text": "Bake."}},
            "cache": {"out": str(tmp_path / "cache"), "rows_per_shard": 5},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return Recipe.model_validate(tree)

    return recipe


def shards(out):
    return {p.name: p.read_bytes() for p in sorted((out / "data").iterdir())}


# -- stage one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [{}, WRITE], ids=["score", "write"])
def test_a_sampled_cache_holds_what_the_teacher_drew(recipe, sections):
    """Stored, checked, and read back as counts of the draws of the teacher's own numbers."""
    out = cache_teacher(recipe(**sections))
    assert validate(out) == []
    reader = CacheReader(out)
    known = reader.manifest
    assert (known.draws, known.k, known.logprob_step, known.temperatures) == (DRAWS, DRAWS, 0, ())
    teacher = FakeTeacher(recipe().teacher, load_tokenizer(TINY))
    for record in reader.records():
        topk, example = record.topk, record.example
        counts = np.exp(topk.logprobs.astype(float)) * DRAWS
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-5)
        assert topk.sum_over_support(np.round(counts)).tolist() == [DRAWS] * len(topk)
        if not sections:
            [again] = teacher.score([example.teacher_context], [example.response], [example.is_target], DRAWS)
            assert bits(record) == bits(type(record)(example, again, "dataset"))
    assert f"{DRAWS} draws at each target" in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "manifest.json").read_text())["draws"] == DRAWS


@pytest.mark.parametrize("sections", [{}, WRITE], ids=["score", "write"])
def test_neither_batches_nor_parts_nor_interruptions_change_a_byte(recipe, tmp_path, sections, monkeypatch):
    def made(name, tokens=4096, **options):
        cache = {"out": str(tmp_path / name), "rows_per_shard": 5}
        return cache_teacher(recipe(teacher={"tokens_per_batch": tokens}, cache=cache, **sections), **options)

    whole = shards(made("whole"))
    assert shards(made("single", tokens=1)) == whole
    parts = [made("parts", part=(i, 2)) for i in range(2)]
    assert shards(merge(parts, tmp_path / "merged")) == whole

    method, calls = "generate" if sections else "score", []
    real = getattr(FakeTeacher, method)

    def broken(self, contexts, *args):
        calls.append(len(contexts))
        if len(calls) > 3:
            raise TeacherError("gone")
        return real(self, contexts, *args)

    monkeypatch.setattr(FakeTeacher, method, broken)
    with pytest.raises(TeacherError, match="unanswered"):
        made("resumed", tokens=150)
    monkeypatch.undo()
    assert 0 < sum(calls[:3]) < 12
    assert shards(made("resumed", tokens=150)) == whole


def test_a_top_k_cache_says_nothing_of_draws(recipe):
    out = cache_teacher(recipe(teacher={"support": "topk", "draws": None}))
    assert "draws" not in json.loads((out / "manifest.json").read_text())


def test_a_dry_run_tells_draws_and_entries(recipe, capsys):
    from bakery.reports.estimate_table import print_estimate

    found = estimate(recipe(range(3)))
    [at] = found.at_k
    out = cache_teacher(recipe(range(3)))
    records = list(CacheReader(out).records())
    sizes = np.concatenate([record.topk.support_size for record in records])
    assert (at.k, at.captured_mass, at.entries) == (DRAWS, None, pytest.approx(sizes.mean()))
    print_estimate(found, writes=False)
    said = capsys.readouterr().out
    assert f"at {DRAWS} draws a target" in said
    assert "draws" in said.partition("From the sample")[2]


def test_reuse_takes_over_equal_draws_and_no_others(recipe, tmp_path, monkeypatch):
    other = cache_teacher(recipe(cache={"out": str(tmp_path / "other")}))
    monkeypatch.setattr(FakeTeacher, "score", None)  # asked for nothing
    out = cache_teacher(recipe(), reuse=[other])
    assert shards(out) == shards(other)
    for change, here in (
        ({"draws": 30}, "samples of 30 draws"),
        ({"support": "topk", "draws": None}, "a top-k"),
    ):
        wanted = recipe(teacher=change, cache={"out": str(tmp_path / "new")})
        with pytest.raises(CacheError, match=f"it holds samples of {DRAWS} draws, this recipe wants {here}"):
            cache_teacher(wanted, reuse=[other])


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("topk_logprobs", lambda x: [x[0] + 0.01, *x[1:]], "target 0: a log-prob that is of no count of 20 draws"),
        ("topk_logprobs", lambda x: [*x[:-1], -40.0], "a log-prob that is of no count of 20 draws"),
        ("tail_logprob", lambda x: [-np.inf, *x[1:]], "target 0: a mean log-prob of draws that is not finite"),
    ],
)
def test_validate_finds_what_is_no_sample(recipe, column, change, says):
    out = cache_teacher(recipe())
    table = pq.read_table(out / SHARD)
    values, at = table.column(column).to_pylist(), table.schema.names.index(column)
    values[2] = change(values[2])

    field = table.schema.field(column)
    pq.write_table(table.set_column(at, field, pa.array(values, field.type)), out / SHARD)
    trust(out, SHARD)
    [problem] = validate(out)
    assert (problem.file, problem.row) == (SHARD, 2)
    assert says in problem.what


def test_validate_finds_another_number_of_draws(recipe):
    out = cache_teacher(recipe())
    edit_manifest(out, lambda tree: tree.update(draws=DRAWS + 1, k=DRAWS + 1))
    assert {p.what.partition(": ")[2] for p in validate(out)} >= {"a log-prob that is of no count of 21 draws"}
    edit_manifest(out, lambda tree: tree.update(draws=DRAWS))
    [problem] = validate(out)
    assert "a sample of 20 draws at a top_mass, logprob_step, temperatures and k of (None, 0.0, (), 21)" in problem.what


# -- refused before anything is paid for -------------------------------------------------------------------------------

API = {"base_url": "http://127.0.0.1:9", "model": "m"}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"cache": {"temperatures": [2.0]}}, r"temperatures \[2.0\] beside teacher.support sampled.*leave it empty"),
        ({"teacher": {"backend": "openai", "api": API}}, "a server tells its most likely tokens.*or backend hf"),
        ({"teacher": {"backend": "openai", "api": API | {"endpoint": "chat"}}}, "a server tells its most likely"),
    ],
)
def test_who_cannot_draw_is_refused_when_it_is_described(recipe, sections, says, tmp_path):
    with pytest.raises(RecipeError, match=says):
        cache_teacher(recipe(**sections))
    assert not (tmp_path / "cache").exists()


def test_vllm_cannot_draw(recipe, tiny_model):
    with pytest.raises(RecipeError, match=r"vLLM tells its most likely tokens.*or backend hf"):
        cache_teacher(recipe(teacher={"backend": "vllm", "model_name_or_path": str(tiny_model)}))


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"top_mass": 0.9}, "`top_mass` would cut a sample"),
        ({"support": "topk"}, "`draws` belongs to support sampled, and to no other"),
        ({"draws": None}, "`draws` belongs to support sampled, and to no other"),
        ({"draws": 5000}, "less than or equal to 4096"),
        ({"support": "top"}, "'topk' or 'sampled'"),
    ],
)
def test_sections_that_do_not_go_together(recipe, teacher, says):
    with pytest.raises(ValueError, match=says):
        recipe(teacher=teacher)


def test_fifty_draws_unless_told(recipe):
    teacher = {"backend": "fake", "model_name_or_path": TINY, "support": "sampled"}
    read = Recipe.model_validate({"teacher": teacher})
    assert read.teacher.draws == read.teacher.entries == 50
    assert Recipe.model_validate(read.model_dump(mode="json")) == read


def test_flags_of_the_command_line(recipe, tmp_path, monkeypatch, capsys):

    tree = recipe(range(4)).model_dump(mode="json", include={"teacher", "prompts", "cache"})
    tree["teacher"] |= {"support": "topk", "draws": None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    log, handlers = logging.getLogger("bakery"), logging.getLogger("bakery").handlers[:]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bakery", "cache-teacher", "-c", str(tmp_path / "r.yaml"), *flags])
        with pytest.raises(SystemExit) as stopped:
            main()
        log.handlers[:] = handlers
        return stopped.value.code or 0

    assert run("--draws", "7") == 2
    assert "`draws` belongs to support sampled" in capsys.readouterr().err
    assert run("--support", "sampled", "--draws", "7", "--out", str(tmp_path / "flagged")) == 0
    assert CacheReader(tmp_path / "flagged").manifest.draws == 7


# -- stage two ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(home):
    return save_tiny_model(home / "student", seed=3, vocab_size=259)


@pytest.fixture(scope="module")
def teacher(home):
    """Without padding, so that the whole vocabulary can be a support."""
    return save_tiny_model(home / "teacher", seed=2, vocab_size=259)


@pytest.fixture(scope="module")
def caches(home, teacher):
    """Draws, and every log-prob there is, of the same teacher for the same rows."""
    rows = prompts(home / "rows.jsonl", 48)
    whole = make_cache(home / "whole", teacher, rows, 259, logprob_step=0)
    tree = {
        "teacher": {"model_name_or_path": str(teacher), "dtype": "float32", "device": "cpu", "support": "sampled"},
        "prompts": {"path": str(rows), "validation_fraction": 0.25, "prefix": {"text": "Answer as a baker."}},
        "cache": {"out": str(home / "drawn")},
    }
    return cache_teacher(Recipe.model_validate(tree)), whole


def test_a_student_of_draws_is_measured_against_the_whole_distribution(caches, student, home):
    """The held-out KL of 50 draws is the exact one within its noise, before training and after."""
    measured = {}
    for cache, support in zip(caches, ("sampled", "tail_bucket"), strict=True):
        out = home / f"run-{support}"
        distill(run_recipe(cache, student, out, loss={"support": support}, num_train_epochs=1), device="cpu")
        measured[support] = metrics_of(out)["heldout"]
    drawn, exact = measured["sampled"], measured["tail_bucket"]
    assert drawn["targets"] == exact["targets"] > 100
    assert drawn["before"]["kl"] == pytest.approx(exact["before"]["kl"], rel=0.05)
    assert drawn["before"]["perplexity"] == pytest.approx(exact["before"]["perplexity"], rel=1e-4)
    assert drawn["after"]["kl"] < 0.9 * drawn["before"]["kl"]
    assert drawn["after"]["kl"] == pytest.approx(exact["after"]["kl"], rel=0.15)
    assert "50 draws" in (home / "run-sampled/README.md").read_text(encoding="utf-8")


def test_draws_and_losses_for_top_k_do_not_mix(caches, student, home, recipe):
    drawn, whole = caches
    with pytest.raises(RecipeError, match=r"drawn gives samples of 50 draws, loss.support is tail_bucket; set loss"):
        distill(run_recipe(drawn, student, home / "no"), device="cpu")
    with pytest.raises(RecipeError, match=r"whole gives the most likely tokens, loss.support is sampled, which wants"):
        distill(run_recipe(whole, student, home / "no", loss={"support": "sampled"}), device="cpu")
    both = [{"path": str(drawn)}, {"path": str(whole)}]
    with pytest.raises(RecipeError, match="whole gives the most likely tokens"):
        distill(run_recipe(both, student, home / "no", loss={"support": "sampled"}), device="cpu")
    two_stages = recipe(student={"model_name_or_path": str(student)}, training={"output_dir": str(home / "no")})
    with pytest.raises(RecipeError, match="gives samples of 20 draws"):
        check_before_teacher(two_stages, "cpu", False, False)
    assert not (home / "no").exists()


def test_on_policy_the_teacher_draws_too(caches, student, teacher, home):
    tree = on_policy_recipe(caches[0], student, home / "on", teacher, 0.5).model_dump(mode="json")
    tree["loss"] |= {"support": "sampled"}
    tree["training"] |= {"max_steps": 4}
    with pytest.raises(RecipeError, match="the teacher of on_policy gives the most likely tokens"):
        distill(Recipe.model_validate(tree), device="cpu")
    tree["teacher"] |= {"support": "sampled", "draws": 30}
    out = distill(Recipe.model_validate(tree), device="cpu")
    assert validate(out / "on-policy") == []
    known = CacheReader(out / "on-policy").manifest
    assert (known.draws, known.k, known.logprob_step) == (30, 30, 0)


def test_prompts_alone_are_asked_of_a_teacher_that_draws(student, teacher, home, recipe):
    """Nothing was drawn for them yet, so they fit either kind of teacher."""
    alone = recipe(
        teacher={"backend": "hf", "model_name_or_path": str(teacher), "support": "topk", "draws": None},
        sampling={"max_new_tokens": 0},
        cache={"out": str(home / "alone")},
    )
    tree = on_policy_recipe(cache_teacher(alone), student, home / "of-alone", teacher, 1.0).model_dump(mode="json")
    tree["loss"] |= {"support": "sampled"}
    tree["teacher"] |= SAMPLED
    tree["training"] |= {"max_steps": 2}
    out = distill(Recipe.model_validate(tree), device="cpu")
    assert CacheReader(out / "on-policy").manifest.draws == DRAWS
