"""A key in a recipe is refused, and the refusal does not tell it."""

import contextlib
import time

import pytest

from bakery.config import Recipe, load_recipe
from bakery.errors import RecipeError
from bakery.recipe_secrets import refuse_secrets

KEY = "sk-" + "proj-0123456789abcdefghij"
API = "{base_url: http://localhost:1/v1, model: m, %s}"


def load(tmp_path, *overrides):
    (tmp_path / "recipe.yaml").write_text("teacher: {backend: openai, model_name_or_path: m, api: null}")
    return load_recipe(tmp_path / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        (f"teacher.api={API % f'api_key: {KEY}'}", "teacher.api.api_key"),
        (f"teacher.api={API % f'key_env: {KEY}'}", "teacher.api.key_env"),
        (f"teacher.api={API % 'key_env: 0123 4567'}", "teacher.api.key_env"),
        (f"teacher.api={API % f'key: {KEY}'}", "teacher.api.key"),
        ("teacher.api={base_url: 'https://me:" + KEY + "@example.org/v1', model: m}", "teacher.api.base_url"),
        ("teacher.api={base_url: 'https://example.org/v1?api-key=" + KEY + "', model: m}", "teacher.api.base_url"),
        (f"teacher.revision={KEY}", "teacher.revision"),
        ("teacher.engine={hf_token: plain}", "teacher.engine.hf_token"),
        (f"teacher.engine={{deep: [{{er: '{KEY}'}}]}}", "teacher.engine.deep.er"),
        ("training.hub_token=hf_" + "a" * 20, "training.hub_token"),
        ("training.push_to_hub_token=plain", "training.push_to_hub_token"),
        ("training.run_name=Bearer 0123456789", "training.run_name"),
    ],
)
def test_a_literal_key_is_refused_with_the_cure(tmp_path, override, name):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, override)
    said = str(error.value)
    assert said.startswith(f"`{name}` ")
    assert "teacher.api.key_env names the variable" in said
    for secret in (KEY, "plain", "a" * 20, "0123 4567", "0123456789"):
        assert secret not in said + repr(error.value.__context__)


def test_a_recipe_made_in_python_is_looked_at_too():
    with pytest.raises(RecipeError, match=r"`training\.hub_token` holds a key"):
        Recipe.model_validate({"training": {"output_dir": "x", "hub_token": "hf_abc"}})


def test_what_only_sounds_like_a_key_is_let_through(tmp_path):
    recipe = load(
        tmp_path,
        f"teacher.api={API % 'key_env: MY_KEY_2'}",
        "prompts={path: sk-learn/tokens.jsonl, prefix: {text: 'Never say sk-1 or hf_token. Keys: none. GET "
        "/items?page_token=NEXT_OF_THE_PAGES, or https://example.org/items?page_token=NEXT'}}",
        "training={output_dir: runs/token, include_num_input_tokens_seen: true, hub_token: null}",
    )
    assert recipe.teacher.api.key_env == "MY_KEY_2"
    assert recipe.training["include_num_input_tokens_seen"] is True


@pytest.mark.parametrize("piece", ["a", ":", "://", "://a:", "?key=", "://x?token=", "a:b@"])
def test_a_long_text_is_looked_through_in_a_moment(piece):
    began = time.process_time()
    with contextlib.suppress(RecipeError):
        refuse_secrets({"text": piece * ((1 << 18) // len(piece))})
    assert time.process_time() - began < 2
