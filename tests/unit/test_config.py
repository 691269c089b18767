"""A recipe is read strictly: what is misspelt is named with what was meant."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from bakery.config import CacheConfig, PrefixConfig, load_recipe
from bakery.errors import RecipeError

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted(ROOT.glob("pipelines/*.yaml")), ROOT / "data/golden.yaml"]

GOOD = """
teacher: {backend: fake, model_name_or_path: some/model, top_k: 16}
prompts: {path: data/prompts.jsonl, prefix: {text: Be brief.}}
cache: {out: caches/x, temperatures: [2, 0.5, 2]}
caches: [{path: caches/x, weight: 2}]
student: {model_name_or_path: some/student, lora: {r: 8}}
loss: {divergence: mixed_kl, beta: 0.25}
training: {output_dir: runs/x, learning_rate: 2e-4}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=GOOD, *overrides):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return load


def test_a_good_recipe(load):
    recipe = load()
    assert recipe.teacher.top_k == 16
    assert recipe.prompts.prefix.as_messages() == [{"role": "system", "content": "Be brief."}]
    assert recipe.cache.temperatures == (2.0, 0.5)  # each once
    assert recipe.cache.logprob_steps == (1 / 256, 1 / 16)
    assert recipe.caches[0].weight == 2.0
    assert (recipe.student.lora.r, recipe.student.lora.lora_alpha) == (8, 32)
    assert recipe.loss.beta == 0.25
    assert recipe.training == {"output_dir": "runs/x", "learning_rate": 0.0002}
    assert recipe.sampling is None


@pytest.mark.parametrize(
    ("given", "steps"),
    [((0, 0.5), (0, 0)), ((0.25, 0.0625), (0.25, 0.25)), ((0.25, 0), (0.25, 0.25)), ((0.1, 1), (0.1, 1))],
)
def test_the_coarsest_step_is_no_finer_than_the_finest(given, steps):
    """So `logprob_step` alone means what it says: 0 is exact, a large one is large everywhere."""
    finest, coarsest = given
    assert CacheConfig(out="x", logprob_step=finest, logprob_step_max=coarsest).logprob_steps == steps


def test_an_empty_recipe_lacks_the_section_that_a_command_needs(load):
    recipe = load("")
    with pytest.raises(RecipeError, match="the recipe has no `teacher:` section"):
        recipe.section("teacher")


def test_a_recipe_does_not_change(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().teacher.top_k = 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path):
    assert load_recipe(path).section("teacher").top_k >= 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("techer.top_k=1", "unknown key `techer`; did you mean `teacher`?"),
        ("teacher.topk=1", "unknown key `teacher.topk`; did you mean `top_k`?"),
        ("student.lora.lora_alfa=1", "unknown key `student.lora.lora_alfa`; did you mean `lora_alpha`?"),
        ("prompts.prefix.texts=1", "unknown key `prompts.prefix.texts`; did you mean `text`?"),
        ("caches=[{path: x, wieght: 1}]", "unknown key `caches.0.wieght`; did you mean `weight`?"),
        ("training.learning_rte=1", "training.learning_rte is no argument .*; did you mean `learning_rate`?"),
        ("loss.support=tailbucket", "loss.support 'tailbucket' is unknown; did you mean 'tail_bucket'?"),
        ("sampling.xyzzy=1", "unknown key `sampling.xyzzy`$"),
        (r'sampling={"xy\nz": 1}', r"unknown key `sampling.xy\\nz`$"),
    ],
)
def test_a_misspelt_key_names_the_nearest_real_one(load, override, says):
    with pytest.raises(RecipeError, match=says):
        load(GOOD, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loss.beta=1.5", "loss.beta is 1.5; choose a number from 0 to 1"),
        ("loss.beta=-0.1", "loss.beta is -0.1"),
        ("loss.alpha=2", "loss.alpha is 2"),
        ("loss.temperature=0", "loss.temperature is 0"),
        ("teacher.top_k=0", "`teacher.top_k` is 0: .*greater than or equal to 1"),
        ("cache.rows_per_shard=65537", "`cache.rows_per_shard` is 65537: .*less than or equal to 65536"),
        ("teacher.top_k=many", "`teacher.top_k` is 'many'"),
        ("teacher.top_mass=0", "`teacher.top_mass` is 0"),
        ("teacher.backend=chat", "`teacher.backend` is 'chat'"),
        ("teacher={backend: fake}", "`teacher.model_name_or_path` is missing"),
        ("prompts.validation_fraction=1", "`prompts.validation_fraction` is 1"),
        ("cache.temperatures=[1, 0]", "`cache.temperatures` is .*above 0"),
        ("cache.temperatures=[.nan]", "`cache.temperatures.0` is"),
        ("cache.temperatures=[.inf]", "`cache.temperatures.0` is"),
        ("cache.logprob_step=.nan", "`cache.logprob_step` is nan"),
        ("cache.logprob_step=1.0e-12", "`cache.logprob_step`"),
        ("caches=[{path: x, weight: 0}]", "`caches.0.weight` is 0"),
    ],
)
def test_a_value_that_cannot_be_is_named(load, override, says):
    with pytest.raises(RecipeError, match=says):
        load(GOOD, override)


def test_overrides_are_dotted_yaml_and_the_later_wins(load):
    recipe = load(
        GOOD,
        "teacher.top_k=8",
        "teacher.top_k=32",
        "sampling.temperature=0.7",  # a section that the recipe lacks
        "cache.temperatures=[4, 1e0]",
        "student.lora=null",
        "training.learning_rate=3e-5",
        "training.run_name='2e-4'",
        "prompts.path=a=b.jsonl",
    )
    assert recipe.teacher.top_k == 32
    assert recipe.teacher.model_name_or_path == "some/model"
    assert (recipe.sampling.temperature, recipe.sampling.n) == (0.7, 1)
    assert recipe.cache.temperatures == (4.0, 1.0)
    assert recipe.student.lora is None
    assert recipe.training["learning_rate"] == 0.00003
    assert recipe.training["run_name"] == "2e-4"
    assert recipe.prompts.path == "a=b.jsonl"


@pytest.mark.parametrize(("text", "value"), [("2e-4", 0.0002), ("1E5", 1e5), ("-.5e+1", -5.0), ("3.e0", 3.0)])
def test_a_number_with_an_exponent_is_a_float(load, text, value):
    found = load(f"training: {{output_dir: x, weight_decay: {text}}}").training["weight_decay"]
    assert isinstance(found, float)
    assert found == value


def test_an_override_without_a_value(load):
    with pytest.raises(RecipeError, match=r"--set teacher.top_k: expected section.key=value"):
        load(GOOD, "teacher.top_k")
    with pytest.raises(RecipeError, match=r"--set =3: expected section.key=value"):
        load(GOOD, "=3")
    with pytest.raises(RecipeError, match=r"--set cache.temperatures.*not YAML"):
        load(GOOD, "cache.temperatures=[1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("loss: {}\nloss: {}", r"recipe.yaml:2: not YAML: the key `loss` stands twice"),
        ("loss: {beta: 1,\n beta: 0}", r"recipe.yaml:2: not YAML: the key `beta` stands twice"),
        ("loss: {beta: 1", r"recipe.yaml:\d: not YAML"),
        ("cache: {out: {{somewhere}}}", r"recipe.yaml:1: not YAML"),  # a template that was never filled in
        ("- loss", "a recipe is a mapping of sections, this is a list"),
        ("loss", "a recipe is a mapping of sections, this is a str"),
        ("loss: [1]", "`loss` is"),
        ("training: 3", "`training` is 3"),
    ],
)
def test_a_file_that_is_no_recipe(load, text, says):
    with pytest.raises(RecipeError, match=says):
        load(text)


BOMB = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{o}, *{o}]\n" for o, n in pairwise("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"recipe.yaml:2: not YAML: an alias; write the value out"),
        ("a: &a {<<: *a}", r"not YAML: an alias"),
        ("{" * 100_000, r"recipe.yaml:1: not YAML: nested more than 16 deep"),
        ("training: " + "[" * 200 + "]" * 200, r"recipe.yaml:1: not YAML: nested more than 16 deep"),
        ("teacher: {top_k: 1" + ":1" * 50_000 + "}", r"recipe.yaml:1: not YAML: a number of 100001 characters"),
        ("teacher: {top_k: " + "9" * 5_000 + "}", r"recipe.yaml:1: not YAML: a number of 5000 characters"),
        ("loss: {beta: 1" + ":1" * 200 + ".5}", r"recipe.yaml:1: not YAML: a number of 403 characters"),
        ("#" * 300_000, r"has more than 262,144 bytes"),
        ("? " + "k" * 100_000 + "\n: 1", r"recipe.yaml: unknown key `k{200}`$"),
        ("1: 2", r"recipe.yaml:1: not YAML: a key is a word"),
        ("on: 2", r"recipe.yaml:1: not YAML: a key is a word"),
        ("loss: !!python/object/apply:os.system [ls]", r"recipe.yaml:1: not YAML: could not determine a constructor"),
        ("loss: {beta: !!bool x}", r"not YAML: 'x'"),
        ("loss: {beta: !!timestamp x}", r"not YAML: "),
        ('training: {output_dir: "\\ud800"}', r"not YAML: 'utf-16-le' codec can't decode"),
        ("loss: {beta: 2024-99-99}", r"not YAML: month must be in 1..12"),
        (f"teacher: {{model_name_or_path: m, top_k: {'many ' * 10_000}}}", r"`teacher.top_k` is 'many.{,60}': "),
    ],
)
def test_a_hostile_recipe_is_refused_in_one_line(load, text, says):
    with pytest.raises(RecipeError, match=says):
        load(text)


def test_json_is_yaml_with_characters_in_two_halves(load):
    recipe = load(json.dumps({"training": {"output_dir": "runs/\N{BREAD}\u00e9"}}))
    assert recipe.training == {"output_dir": "runs/\N{BREAD}\u00e9"}


def test_an_endless_recipe_is_not_read_to_its_end():
    with pytest.raises(RecipeError, match="the recipe /dev/zero has more than"):
        load_recipe("/dev/zero")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"prompts: {path: caf\xe9}")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*latin.yaml"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize("prefix", ["{}", "{text: a, file: b}", "{text: a, messages: []}"])
def test_a_prefix_is_exactly_one_thing(load, prefix):
    with pytest.raises(RecipeError, match=r"`prompts.prefix` is .*exactly one of text, file, messages"):
        load(GOOD, f"prompts.prefix={prefix}")


@pytest.mark.parametrize("prefix", [{"text": " \n"}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}])
def test_a_prefix_without_text_bakes_nothing_and_is_refused(prefix):
    with pytest.raises(RecipeError, match=r"prompts\.prefix holds no text; leave it out"):
        PrefixConfig(**prefix).as_messages()


@pytest.mark.parametrize("message", ["{role: system, contents: x}", "{role: system}", "{role: a, content: b, name: c}"])
def test_a_message_of_a_prefix_holds_role_and_content(load, tmp_path, message):
    with pytest.raises(RecipeError, match="a message holds role and content, this one role"):
        load(GOOD, f"prompts.prefix={{messages: [{message}]}}")
    (tmp_path / "prefix.yaml").write_text(f"- {message}\n")
    with pytest.raises(RecipeError, match=r"prefix\.yaml is no list of {role, content}"):
        PrefixConfig(file=tmp_path / "prefix.yaml").as_messages()


def test_a_prefix_without_end_is_not_read_to_its_end():
    with pytest.raises(RecipeError, match=r"/dev/zero has more than 16,777,216 bytes"):
        PrefixConfig(file=Path("/dev/zero")).as_messages()


def test_a_prefix_from_a_file_or_from_messages(tmp_path):
    (tmp_path / "prefix.txt").write_text("\nYou bake bread. Ölen.\n", encoding="utf-8")
    assert PrefixConfig(file=tmp_path / "prefix.txt").as_messages() == [
        {"role": "system", "content": "You bake bread. Ölen."}
    ]
    talk = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    assert PrefixConfig(messages=talk).as_messages() == list(talk)
    with pytest.raises(RecipeError, match=r"prompts.prefix.file: cannot read .*absent.txt"):
        PrefixConfig(file=tmp_path / "absent.txt").as_messages()
