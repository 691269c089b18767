"""What a user sees: one line that names the thing, the right exit code, no traceback, and nothing left behind."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from resource import RUSAGE_CHILDREN, getrusage

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import write_jsonl
from conftest import ROOT, TINY_TOKENIZER, save_tiny_model
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from bakery.cli import app, main

BAD_RECIPE, BAD_DATA = 2, 1
GOOD_ROWS = [{"prompt": f"{i}?", "response": f"yes {i}"} for i in range(12)]


@dataclass
class Said:
    code: int
    out: str
    err: list[str]


@pytest.fixture
def bakery(monkeypatch, capsys):
    """The command line in this process: `bakery(*argv)`."""
    log = logging.getLogger("bakery")
    handlers, level = log.handlers[:], log.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    transformers_logging.disable_progress_bar()  # as the environment variables of main() do in a new process

    def run(*argv):
        log.handlers.clear()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bakery", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Said(stopped.value.code or 0, out, err.splitlines())

    yield run
    log.handlers[:], log.level = handlers, level
    for number, handler in signals.items():
        signal.signal(number, handler)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model):
    """Good parts, which each test spoils one of."""
    home = tmp_path_factory.mktemp("cli")
    write_jsonl(home / "rows.jsonl", GOOD_ROWS)
    recipe = {
        "teacher": {"backend": "fake", "model_name_or_path": str(TINY_TOKENIZER), "top_k": 16},
        "prompts": {"path": str(home / "rows.jsonl"), "validation_fraction": 0.3},
        "cache": {"out": "nowhere/cache"},
        "student": {"model_name_or_path": str(tiny_model), "lora": {"r": 2}},
        "training": {"output_dir": "nowhere/run", "max_steps": 2, "save_strategy": "no"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.fixture
def recipe(home):
    return home / "recipe.yaml"


def tree(path):
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*")}


def assert_one_line(said, code, *words):
    assert said.code == code, said
    assert len(said.err) == 1, said.err
    assert said.err[0].startswith("bakery: ")
    assert said.out == ""
    for word in words:
        assert word in said.err[0]


# -- stage one -------------------------------------------------------------------------------------------------------


STAGE_ONE = {
    "unknown key": (["--set", "teacher.topk=3"], BAD_RECIPE, ["teacher.topk", "`top_k`"]),
    "unknown section": (["--set", "promts.path=x"], BAD_RECIPE, ["promts", "`prompts`"]),
    "K > vocabulary": (["--top-k", "300"], BAD_RECIPE, ["300", "259"]),
    "K = 0": (["--top-k", "0"], BAD_RECIPE, ["teacher.top_k", "0"]),
    "K is no number": (["--top-k", "abc"], BAD_RECIPE, ["--top-k"]),
    "no such flag": (["--topk", "3"], BAD_RECIPE, ["--topk"]),
    "--set without =": (["--set", "nonsense"], BAD_RECIPE, ["nonsense", "key=value"]),
    "--set without a key": (["--set", "=3"], BAD_RECIPE, ["=3"]),
    "--set of no YAML": (["--set", "teacher.top_k=[1"], BAD_RECIPE, ["teacher.top_k"]),
    "--set of another type": (["--set", "teacher.top_k=many"], BAD_RECIPE, ["teacher.top_k", "many"]),
    "temperature 0": (["--set", "cache.temperatures=[0]"], BAD_RECIPE, ["temperatures"]),
    "no prompts file": (["--prompts", "no/such.jsonl"], BAD_RECIPE, ["no/such.jsonl"]),
    "no teacher": (["--teacher", "no/such-model"], BAD_RECIPE, ["no/such-model"]),
    "no prefix file": (["--set", "prompts.prefix={file: no/prefix.txt}"], BAD_RECIPE, ["no/prefix.txt"]),
    "unknown backend": (["--set", "teacher.backend=oracle"], BAD_RECIPE, ["teacher.backend", "oracle"]),
}


@pytest.mark.parametrize("case", STAGE_ONE)
def test_stage_one_with_a_bad_recipe_or_flag(case, bakery, recipe, tmp_path):
    flags, code, words = STAGE_ONE[case]
    assert_one_line(bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "cache", *flags), code, *words)
    assert tree(tmp_path) == {}


PROMPTS = {
    "empty file": ("", ["bad.jsonl", "no prompts"]),
    "blank lines": ("\n\n", ["bad.jsonl", "no prompts"]),
    "not JSON": ('{"prompt": "a", "response": "b"}\n{"prompt": \n', ["bad.jsonl:2", "JSON"]),
    "not an object": ('{"prompt": "a", "response": "b"}\n\n[1]\n', ["bad.jsonl:3", "list"]),
    "no known column": ('{"question": "a"}\n', ["bad.jsonl:1", "question"]),
    "no target": (
        '{"prompt": "a", "response": "b"}\n{"messages": [{"role": "user", "content": "a"}]}\n',
        ["bad.jsonl:2", "target", "sampling"],
    ),
    "no response": ('{"prompt": "a"}\n', ["bad.jsonl:1", "target"]),
    "content is no text": ('{"messages": [{"role": "user", "content": 3}]}\n', ["bad.jsonl:1", "messages"]),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "response": "b"}\n', ["bad.jsonl:1"]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_stage_one_with_bad_prompts(case, bakery, recipe, tmp_path):
    text, words = PROMPTS[case]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "cache", "--prompts", file)
    assert_one_line(said, BAD_DATA, *words)
    assert set(tree(tmp_path)) == {"bad.jsonl"}


def test_a_context_longer_than_the_teachers(bakery, recipe, tmp_path, tiny_model):
    file = write_jsonl(tmp_path / "long.jsonl", [*GOOD_ROWS, {"prompt": "x" * 600, "response": "y"}])
    flags = ["--teacher", tiny_model, "--set", "teacher.backend=hf", "--prompts", file]
    said = bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "cache", *flags)
    assert_one_line(said, BAD_DATA, "long.jsonl:13", "512")
    assert set(tree(tmp_path)) == {"long.jsonl"}


@pytest.mark.parametrize("command", ["cache-teacher", "distill"])
def test_an_output_directory_with_something_else(command, bakery, recipe, tmp_path, golden):
    (tmp_path / "thesis.tex").write_text("years of work")
    cache = ["--cache", golden] if command == "distill" else []
    assert_one_line(bakery(command, "-c", recipe, "--out", tmp_path, *cache), BAD_DATA, str(tmp_path), "thesis.tex")
    assert set(tree(tmp_path)) == {"thesis.tex"}


def test_an_output_directory_below_a_file(bakery, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    said = bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "file/cache")
    assert said.code == BAD_DATA
    assert said.err[-1].startswith("bakery: ")
    assert "file/cache" in said.err[-1]
    assert set(tree(tmp_path)) == {"file"}


def test_a_cache_of_another_recipe(bakery, recipe, tmp_path):
    assert bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "cache").code == 0
    before = tree(tmp_path)
    said = bakery("cache-teacher", "-c", recipe, "--out", tmp_path / "cache", "--top-k", "8")
    assert_one_line(said, BAD_DATA, "k: 16 there, 8 here", "--out")
    assert tree(tmp_path) == before


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cache-teacher", "distill", "run"])
def test_a_missing_recipe(command, bakery):
    assert_one_line(bakery(command, "-c", "no/recipe.yaml"), BAD_RECIPE, "no/recipe.yaml")


@pytest.mark.parametrize("command", ["cache-teacher", "distill", "run"])
def test_no_recipe_at_all(command, bakery):
    assert_one_line(bakery(command), BAD_RECIPE, "--config")


def test_no_such_command(bakery):
    assert_one_line(bakery("destill"), BAD_RECIPE, "destill")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("teacher: [", ["bad.yaml:1"]),
        ("- a\n- b\n", ["bad.yaml", "list"]),
        ("teacher: {}\n", ["teacher.model_name_or_path", "missing"]),
        ("cache: {out: x}\ncache: {out: y}\n", ["bad.yaml:2", "cache"]),
        ("student: {model_name_or_path: x}\n", ["teacher"]),
    ],
)
def test_a_recipe_that_is_none(text, words, bakery, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    said = bakery("cache-teacher", "-c", tmp_path / "bad.yaml", "--out", tmp_path / "cache")
    assert_one_line(said, BAD_RECIPE, *words)
    assert set(tree(tmp_path)) == {"bad.yaml"}


# -- stage two -------------------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path_factory):
    """A copy of the golden cache, to be spoilt."""
    path = tmp_path_factory.mktemp("golden") / "cache"
    shutil.copytree(ROOT / "data/golden", path)
    return path


STAGE_TWO = {
    "beta 1.5": (["--beta", "1.5"], BAD_RECIPE, ["beta", "1.5"]),
    "beta is no number": (["--beta", "half"], BAD_RECIPE, ["--beta"]),
    "temperature 0": (["--temperature", "0"], BAD_RECIPE, ["temperature", "0"]),
    "temperature not cached": (["--temperature", "3"], BAD_RECIPE, ["3.0", "[2.0]", "cache.temperatures"]),
    "unknown divergence": (["--divergence", "foward_kl"], BAD_RECIPE, ["foward_kl", "forward_kl"]),
    "unknown support": (["--support", "tails"], BAD_RECIPE, ["tails", "tail_bucket"]),
    "unknown training key": (["--set", "training.lerning_rate=1"], BAD_RECIPE, ["lerning_rate", "`learning_rate`"]),
    "bad training value": (["--set", "training.optim=magic"], BAD_RECIPE, ["magic"]),
    "no student": (["--student", "no/such-model"], BAD_RECIPE, ["no/such-model"]),
    "no such layer": (["--set", "student.drop_layers=[9]", "--set", "student.lora=null"], BAD_RECIPE, ["layer 9"]),
    "an adapter on fewer layers": (["--set", "student.drop_layers=[1]"], BAD_RECIPE, ["drop_layers", "lora: null"]),
    "no such module": (["--set", "student.lora.target_modules=[nothing]"], BAD_RECIPE, ["nothing"]),
    "a weight that is none": (["--cache", "data/golden=heavy"], BAD_RECIPE, ["weight", "heavy"]),
    "no cache": (["--cache", "no/cache"], BAD_DATA, ["no/cache"]),
}


@pytest.mark.parametrize("case", STAGE_TWO)
def test_stage_two_with_a_bad_recipe_or_flag(case, bakery, recipe, tmp_path):
    flags, code, words = STAGE_TWO[case]
    cache = [] if "--cache" in flags else ["--cache", "data/golden"]
    said = bakery("distill", "-c", recipe, "--out", tmp_path / "run", "--device", "cpu", *cache, *flags)
    assert_one_line(said, code, *words)
    assert tree(tmp_path) == {}


def test_a_student_with_another_tokenizer(bakery, recipe, tmp_path):
    student = save_tiny_model(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(student)
    flags = ["--student", student, "--out", tmp_path / "run", "--cache", "data/golden", "--device", "cpu"]
    assert_one_line(bakery("distill", "-c", recipe, *flags), BAD_DATA, "tokenizer", "data/golden", str(student))
    assert not (tmp_path / "run").exists()


BOTH_STAGES = {
    "a temperature that will not be cached": (["loss.temperature=3"], BAD_RECIPE, ["3.0", "cache.temperatures"]),
    "a loss of draws": (["loss.support=sampled"], BAD_RECIPE, ["most likely tokens", "draws"]),
    "no student": (["student.model_name_or_path=no/such-model"], BAD_RECIPE, ["no/such-model"]),
    "prompts alone": (["sampling.max_new_tokens=0"], BAD_RECIPE, ["without responses", "on_policy.fraction"]),
    "another tokenizer": (["student.model_name_or_path={other}"], BAD_DATA, ["tokenizer", "--student"]),
    "a small vocabulary": (["student.model_name_or_path={small}"], BAD_DATA, ["ids up to 258", "250 rows"]),
}


@pytest.fixture(scope="module")
def misfits(home):
    other, small = save_tiny_model(home / "other"), save_tiny_model(home / "small", vocab_size=250, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(other)
    return {"other": other, "small": small}


@pytest.mark.parametrize("case", BOTH_STAGES)
def test_no_teacher_is_asked_for_what_stage_two_will_refuse(case, bakery, recipe, misfits, tmp_path):
    settings, code, words = BOTH_STAGES[case]
    places = [f"cache.out={tmp_path / 'cache'}", f"training.output_dir={tmp_path / 'run'}"]
    flags = [word for text in (*settings, *places) for word in ("--set", text.format(**misfits))]
    assert_one_line(bakery("run", "-c", recipe, "--device", "cpu", *flags), code, *words)
    assert tree(tmp_path) == {}


def first_shard(cache):
    return cache / "data/train-00000.parquet"


def truncate(cache):
    file = first_shard(cache)
    file.write_bytes(file.read_bytes()[:-300])


def remove(cache):
    first_shard(cache).unlink()


def put_a_foreign_parquet(cache, told=False):
    file = first_shard(cache)
    pq.write_table(pa.table({"text": ["not", "a", "shard"]}), file)
    if told:  # its size and checksum stand in the manifest
        manifest = json.loads((cache / "manifest.json").read_text())
        entry = next(e for e in manifest["splits"]["train"] if e["file"].endswith(file.name))
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest(), "rows": 3}
        del manifest["checksum"]
        (cache / "manifest.json").write_text(json.dumps(manifest))


def flip(cache, column=None):
    """One byte in the middle of a column's data, or in the footer."""
    file = first_shard(cache)
    data = bytearray(file.read_bytes())
    at = len(data) - 40
    if column:
        group = pq.ParquetFile(file).metadata.row_group(0)
        [chunk] = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.split(".")[0] == column]
        at = chunk.data_page_offset + chunk.total_compressed_size - 3
    data[at] ^= 0xFF
    file.write_bytes(data)


def empty_the_manifest(cache):
    (cache / "manifest.json").write_text("")


def age_the_manifest(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


DAMAGE = {
    "truncated": (truncate, "train-00000.parquet"),
    "missing": (remove, "train-00000.parquet"),
    "foreign": (put_a_foreign_parquet, "train-00000.parquet"),
    "foreign and told": (partial(put_a_foreign_parquet, told=True), "train-00000.parquet"),
    "flipped footer": (flip, "train-00000.parquet"),
    **{
        f"flipped {column}": (partial(flip, column=column), "train-00000.parquet")
        for column in ("response", "topk_ids", "topk_logprobs", "tail_logprob")
    },
    "empty manifest": (empty_the_manifest, "manifest.json"),
    "newer manifest": (age_the_manifest, "99"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_is_refused(case, bakery, recipe, golden, tmp_path):
    damage, word = DAMAGE[case]
    damage(golden)
    said = bakery("distill", "-c", recipe, "--cache", golden, "--out", tmp_path / "run", "--device", "cpu")
    assert_one_line(said, BAD_DATA, str(golden), word)
    assert tree(tmp_path) == {}
    said = bakery("validate", golden)
    assert said.code == BAD_DATA
    assert said.out == ""
    assert any(word in line for line in said.err)


# -- validate, schema ------------------------------------------------------------------------------------------------


def test_validate_for_people(bakery, golden):
    said = bakery("validate", "data/golden", golden)
    assert (said.code, said.err) == (0, [])
    assert said.out.splitlines() == ["data/golden: sound", f"{golden}: sound"]


def test_validate_for_machines(bakery, golden):
    flip(golden, "topk_ids")
    (golden / "data/stray-00000.parquet").write_bytes(b"?")
    said = bakery("validate", "--json", "data/golden", golden)
    assert (said.code, said.err) == (BAD_DATA, [])
    told = json.loads(said.out)
    assert told["valid"] is False
    assert told["problems"]["data/golden"] == []
    problems = told["problems"][str(golden)]
    assert {p["file"] for p in problems} == {"data/train-00000.parquet", "data/stray-00000.parquet"}
    assert all(set(p) == {"file", "row", "what"} for p in problems)
    assert json.loads(bakery("validate", "--json", "data/golden").out)["valid"] is True


def test_validate_of_nothing(bakery, tmp_path):
    said = bakery("validate", tmp_path)
    assert (said.code, said.out, len(said.err)) == (BAD_DATA, "", 1)
    assert "manifest.json" in said.err[0]


def test_schema_is_that_of_the_shards(bakery):
    said = bakery("schema")
    assert (said.code, said.err) == (0, [])
    for field in pq.read_schema(ROOT / "data/golden/data/train-00000.parquet"):
        assert f"{field.name}: {field.type}".replace("element", "item") in said.out  # Parquet's name for the same


# -- a whole run -----------------------------------------------------------------------------------------------------


def test_both_stages_and_then_nothing_more_to_do(bakery, recipe, tmp_path):
    flags = ["--set", f"cache.out={tmp_path / 'cache'}", "--set", f"training.output_dir={tmp_path / 'run'}"]
    said = bakery("run", "-c", recipe, "--device", "cpu", *flags)
    assert said.code == 0, said.err
    assert f"model:  {tmp_path / 'run'}" in said.out
    assert "Held out" in said.out
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    before = tree(tmp_path)
    said = bakery("run", "-c", recipe, "--device", "cpu", *flags)
    assert said.code == BAD_DATA
    assert "finished run" in said.err[-1]
    assert "--overwrite" in said.err[-1]
    assert tree(tmp_path) == before


# -- in a process of its own -----------------------------------------------------------------------------------------


def process(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bakery.cli", *map(str, argv)], capture_output=True, text=True, env=env, check=False
    )


def test_a_process_prints_one_line(recipe, tmp_path):
    """Here with a student that is loaded and then refused: the libraries stay silent, too."""
    flags = ["--cache", "data/golden", "--out", tmp_path / "run", "--device", "cpu", "--temperature", "3"]
    run = process("distill", "-c", recipe, *flags)
    assert_one_line(Said(run.returncode, run.stdout, run.stderr.splitlines()), BAD_RECIPE, "temperature")


def test_debug_shows_the_traceback():
    run = process("cache-teacher", "-c", "no/recipe.yaml", "--debug")
    assert run.returncode != 0
    assert "Traceback (most recent call last)" in run.stderr
    assert "bakery.errors.RecipeError: cannot read the recipe no/recipe.yaml" in run.stderr


COMMANDS = [command.name for command in app.registered_commands]
SPY = """
import sys
from bakery.cli import main
try:
    main()
finally:
    print(*[m for m in ("torch", "transformers", "pyarrow", "datasets") if m in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_instant(command):
    argv = [sys.executable, "-c", SPY, *([command] if command else []), "--help"]
    seconds = []
    for _ in range(3):  # of the processor: how long it waited for it says nothing of the command
        start = getrusage(RUSAGE_CHILDREN)
        run = subprocess.run(argv, capture_output=True, text=True, check=True)
        end = getrusage(RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        if seconds[-1] < 1:
            break
    assert run.stderr.strip() == ""
    assert "Usage:" in run.stdout
    for name in COMMANDS if command is None else ():
        assert name in run.stdout
    assert min(seconds) < 1
