"""Several processes fill parts of a cache, and merged they are what one process fills, to the byte."""

import os
import shutil

import pytest
import yaml
from builders import write_jsonl
from caches_by_hand import edit_manifest, files
from conftest import ROOT
from forked import SlowTeacher, calls, run, start

from bakery.cache import cache_teacher
from bakery.config import load_recipe
from bakery.errors import CacheError, RecipeError
from bakery.shards.manifest import Manifest
from bakery.shards.merge import merge
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate

ROWS, PARTS = 110, 3  # windows of 16 rows: 0 to 6, the last of 14
COMMAND = ("cache-teacher", "-c", "recipe.yaml")


def make(home, rows=ROWS, **cache):
    home.mkdir(exist_ok=True)
    write_jsonl(home / "prompts.jsonl", [{"prompt": f"{n}?", "response": "Yes. " * (1 + n % 7)} for n in range(rows)])
    recipe = {
        "teacher": {
            "backend": "fake",
            "model_name_or_path": str(ROOT / "data/golden-tokenizer"),
            "top_k": 8,
            "tokens_per_batch": 250,
        },
        "prompts": {"path": str(home / "prompts.jsonl"), "validation_fraction": 0.2},
        "cache": {"out": "cache", "rows_per_shard": 16, "temperatures": [2.0], **cache},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`cache` by one process, and `cache-0-of-3` … by three at the same time."""
    home = make(tmp_path_factory.mktemp("parts") / "home")
    together = [
        start(home, *COMMAND, "--shard-index", i, "--num-shards", PARTS, prepare=(SlowTeacher(0),))
        for i in range(PARTS)
    ]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0] * PARTS, (home / "said").read_text()
    code, said = run(home, *COMMAND)
    assert code == 0, said
    return home


@pytest.fixture
def parts(home, tmp_path):
    return [shutil.copytree(home / f"cache-{i}-of-{PARTS}", tmp_path / f"part{i}") for i in range(PARTS)]


def test_each_part_is_a_sound_cache_of_every_third_window(home):
    asked = [key for call in calls(home) for key in call]
    assert len(asked) == len(set(asked)) == ROWS  # no example by two processes, none by none
    numbers = {}
    for i in range(PARTS):
        part = home / f"cache-{i}-of-{PARTS}"
        assert validate(part) == []
        numbers[i] = sorted({path.stem[-5:] for path in (part / "data").iterdir()})
        assert f"| part | {i} of 3, to be merged |" in (part / "README.md").read_text(encoding="utf-8")
    assert numbers == {0: ["00000", "00003", "00006"], 1: ["00001", "00004"], 2: ["00002", "00005"]}


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_directory_without_a_name_gives_its_parts_none(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    home = make(tmp_path / "home", out=out)
    with pytest.raises(RecipeError, match=rf"cache.out is {out}, which gives its parts no name; name a directory"):
        cache_teacher(load_recipe(home / "recipe.yaml"), part=(0, 2))


def test_merged_they_are_the_cache_of_one_process(home, tmp_path):
    code, said = run(home, "merge", "cache-2-of-3", "cache-0-of-3", "cache-1-of-3", "--out", tmp_path / "merged")
    assert (code, said[-1]) == (0, f"cache: {tmp_path / 'merged'}")
    assert files(tmp_path / "merged") == files(home / "cache")
    assert validate(tmp_path / "merged") == []
    # once more there is nothing to do, and for stage one neither
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").rglob("*")}
    code, said = run(home, "merge", *(f"cache-{i}-of-3" for i in range(PARTS)), "--out", tmp_path / "merged")
    assert code == 0, said
    code, said = run(home, *COMMAND, "--out", tmp_path / "merged")
    assert "nothing to ask for" in said[-2]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").rglob("*")} == before


def test_a_part_goes_on_where_it_stopped(home, tmp_path):
    there = make(tmp_path / "there")
    flags = ["--shard-index", 1, "--num-shards", PARTS, "--set", f"prompts.path={home / 'prompts.jsonl'}"]
    process = start(there, *COMMAND, *flags, prepare=(SlowTeacher(0.1),))
    while len(calls(there)) < 4 and process.is_alive():
        pass
    process.kill()
    process.join()
    assert process.exitcode == -9
    code, said = run(there, *COMMAND, *flags)
    assert code == 0, said
    assert files(there / "cache-1-of-3/data") == files(home / "cache-1-of-3/data")


def test_a_merge_that_was_broken_off_goes_on(parts, home, tmp_path, monkeypatch):
    copy, copied = shutil.copyfile, []

    def torn(source, target):
        copied.append(source)
        if len(copied) == 5:
            target.write_bytes(source.read_bytes()[:100])
            raise KeyboardInterrupt
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", torn)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "merged")
    with pytest.raises(CacheError, match="is no finished bakery cache"):
        CacheReader(tmp_path / "merged")
    merge(parts, tmp_path / "merged")
    assert files(tmp_path / "merged") == files(home / "cache")
    # whole windows are not copied twice: one of two shards, and the torn one, at most
    assert len(copied) <= len(files(home / "cache/data")) + 2


def flip(part):
    shard = sorted((part / "data").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


REFUSED = {
    "one is missing": (lambda p, home: p[:2], "part 2 of 3 is missing; name all 3 directories"),
    "one twice": (lambda p, home: [*p, shutil.copytree(p[0], p[0].with_name("again"))], "4 directories for 3 parts"),
    "a whole cache": (lambda p, home: [*p[:2], home / "cache"], r"home/cache is a whole cache, no part of one"),
    "unfinished": (lambda p, home: [(p[1] / "manifest.json").unlink(), *p][1:], "is no finished bakery cache"),
    "damaged": (lambda p, home: [flip(p[1]), *p][1:], r"part1/data/train-00001.parquet has sha256 .* says"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_not_merged(case, parts, home, tmp_path):
    change, says = REFUSED[case]
    with pytest.raises(CacheError, match=says):
        merge(change(parts, home), tmp_path / "merged")
    assert not (tmp_path / "merged/manifest.json").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [("teacher.top_k=9", "k: 8 there, 9 here"), ("cache.rows_per_shard=15", "rows_per_shard: 16 there, 15 here")],
)
def test_parts_of_two_recipes_are_not_merged(override, says, parts, home, tmp_path):
    other = cache_teacher(load_recipe(home / "recipe.yaml", [f"cache.out={tmp_path / 'c'}", override]), part=(1, PARTS))
    with pytest.raises(CacheError, match=rf"part0 are not of one cache \({says}\)"):
        merge([parts[0], other, parts[2]], tmp_path / "merged")
    fourth = cache_teacher(load_recipe(home / "recipe.yaml", [f"cache.out={tmp_path / 'c'}"]), part=(1, 4))
    with pytest.raises(CacheError, match=r"part0 are not of one cache \(part: \[0, 3\] there, \[1, 4\] here\)"):
        merge([parts[0], fourth, parts[2]], tmp_path / "merged")


@pytest.mark.parametrize("flags", [["--shard-index", 3], ["--num-shards", 3], ["--shard-index", 3, "--num-shards", 3]])
def test_flags_that_name_no_part(flags, home):
    code, said = run(home, *COMMAND, *flags)
    assert code == 2
    assert "give both, the index from 0 to one below" in said[-1]


def test_more_parts_than_windows_and_parts_that_are_extended(home, tmp_path):
    recipe = load_recipe(home / "recipe.yaml", [f"cache.out={tmp_path / 'c'}"])
    with pytest.raises(RecipeError, match=r"8 parts of 7 windows \(110 examples, cache.rows_per_shard 16\)"):
        cache_teacher(recipe, part=(0, 8))
    with pytest.raises(RecipeError, match="merge the parts, then extend"):
        cache_teacher(recipe, part=(0, 2), extend=True)
    assert os.listdir(tmp_path) == []


def test_a_shard_of_another_part_is_a_problem(parts):
    shutil.copy(parts[1] / "data/train-00001.parquet", parts[0] / "data")
    [foreign] = [e for e in Manifest.load(parts[1] / "manifest.json").splits["train"] if "00001" in e.file]
    edit_manifest(parts[0], lambda tree: tree["splits"]["train"].append(foreign.model_dump()))
    assert [str(problem) for problem in validate(parts[0])] == ["data/train-00001.parquet: is not of part 0 of 3"]


def test_a_merged_cache_can_be_extended_like_any_other(home, tmp_path):
    merged = merge([home / f"cache-{i}-of-3" for i in range(PARTS)], tmp_path / "merged")
    whole = shutil.copytree(home / "cache", tmp_path / "whole")
    longer = make(tmp_path / "longer", rows=ROWS + 10)
    for out in (merged, whole):
        cache_teacher(load_recipe(longer / "recipe.yaml", [f"cache.out={out}"]), extend=True)
    assert files(merged / "data") == files(whole / "data")
    assert sum(CacheReader(merged).rows(split) for split in CacheReader(merged).splits) == ROWS + 10
