"""Stage two killed at random moments, resumed each time: the weights of a run that nobody disturbed, to the bit."""

import random
import shutil
import time

import pytest
import torch
import yaml
from builders import write_jsonl
from conftest import ROOT, save_tiny_model
from forked import NotedSteps, SlowTeacher, calls, run, start, steps, wait_for
from safetensors.torch import load_file

from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate

KILLS = [2, pytest.param(20, marks=pytest.mark.soak)]  # of each kind of run
STEPS = 16
DISTILL = ("distill", "-c", "../recipe.yaml", "--device", "cpu", "--resume")
KINDS = {"from the cache": (), "on-policy": ("--set", "on_policy={fraction: 0.5, max_new_tokens: 6, lag: 1}")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("stage-two")
    write_jsonl(home / "prompts.jsonl", [{"prompt": f"{n}?", "response": "Yes, " * (n % 5) + "."} for n in range(24)])
    recipe = {
        "teacher": {
            "backend": "fake",
            "model_name_or_path": str(ROOT / "data/golden-tokenizer"),
            "top_k": 8,
            "tokens_per_batch": 60,  # a step of four rows takes two calls or more
        },
        "prompts": {"path": str(home / "prompts.jsonl"), "validation_fraction": 0.2},
        "cache": {"out": str(home / "cache")},
        "student": {"model_name_or_path": str(save_tiny_model(home / "tiny")), "lora": {"r": 2}},
        "training": {
            "output_dir": "run",
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
        },
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, said = run(home, "cache-teacher", "-c", "recipe.yaml")
    assert code == 0, said
    return home


def rows(there):
    return [(r.example.id, r.topk.logprobs.tobytes()) for r in CacheReader(there / "run/on-policy").records()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", KILLS)
def test_kills_change_no_weight(wanted, kind, home):
    chance, kills, runs, again = random.Random(wanted), 0, 0, 0
    whole, killed = (home / f"{name} {kind} {wanted}" for name in ("whole", "killed"))
    whole.mkdir()
    code, said = run(whole, *DISTILL, *KINDS[kind], prepare=(SlowTeacher(0.02),))
    assert code == 0, said
    expected = load_file(whole / "run/adapter_model.safetensors")
    while kills < wanted:
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        before, runs = kills, runs + 1
        while True:
            enough = len(steps(killed)) + chance.randrange(0, 7)
            process = start(killed, *DISTILL, *KINDS[kind], prepare=(NotedSteps(0.01), SlowTeacher(0.02)))
            if kills < wanted:
                wait_for(lambda enough=enough: len(steps(killed)) >= enough, process)
                time.sleep(0.1 * chance.random())  # in the middle of a step, of a checkpoint, of an answer
                process.kill()
            process.join()
            if process.exitcode == 0:
                break
            kills += 1
            assert process.exitcode == -9, (killed / "said").read_text(encoding="utf-8")
        found = load_file(killed / "run/adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if kind == "on-policy":
            assert rows(killed) == rows(whole)
            assert validate(killed / "run/on-policy") == []
            asked, once = (sum(map(len, calls(there))) for there in (killed, whole))
            # a call may have been answered and not yet written down while the next was under way
            assert asked <= once + (kills - before) * 2 * max(map(len, calls(killed)))
            again += asked - once
    told = f", {again} rows asked for twice" if kind == "on-policy" else ""
    print(f"\nstage two, {kind}: {kills} kills in {runs} runs of {STEPS} steps, equal to the bit{told}")
