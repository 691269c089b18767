"""Spoilt recipes, manifests, shards and journals: an error of bakery's own in one line, or what is sound. Never a
traceback, a hang, or a file outside of the cache. `make soak` tries thousands of each."""

import json
import shutil
from functools import cache

import pytest
from caches_by_hand import bits, record, trust
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from mutations import BYTE_SPOILS, TREE_SPOILS, spoil, spoil_tree

from bakery.config import load_recipe
from bakery.errors import BakeryError, CacheError, RecipeError
from bakery.recipe_files import parse_yaml
from bakery.shards.grid import EXACT
from bakery.shards.journal import Journal
from bakery.shards.manifest import Manifest
from bakery.shards.reader import CacheReader
from bakery.shards.schema import shard_schema, to_arrow
from bakery.shards.validate import validate

GOLDEN = ROOT / "data/golden-2"
RECIPES = [*sorted((ROOT / "pipelines").glob("*.yaml")), ROOT / "data/golden.yaml"]
SHARD = "data/train-00002.parquet"


def one_line(error: BakeryError) -> None:
    assert 0 < len(str(error)) < 2_000
    assert str(error).isprintable()


# -- recipes -----------------------------------------------------------------------------------------------------------


def load(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        one_line(error)
    else:
        json.dumps(recipe.model_dump(mode="json"))  # it can be written into a manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(text=st.text(alphabet=st.characters(codec=None) | st.sampled_from("{}[]:,-&*!|>'\"#% \n"), max_size=80))
def test_any_text_as_a_recipe(place, text):
    load(place / "text.yaml", text)


@given(path=st.sampled_from(RECIPES), spoils=BYTE_SPOILS)
def test_a_spoilt_recipe_file(place, path, spoils):
    load(place / "file.yaml", spoil(path.read_bytes(), spoils))


@given(path=st.sampled_from(RECIPES), spoils=TREE_SPOILS)
def test_a_recipe_with_spoilt_values(place, path, spoils):
    tree = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    load(place / "tree.yaml", json.dumps(spoil_tree(tree, spoils)))


# -- caches ------------------------------------------------------------------------------------------------------------


def read(cache):
    """All records, to the bit; None where the reader refuses."""
    try:
        reader = CacheReader(cache)
        rows = [bits(r) for split in reader.splits for r in reader.records(split)]
        for split in reader.splits:
            assert len(reader.lengths(split)) == len(reader.targets(split)) == reader.rows(split)
            reader.read(split, reader.rows(split) - 1)
    except CacheError as error:
        one_line(error)
        return None
    return rows


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@cache
def golden_rows():
    return read(GOLDEN)


@given(spoils=TREE_SPOILS)
def test_a_manifest_with_spoilt_values(place, spoils):
    """Without its checksum, so that all else must hold by itself."""
    cache = place / "manifest/cache"
    if not cache.exists():
        shutil.copytree(GOLDEN, cache)
    before = names(place)
    tree = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    del tree["checksum"]
    (cache / "manifest.json").write_text(json.dumps(spoil_tree(tree, spoils)), encoding="utf-8")
    problems = validate(cache)
    assert all(0 < len(str(problem)) < 2_000 and str(problem).isprintable() for problem in problems)
    rows = read(cache)
    assert rows is not None or problems
    assert names(place) == before


@given(spoils=BYTE_SPOILS)
def test_a_spoilt_manifest_file_is_refused_or_says_the_same(place, spoils):
    cache = place / "bytes/cache"
    if not cache.exists():
        shutil.copytree(GOLDEN, cache)
    (cache / "manifest.json").write_bytes(spoil((GOLDEN / "manifest.json").read_bytes(), spoils))
    try:
        found = Manifest.load(cache / "manifest.json")
    except CacheError as error:
        one_line(error)
        assert validate(cache)
    else:
        assert found == Manifest.load(GOLDEN / "manifest.json")


@pytest.mark.parametrize("trusted", [False, True])
@given(spoils=BYTE_SPOILS)
def test_a_spoilt_shard(place, trusted, spoils):
    """`trusted`: the manifest says its true size and checksum, as that of a hostile cache would."""
    cache = place / f"shard-{trusted}/cache"
    if not cache.exists():
        shutil.copytree(GOLDEN, cache)
    shutil.copy(GOLDEN / "manifest.json", cache)
    spoilt = spoil((GOLDEN / SHARD).read_bytes(), spoils)
    (cache / SHARD).write_bytes(spoilt)
    if trusted:
        trust(cache, SHARD)
    problems, rows = validate(cache), read(cache)
    if not trusted:
        assert bool(problems) == (spoilt != (GOLDEN / SHARD).read_bytes())
    assert rows is not None or problems
    if rows is not None and not trusted:
        assert rows == golden_rows()


@given(spoils=BYTE_SPOILS)
def test_a_spoilt_journal_gives_whole_answers_only(place, spoils):
    written = [to_arrow([record(n) for n in numbers], EXACT, ()) for numbers in ((0, 1), (2,), (3, 4, 5))]
    if not (place / "journal").exists():
        with Journal(place / "journal", shard_schema(())) as journal:
            for batch in written:
                journal.append(batch)
        shutil.copytree(place / "journal", place / "spoilt-journal")
    spoilt = spoil((place / "journal/00000.arrows").read_bytes(), spoils)
    (place / "spoilt-journal/00000.arrows").write_bytes(spoilt)
    for batch in Journal(place / "spoilt-journal", shard_schema(())).recover():
        assert any(batch.equals(answer) for answer in written)
