"""`bakery evaluate`: each checkpoint of a run is what it was when the Trainer saved it."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import save_tiny_model
from test_stage_two import make_cache, metrics_of, prompts, recipe

from bakery.distillation import distill
from bakery.errors import OutputError
from bakery.evaluation import evaluate_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def cache(home, tiny_model):
    return make_cache(home / "cache", tiny_model, prompts(home / "rows.jsonl"))


@pytest.mark.parametrize("lora", [{"r": 8}, None])
def test_checkpoints_from_nothing_to_all(lora, cache, home):
    student = save_tiny_model(home / f"student{lora is None}", seed=1)
    out = home / f"run{lora is None}"
    wanted = recipe(cache, student, out, lora=lora, save_strategy="steps", save_steps=1)
    with pytest.raises(OutputError, match="holds no checkpoint"):
        evaluate_run(wanted, "cpu")
    distill(wanted, device="cpu")
    judged = evaluate_run(wanted, "cpu")
    heldout = metrics_of(out)["heldout"]
    steps = metrics_of(out)["train"]["steps"]
    assert [one.step for one in judged] == [*range(steps + 1), steps]
    assert judged[0].measures == pytest.approx(heldout["before"], rel=1e-4)
    assert judged[-1].measures == pytest.approx(heldout["after"], rel=1e-4)
    assert judged[-2].measures == pytest.approx(heldout["after"], rel=1e-4)
    assert judged[0].baked == 0 < judged[1].baked < judged[-1].baked < 1
    assert judged[-1].baked == pytest.approx(1 - heldout["after"]["kl"] / heldout["before"]["kl"], rel=1e-3)

    (home / "r.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=lora is not None)))
    command = [sys.executable, "-m", "bakery.cli", "evaluate", "-c", str(home / "r.yaml"), "--device", "cpu"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "before training" in table
    assert table.count("checkpoint-") == steps
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [one["step"] for one in found] == [one.step for one in judged]
