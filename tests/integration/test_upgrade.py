"""`bakery upgrade`: a cache of format 1 becomes one of format 2 in place, shards untouched, whatever falls between."""

import json
import logging
import os
import shutil

import pytest
from caches_by_hand import bits, edit_manifest, files, fill, identity, record, write_cache
from conftest import ROOT
from test_kill_and_resume import Crash, Disk
from typer.testing import CliRunner

from bakery.cache import cache_teacher
from bakery.cli import app
from bakery.config import load_recipe
from bakery.errors import CacheError, OutputError
from bakery.shards.directory import locked
from bakery.shards.manifest import NAME, PARTIAL, Manifest
from bakery.shards.merge import merge
from bakery.shards.reader import CacheReader
from bakery.shards.upgrade import upgrade
from bakery.shards.validate import validate
from bakery.shards.versions import FORMAT_VERSION
from bakery.shards.writer import CacheWriter

RECORDS = [record(n) for n in range(9)]
STEP = 1 / 64


def of_format_1(cache, name=NAME):
    """What the format's own bakery would have written: its rows never had another grid than this."""

    def change(tree):
        tree["format_version"] = 1
        assert tree.pop("logprob_step_max") == tree["logprob_step"]

    if name != NAME:
        (cache / name).rename(cache / NAME)
    edit_manifest(cache, change)
    if name != NAME:
        (cache / NAME).rename(cache / name)
    return cache


@pytest.fixture
def old(tmp_path):
    return of_format_1(write_cache(tmp_path / "old", RECORDS[:6], rows_per_shard=2, logprob_step=STEP))


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(ROOT / "data/golden", tmp_path / "golden")


def shards(cache):
    return {name: data for name, data in files(cache).items() if name.endswith(".parquet")}


def rows(cache):
    reader = CacheReader(cache)
    return [bits(r) for split in reader.splits for r in reader.records(split)]


def test_the_golden_cache_of_format_1(golden):
    before = shards(golden), rows(golden)
    assert upgrade(golden)
    assert (shards(golden), rows(golden)) == before
    assert validate(golden) == []
    tree = json.loads((golden / NAME).read_text())
    assert (tree["format_version"], tree["logprob_step"], tree["logprob_step_max"]) == (2, STEP, STEP)
    assert tree["bakery_version"] == "0.1.0"  # who asked the teacher stays
    assert "cache format 2" in (golden / "README.md").read_text()


def test_a_second_time_there_is_nothing_to_do(old):
    assert upgrade(old)
    after = files(old)
    assert not upgrade(old)
    assert files(old) == after


def test_a_writer_leaves_an_old_cache_alone_until_it_is_upgraded(old):
    before = files(old)
    whole = identity(rows_per_shard=2, logprob_step=STEP, prompts_sha="more")
    for extend in (False, True):
        with pytest.raises(
            CacheError, match=f"is of format 1, this bakery writes {FORMAT_VERSION}; run `bakery upgrade"
        ):
            CacheWriter.open_or_resume(old, whole, {}, extend=extend)
    assert files(old) == before
    upgrade(old)
    with CacheWriter.open_or_resume(old, whole, {}, extend=True) as writer:
        fill(writer, RECORDS)
    assert validate(old) == []
    assert {r.example.id for r in CacheReader(old).records()} == {r.example.id for r in RECORDS}


def test_an_unfinished_cache_keeps_what_its_journal_answers(tmp_path):
    out, known = tmp_path / "c", identity(rows_per_shard=4, logprob_step=STEP)
    with CacheWriter.open_or_resume(out, known, {}) as writer:
        [first, _, _] = writer.windows([r.example for r in RECORDS])
        writer.add(RECORDS[:6])
        writer.publish(first, ["train"] * 4)
    of_format_1(out, PARTIAL)
    with pytest.raises(CacheError, match="run `bakery upgrade"):
        CacheWriter.open_or_resume(out, known, {})
    assert upgrade(out)
    with CacheWriter.open_or_resume(out, known, {}) as writer:
        left = [
            e.id for window in writer.windows([r.example for r in RECORDS]) for e in writer.missing(window.examples)
        ]
        assert left == [r.example.id for r in RECORDS[6:]]
        fill(writer, RECORDS)
    assert validate(out) == []


def test_an_upgraded_cache_is_extended_by_its_old_recipe(tmp_path, caplog):
    """The recipe names the one step that the old cache has everywhere."""
    steps = [f"cache.logprob_step={STEP}", f"cache.logprob_step_max={STEP}"]
    recipe = load_recipe("data/golden.yaml", [f"cache.out={tmp_path / 'c'}", *steps])
    out = of_format_1(cache_teacher(recipe))
    upgrade(out)
    with pytest.raises(CacheError, match=r"set cache.logprob_step=0\.015625 and cache.logprob_step_max=0\.015625 to"):
        cache_teacher(load_recipe("data/golden.yaml", [f"cache.out={out}"]))
    with caplog.at_level(logging.INFO):
        cache_teacher(recipe, extend=True)
    assert "is complete" in caplog.text


def test_parts_of_format_1_and_of_today_make_a_cache_of_today(tmp_path):
    how = {"rows_per_shard": 2, "logprob_step": STEP}
    parts = [write_cache(tmp_path / f"{i}-of-2", RECORDS, part=(i, 2), **how) for i in range(2)]
    whole = write_cache(tmp_path / "whole", RECORDS, **how)
    of_format_1(parts[1])
    assert validate(merge(parts, tmp_path / "merged")) == []
    assert Manifest.load(tmp_path / "merged" / NAME).format_version == FORMAT_VERSION
    assert (shards(tmp_path / "merged"), rows(tmp_path / "merged")) == (shards(whole), rows(whole))


def test_a_crash_at_any_step_leaves_one_version_or_the_other(old, tmp_path, monkeypatch):
    before = rows(old)
    with monkeypatch.context() as patch:
        disk, versions = Disk(patch), []
        for power in range(20):
            disk.power(10**6)
            out = shutil.copytree(old, tmp_path / f"crash-{power}")
            disk.power(power)
            try:
                upgrade(out)
            except Crash:
                crashed = True
            else:
                crashed = False
            versions.append(Manifest.load(out / NAME).format_version)
            assert rows(out) == before
            disk.power(10**6)
            upgrade(out)
            assert validate(out) == []
            assert Manifest.load(out / NAME).format_version == FORMAT_VERSION
            assert not list(out.glob("*.tmp"))
            if not crashed:
                break
    assert versions[0] == 1
    assert versions[-1] == 2
    assert versions == sorted(versions)
    assert len(versions) > 4  # there were steps to crash between


def test_while_somebody_writes_it_is_refused(old):
    lock = locked(old)
    try:
        with pytest.raises(OutputError, match="is being filled by another process"):
            upgrade(old)
    finally:
        os.close(lock)
    assert Manifest.load(old / NAME).format_version == 1


def test_what_is_no_cache_or_of_the_future_is_named(old, tmp_path):
    with pytest.raises(CacheError, match=r"absent is no bakery cache: it has no manifest\.json"):
        upgrade(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match=r"is no bakery cache: it has no manifest\.json"):
        upgrade(tmp_path / "empty")
    edit_manifest(old, lambda tree: tree.update(format_version=3))
    with pytest.raises(CacheError, match="format_version is 3, this bakery reads 1, 2; install a newer bakery"):
        upgrade(old)


def test_format_1_has_no_second_step(old):
    edit_manifest(old, lambda tree: tree.update(logprob_step_max=0.5))
    with pytest.raises(CacheError, match="logprob_step_max, which version 1 has not"):
        Manifest.load(old / NAME)


def test_the_command(old, golden):
    said = CliRunner().invoke(app, ["upgrade", str(old), str(golden)])
    assert (said.exit_code, said.output.splitlines()) == (0, [f"{old}: now of format 2", f"{golden}: now of format 2"])
    assert CliRunner().invoke(app, ["upgrade", str(old)]).output.splitlines() == [f"{old}: is of format 2"]
