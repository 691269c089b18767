"""A cache whose rows hold no responses: nobody wrote them, and on-policy steps are all that it can teach."""

import pytest
from builders import write_jsonl
from test_on_policy_run import on_policy_recipe
from test_stage_two import make_cache, metrics_of, prompts

import bakery.reports.evaluate as evaluation
from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.distillation import distill
from bakery.errors import RecipeError
from bakery.estimate import estimate
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.student.on_policy_cache import DIRECTORY
from bakery.teachers.hf import HFTeacher

COUNT = 24


@pytest.fixture(scope="module")
def stage_one(home, tiny_model):
    rows = [{"messages": [{"role": "user", "content": f"{i} loaves?"}]} for i in range(COUNT)]
    return Recipe.model_validate(
        {
            "teacher": {"model_name_or_path": str(tiny_model), "top_k": 32, "dtype": "float32"},
            "prompts": {
                "path": str(write_jsonl(home / "rows.jsonl", rows)),
                "validation_fraction": 0.25,
                "prefix": {"text": "Bake."},
            },
            "sampling": {"max_new_tokens": 0},
            "cache": {"out": str(home / "cache")},
        }
    )


@pytest.fixture(scope="module")
def cache(stage_one):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFTeacher, "open", lambda teacher: pytest.fail("the teacher has nothing to be asked"))
        return cache_teacher(stage_one)


def test_the_prompts_are_there_with_both_contexts_and_no_teacher_was_opened(cache):
    assert validate(cache) == []
    reader = CacheReader(cache)
    records = [record for split in reader.splits for record in reader.records(split)]
    assert len(records) == COUNT
    assert {len(record.example.response) for record in records} == {len(record.topk) for record in records} == {0}
    assert all(len(r.example.teacher_context) > len(r.example.student_context) for r in records)
    assert "prompts for on-policy steps" in (cache / "README.md").read_text()


def test_the_student_learns_from_them_where_every_step_is_on_policy(cache, student, home, tiny_model):
    out = distill(on_policy_recipe(cache, student, home / "run", tiny_model, 1.0, max_steps=2), device="cpu")
    assert metrics_of(out)["heldout"] == {}
    assert metrics_of(out)["train"]["on_policy/response_tokens"] > 0
    assert validate(out / DIRECTORY) == []
    assert (out / "report.html").is_file()


def test_beside_a_cache_of_responses_the_student_is_measured_by_those(
    cache, student, home, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 40)  # a row or two: some batches would have no target
    answered = make_cache(home / "answered", tiny_model, prompts(home / "answered.jsonl", 12))
    both = [{"path": str(answered)}, {"path": str(cache)}]
    wanted = on_policy_recipe(both, student, tmp_path / "both", tiny_model, 1.0, max_steps=1, eval_strategy="steps")
    heldout = metrics_of(distill(wanted, device="cpu"))["heldout"]
    assert heldout["rows"] == CacheReader(answered).rows("validation") > 0
    assert heldout["before"]["kl"] > 0


def test_any_other_share_is_refused(cache, student, home, tiny_model):
    with pytest.raises(RecipeError, match=r"without responses, and on_policy\.fraction is 0\.5; set it to 1"):
        distill(on_policy_recipe(cache, student, home / "half", tiny_model, 0.5), device="cpu")
    assert not (home / "half").exists()


def test_they_have_neither_norms_nor_a_mass_to_cut(stage_one, cache, home):
    """A cache of other temperatures and a top-mass takes the rows over, and reads as sound as any."""
    tree = stage_one.model_dump(mode="json")
    tree["teacher"]["top_mass"] = 0.5
    norms = {"out": str(home / "norms"), "temperatures": [2.0, 4.0]}
    reused = {"out": str(home / "reused"), "temperatures": [4.0]}
    with_norms = cache_teacher(Recipe.model_validate({**tree, "cache": norms}))
    again = cache_teacher(Recipe.model_validate({**tree, "cache": reused}), reuse=[with_norms])
    for path, count in ((with_norms, 2), (again, 1)):
        assert validate(path) == []
        reader = CacheReader(path)
        records = [record for split in reader.splits for record in reader.records(split)]
        assert [record.topk.log_norm.shape for record in records] == [(0, count)] * COUNT


def test_there_is_no_price(stage_one):
    with pytest.raises(RecipeError, match="no price"):
        estimate(stage_one)
