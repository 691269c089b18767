"""manifest.json: what it refuses, and what it says of two caches that differ."""

import json

import pytest
from caches_by_hand import edit_manifest, identity, record, write_cache

from bakery.errors import CacheError
from bakery.shards.manifest import Manifest, publish
from bakery.trees import told


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache", [record(n) for n in range(3)])


def load(cache) -> Manifest:
    return Manifest.load(cache / "manifest.json")


def test_it_says_what_the_cache_is(cache):
    tree = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    entry = tree["splits"]["train"][0]
    # rows 0, 1, 2 have 1, 2, 3 response tokens, of which the first is a target only in row 0
    assert (entry["file"], entry["rows"], entry["targets"]) == ("data/train-00000.parquet", 3, 4)
    assert entry["bytes"] == (cache / entry["file"]).stat().st_size
    assert (tree["format_version"], tree["k"], tree["vocab_size"]) == (2, 4, 32)
    assert tree["recipe"] == {"made": "by hand"}


def test_what_is_saved_is_loaded(cache, tmp_path):
    manifest = load(cache)
    manifest.save(tmp_path / "copy.json")
    assert Manifest.load(tmp_path / "copy.json") == manifest
    assert (tmp_path / "copy.json").read_bytes() == (cache / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    "file",
    [
        "../secret.parquet",
        "data/../../secret-00000.parquet",
        "/etc/train-00000.parquet",
        "data/train-00000.parquet/../../../x",
        "data/sub/train-00000.parquet",
        "data\\train-00000.parquet",
        "data/train-00000.parquet\n",
        "data/train-0.parquet",
        "train-00000.parquet",
    ],
)
def test_no_shard_lies_outside_the_cache(cache, file):
    edit_manifest(cache, lambda tree: tree["splits"]["train"][0].update(file=file))
    with pytest.raises(CacheError, match=r"manifest.json: `splits.train.0.file`"):
        load(cache)


@pytest.mark.parametrize(
    ("version", "cure"),
    [
        (3, "install a newer bakery"),
        (True, "make it again"),
        (1.0, "make it again"),
        (0, "make it again"),
        ("1", "make it again"),
        (None, "make"),
    ],
)
def test_another_version_is_named(cache, version, cure):
    edit_manifest(cache, lambda tree: tree.update(format_version=version, splits="in another way"))
    with pytest.raises(CacheError, match=rf"format_version is {version!r}, this bakery reads 1, 2; .*{cure}"):
        load(cache)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not readable as JSON"),
        (b'{"k": 4,', "not readable as JSON"),
        (b"\xff\xfe\xfa", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1]", "format_version is None"),
        (b"{}", "format_version is None"),
        (b'{"format_version": 1}', "`k`: Field required"),
        (b'{"format_version": 1, "k": %s1%s}' % (b"[" * 900, b"]" * 900), "`k`: Input should be a valid integer"),
    ],
)
def test_what_is_no_manifest(cache, text, says):
    (cache / "manifest.json").write_bytes(text)
    with pytest.raises(CacheError, match=rf"manifest.json: {says}"):
        load(cache)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda tree: tree.update(kk=4), "kk"),
        (lambda tree: tree.update(k=0), "k"),
        (lambda tree: tree.pop("teacher"), "teacher"),
        (lambda tree: tree["teacher"].update(mood="good"), "teacher.mood"),
        (lambda tree: tree["splits"]["train"][0].update(rows=-1), "splits.train.0.rows"),
        (lambda tree: tree["splits"]["train"][0].update(rows=10**12), "splits.train.0"),
        (lambda tree: tree["splits"]["train"][0].update(sha256="abc"), "splits.train.0.sha256"),
    ],
)
def test_a_field_that_cannot_be_is_named(cache, change, where):
    edit_manifest(cache, change)
    with pytest.raises(CacheError, match=f"manifest.json: `{where}`: "):
        load(cache)


def test_a_manifest_that_was_changed_is_found_by_its_checksum(cache):
    path = cache / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"temperatures": []', '"temperatures": [3.0]'), encoding="utf-8")
    with pytest.raises(CacheError, match="its checksum is not that of its content"):
        load(cache)
    path.write_text(json.dumps(json.loads(text)), encoding="utf-8")  # laid out otherwise, the same content
    assert load(cache).k == 4
    edit_manifest(cache, lambda tree: None)  # without one, as the first caches were
    assert load(cache).k == 4


def test_an_absent_manifest_means_an_unfinished_cache(tmp_path):
    with pytest.raises(CacheError, match=f"{tmp_path} is no finished bakery cache"):
        load(tmp_path)


def test_differences_name_the_key_and_both_values():
    there = identity(sampling={"temperature": 1.0, "n": 2}, temperatures=(2.0,))
    here = identity(sampling={"temperature": 0.5, "n": 2}, temperatures=(2.0,), k=8)
    assert here.differences(there) == {"k": (4, 8), "sampling.temperature": (1.0, 0.5)}
    assert told(here.differences(there)) == "k: 4 there, 8 here; sampling.temperature: 1.0 there, 0.5 here"
    assert here.differences(here) == {}
    assert identity().differences(there)["sampling.n"] == (2, None)


def test_a_manifest_differs_from_an_identity_in_identity_only(cache):
    assert identity().differences(load(cache)) == {}  # the recipe, the version and the shards do not count
    assert identity(prompts_sha="z").differences(load(cache)) == {"prompts_sha": ("q", "z")}


def test_publish_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    publish(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            publish(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    publish(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


@pytest.mark.parametrize(
    "steps", [(5e-324, 1.0), (1e-200, 1e200), (1e300, 1e300), (0.5, 0.25), (0, 0.5), (0.5, 0), (-1, -1)]
)
def test_steps_that_are_no_grid(cache, steps):
    edit_manifest(cache, lambda tree: tree.update(zip(("logprob_step", "logprob_step_max"), steps, strict=True)))
    with pytest.raises(CacheError, match=r"logprob_step of .* and a logprob_step_max of|greater than or equal to 0"):
        load(cache)
