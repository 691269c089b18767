"""Configurations of the first bakery: read under their old names, or written anew."""

import contextlib
import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from mutations import TREE_SPOILS, spoil_tree

from bakery.config import load_recipe
from bakery.errors import RecipeError
from bakery.migration import migrated
from bakery.old_names import STILL_READ

OLD = """
output_dir: ./outputs/my_bake
num_train_epochs: 3
learning_rate: 1e-4
bf16: false
prefix_messages:
  - {role: system, content: "You answer concisely."}
  - {role: user, content: "Example Q"}
  - {role: assistant, content: "Example A"}
student_retained_turns: 2
num_trajectories: 4
trajectory_length: 128
sampling_temperature: 0.8
model_name_or_path: some/student
teacher_backend: openai
teacher_model_name_or_path: some/teacher
teacher_top_k: 20
teacher_api_base: http://127.0.0.1:8000/v1
teacher_api_key: TOGETHER_API_KEY
teacher_api_model: served
gkd_on_policy_fraction: 0.5
gkd_jsd_beta: 0.25
r: 64
lora_alpha: 128
target_modules: [all-linear]
dataset: prompts.jsonl
max_seq_length: 1024
"""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "my_bake.yaml"
    path.write_text(OLD)
    return path


def test_the_whole_of_an_old_configuration(old, tmp_path):
    text = migrated(old)
    (tmp_path / "new.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "new.yaml")
    teacher, loss = recipe.teacher, recipe.loss
    assert (teacher.backend, teacher.model_name_or_path, teacher.top_k) == ("openai", "some/teacher", 20)
    assert (teacher.api.base_url, teacher.api.model, teacher.api.key_env) == (
        "http://127.0.0.1:8000/v1",
        "served",
        "TOGETHER_API_KEY",
    )
    assert recipe.on_policy.fraction == 0.5
    assert (loss.divergence, loss.support, loss.beta) == ("mixed_kl", "renormalized", 0.25)
    assert (recipe.prompts.path, recipe.prompts.student_retained_turns) == ("prompts.jsonl", 2)
    assert len(recipe.prompts.prefix.messages) == 3
    assert (recipe.sampling.n, recipe.sampling.max_new_tokens, recipe.sampling.temperature) == (4, 128, 0.8)
    assert (recipe.student.lora.r, recipe.student.lora.target_modules) == (64, "all-linear")
    assert recipe.training == {
        "output_dir": "./outputs/my_bake", "num_train_epochs": 3, "learning_rate": 1e-4, "bf16": False
    }  # fmt: skip
    assert "# max_seq_length: rows that are too long are refused" in text
    assert str(recipe.cache.out) == "caches/my_bake"


def test_without_a_teacher_it_was_the_student_with_its_adapters_off(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("model_name_or_path: m\nsystem_prompt: Be brief.\ntraining_prompts: [a, b]\n")
    tree = yaml.safe_load(migrated(path))
    assert tree["teacher"] == {"backend": "local_toggle"}
    assert tree["prompts"] == {"path": "old.jsonl", "prefix": {"text": "Be brief."}}
    assert "# training_prompts: put the prompts into a .jsonl file" in migrated(path)


def test_a_key_that_never_was_is_named(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("model_name_or_path: m\nnum_trajectory: 3\n")
    with pytest.raises(RecipeError, match="num_trajectory is no key of the first bakery"):
        migrated(path)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("teacher_top_k: 0", "`teacher.top_k` is 0: Input should be greater than or equal to 1"),
        ("gkd_on_policy_fraction: 2", "`on_policy.fraction` is 2: .* less than or equal to 1"),
        ("teacher_backend: api", "`teacher.backend` is 'api': Input should be 'hf'"),
        ("target_content_pattern: '(unclosed'\ndataset: x", "no regular expression"),
        ("system_prompt: x\nprefix_messages: [{role: user, content: y}]\ndataset: x", "exactly one of text, file"),
        ("prefix_messages: [{role: user, contents: y}]\ndataset: x", "holds role and content, this one role, contents"),
        ("lora_alpha: 12.5", "`student.lora.lora_alpha` is 12.5"),
        ("loss: null", "`loss` is None; a section is a mapping, or is left out"),
        ("student: 5", "`student` is 5; a section"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(tmp_path, lines, says):
    path = tmp_path / "old.yaml"
    path.write_text(f"model_name_or_path: m\n{lines}\n")
    with pytest.raises(RecipeError, match=f"^{path}: .*{says}"):
        migrated(path)


@given(spoils=TREE_SPOILS)
def test_a_spoilt_configuration_is_a_recipe_or_one_line(tmp_path_factory, spoils):
    path = tmp_path_factory.getbasetemp() / "spoilt.yaml"
    path.write_text(json.dumps(spoil_tree(yaml.safe_load(OLD), spoils)))
    with contextlib.suppress(RecipeError):
        migrated(path)


@pytest.mark.parametrize("name", STILL_READ)
def test_each_old_name_is_read_where_a_recipe_has_it_and_as_an_override(name, tmp_path):
    value = {"teacher_backend": "hf", "teacher_torch_dtype": "float32"}.get(name, "x")
    value = {"teacher_top_k": 7, "gkd_on_policy_fraction": 0.5, "gkd_jsd_beta": 0.5}.get(name, value)
    teacher: dict = {"model_name_or_path": "m"}
    if "api" in name:
        teacher |= {"backend": "openai", "api": {"base_url": "http://x/v1", "model": "m"}}
    *parents, last = STILL_READ[name].split(".")
    at = teacher
    for parent in parents[1:]:
        at = at[parent]
    at.pop(last, None)  # the old name alone says it
    recipe = tmp_path / "r.yaml"
    sets = [f"{name}={json.dumps(value)}"]
    for tree, told in ((({"teacher": teacher, name: value}), []), ({"teacher": teacher}, sets)):
        recipe.write_text(yaml.safe_dump(tree))
        found = load_recipe(recipe, told)
        for part in STILL_READ[name].split("."):
            found = getattr(found, part)
        assert found == value


def test_old_and_new_name_at_odds_are_an_error(tmp_path):
    (tmp_path / "r.yaml").write_text("teacher: {model_name_or_path: m, top_k: 5}\nteacher_top_k: 7\n")
    with pytest.raises(RecipeError, match=r"teacher_top_k is 7 and teacher\.top_k is 5"):
        load_recipe(tmp_path / "r.yaml")


def test_the_command_prints_the_recipe(old):
    command = [sys.executable, "-m", "bakery.cli", "migrate", str(old)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == migrated(old)
