"""The real SmolLM2-135M: what a prefix is worth in nats, and that baking it in earns most of that."""

import json

import pytest
from builders import write_jsonl
from conftest import ROOT

from bakery.cache import cache_teacher
from bakery.config import Recipe, StudentConfig
from bakery.distillation import distill
from bakery.reports.evaluate import evaluate
from bakery.shards.reader import CacheReader
from bakery.student.dataset import CacheDataset
from bakery.student.model import load_student


def some_prompts(count):
    lines = (ROOT / "data/prompts.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


def make_cache(out, smollm2, rows, **recipe):
    tree = {
        "teacher": {"model_name_or_path": str(smollm2), "top_k": 64, "dtype": "float32", "device": "cpu"},
        "prompts": {"path": str(rows)} | recipe.pop("prompts", {}),
        "cache": {"out": str(out)},
    }
    return cache_teacher(Recipe.model_validate(tree | recipe))


def test_the_same_model_is_far_from_its_prefixed_self_and_near_itself(smollm2, tmp_path):
    rows = [{"prompt": prompt, "response": "Good question! Yes, I think so."} for prompt in some_prompts(20)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = load_student(StudentConfig(model_name_or_path=str(smollm2), lora=None), "cpu")
    measured = {}
    for name, prefix in (("same", None), ("prefixed", {"text": "You are a rude pirate who always says no."})):
        reader = CacheReader(make_cache(tmp_path / name, smollm2, file, prompts={"prefix": prefix}))
        contexts = [(r.example.teacher_context.tolist(), r.example.student_context.tolist()) for r in reader.records()]
        assert len(contexts) == 20
        assert all((teacher == student) is (name == "same") for teacher, student in contexts)
        measured[name] = evaluate(model, CacheDataset([(reader, 1.0)], "train", 1.0))
    assert 0 <= measured["same"]["kl"] < 0.02
    assert measured["same"]["top1_agreement"] > 0.99
    assert measured["prefixed"]["kl"] > 0.1
    assert measured["prefixed"]["top1_agreement"] < measured["same"]["top1_agreement"]
    # The responses are the same tokens behind the same student context.
    assert measured["prefixed"]["perplexity"] == pytest.approx(measured["same"]["perplexity"], rel=1e-4)


@pytest.mark.slow
def test_a_small_bake_earns_a_quarter_of_the_prefix(smollm2, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in some_prompts(30)])
    cache = make_cache(
        tmp_path / "cache",
        smollm2,
        file,
        prompts={"prefix": {"file": str(ROOT / "data/prefix.txt")}, "validation_fraction": 0.25},
        sampling={"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 24},
    )
    recipe = {
        "caches": [{"path": str(cache)}],
        "student": {"model_name_or_path": str(smollm2), "dtype": "float32", "lora": {"r": 16}},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 30,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
        },
    }
    out = distill(Recipe.model_validate(recipe), device="cpu")
    heldout = json.loads((out / "metrics.json").read_text())["heldout"]
    assert heldout["after"]["kl"] < 0.75 * heldout["before"]["kl"]
    assert heldout["after"]["perplexity"] < heldout["before"]["perplexity"]
