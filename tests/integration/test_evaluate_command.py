"""`bakery evaluate`: each checkpoint of a run is what it was when the Trainer saved it."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import save_tiny_model
from test_stage_two import make_cache, metrics_of, prompts, recipe

from bakery import evaluation
from bakery.distillation import distill
from bakery.errors import DeviceError, OutputError, RecipeError
from bakery.evaluation import evaluate_run
from bakery.reports.table import print_checkpoints


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

    if lora is None:  # the command, which takes a process of some seconds each time, is the same for both
        return
    (home / "r.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "bakery.cli", "evaluate", "-c", str(home / "r.yaml"), "--device", "cpu"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "before training" in table
    assert table.count("checkpoint-") == steps
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [one["step"] for one in found] == [one.step for one in judged]


@pytest.mark.parametrize("lora", [{"r": 8}, None])
def test_what_is_damaged_is_named_and_passed_over(lora, cache, home, tmp_path, caplog):
    """As after a kill while saving, half a deletion, or a copy that a full disk cut off."""
    wanted = recipe(cache, home / f"student{lora is None}", tmp_path / "run", lora=lora, save_steps=1)
    shutil.copytree(home / f"run{lora is None}", tmp_path / "run")
    whole = evaluate_run(wanted, "cpu")
    steps = len(whole) - 2  # besides the student as it was, and the finished model
    assert steps >= 6
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    torn = [tmp_path / f"run/checkpoint-{step}" for step in (1, 2, 3, 4)]
    (torn[0] / "trainer_state.json").unlink()
    (torn[1] / weights).unlink()
    (torn[2] / weights).write_bytes((torn[2] / weights).read_bytes()[:-100])
    (torn[3] / weights).write_bytes(b"")
    torn[0].rename(tmp_path / "run/checkpoint-1-mine")  # no name of a checkpoint
    shutil.copytree(tmp_path / "run/checkpoint-1-mine", torn[0])
    with caplog.at_level("WARNING", "bakery"):
        judged = evaluate_run(wanted, "cpu")
    assert [(one.step, one.measures) for one in judged] == [
        (one.step, one.measures) for one in whole if one.step not in (1, 2, 3, 4)
    ]
    assert len(caplog.messages) == len(torn)
    for path, said in zip(torn, caplog.messages, strict=True):
        assert str(path) in said
        assert said.endswith("passed over")
    (tmp_path / "run/metrics.json").unlink()
    for path in (tmp_path / "run").glob("checkpoint-*"):
        (path / weights).write_bytes(b"")
    with pytest.raises(OutputError, match="run holds no checkpoint that loads; train it again"):
        evaluate_run(wanted, "cpu")
    (tmp_path / "run/metrics.json").write_bytes(b"{")
    with pytest.raises(OutputError, match=r"metrics.json is not readable"):
        evaluate_run(wanted, "cpu")


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 8, "target_modules": ["q_proj"]}])
def test_adapters_of_another_recipe_are_not_measured(lora, cache, home):
    """By size and by name; without a word half of them would be left out."""
    wanted = recipe(cache, home / "studentFalse", home / "runFalse", lora=lora)
    with pytest.raises(RecipeError, match=r"checkpoint-1 holds adapters that `student.lora` has not \(.*lora_"):
        evaluate_run(wanted, "cpu")


@pytest.fixture
def wanted(cache, home):
    return recipe(cache, home / "studentFalse", home / "runFalse", lora={"r": 8})


def test_a_student_that_already_was_the_teacher_is_baked_by_no_share(wanted, monkeypatch, capsys):
    same = {"kl": 0.0, "perplexity": 2.0, "top1_agreement": 1.0}
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: same)
    judged = evaluate_run(wanted, "cpu")
    assert {one.baked for one in judged[1:]} == {None}
    print_checkpoints([one.as_dict() for one in judged])
    assert "–" in capsys.readouterr().out


def test_a_device_that_is_full_is_one_line(wanted, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(evaluation, "evaluate", full)
    with pytest.raises(DeviceError, match=r"out of memory .*--device cpu"):
        evaluate_run(wanted, "cpu")


def test_a_recipe_that_names_no_run(wanted):
    with pytest.raises(RecipeError, match=r"names no `training\.output_dir`"):
        evaluate_run(wanted.model_copy(update={"training": {}}), "cpu")
