"""`validate` finds whatever is wrong with a cache, and says in which file and row."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches_by_hand import K, edit_manifest, record, trust, write_cache

from bakery.shards.reader import CacheReader
from bakery.shards.validate import Problem, validate

T = (2.0,)
FIRST, SECOND = "data/train-00000.parquet", "data/train-00001.parquet"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two shards of 10 rows."""
    out = tmp_path_factory.mktemp("caches") / "c"
    return write_cache(out, [record(n, T) for n in range(20)], rows_per_shard=10, temperatures=T)


@pytest.fixture
def cache(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "c")


def test_a_sound_cache_has_no_problems(sound):
    assert validate(sound) == []


@pytest.mark.parametrize("step", [1 / 64, 0.25])
def test_neither_has_one_on_a_grid_or_with_ragged_supports(tmp_path, step):
    records = [record(n, T) for n in range(20)]
    assert validate(write_cache(tmp_path / "grid", records, logprob_step=step, temperatures=T)) == []
    ragged = [type(r)(r.example, r.topk.keep_mass(0.5), r.origin) for r in records]
    assert validate(write_cache(tmp_path / "ragged", ragged, logprob_step=step, temperatures=T, top_mass=0.5)) == []


# -- files that are not what the manifest says -------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_is_found(cache):
    whole = (cache / SECOND).read_bytes()
    for at in range(0, len(whole), 97):
        (cache / SECOND).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (problem,) = validate(cache)
        assert (problem.file, problem.row) == (SECOND, None), at
        assert "sha256" in problem.what
    (cache / SECOND).write_bytes(whole)
    assert validate(cache) == []


def test_truncation_and_absence_are_found(cache):
    whole = (cache / SECOND).read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        (cache / SECOND).write_bytes(whole[:size])
        assert [p.file for p in validate(cache)] == [SECOND], size
    (cache / SECOND).unlink()
    (problem,) = validate(cache)
    assert problem.file == SECOND
    assert "is missing" in problem.what


def test_what_is_no_shard_is_found_though_its_checksum_is_right(cache):
    for write in (
        lambda: (cache / FIRST).write_bytes(b"PAR1 nothing PAR1"),
        lambda: pq.write_table(pa.table({"a": [1, 2]}), cache / FIRST),
        lambda: pq.write_table(pq.read_table(cache / SECOND).drop(["log_norm_T"]), cache / FIRST),
    ):
        write()
        trust(cache, FIRST)
        (problem,) = validate(cache)
        assert problem.file == FIRST


def test_a_file_that_no_manifest_lists_is_found(cache):
    shutil.copy(cache / FIRST, cache / "data/train-00002.parquet")
    (cache / "data/train-00001.parquet.tmp").write_bytes(b"")
    assert validate(cache) == [
        Problem("data/train-00001.parquet.tmp", None, "is in no manifest"),
        Problem("data/train-00002.parquet", None, "is in no manifest"),
    ]


@pytest.mark.parametrize("field", ["rows", "targets", "bytes"])
@pytest.mark.parametrize("by", [-1, 1])
def test_wrong_counts_are_found(cache, field, by):
    right = CacheReader(cache).manifest.splits["train"][1].model_dump()[field]
    edit_manifest(cache, lambda tree: tree["splits"]["train"][1].update({field: right + by}))
    (problem,) = validate(cache)
    assert problem.file == SECOND
    assert str(right) in problem.what
    assert str(right + by) in problem.what


def test_a_shard_listed_twice_or_under_another_split_is_found(cache):
    edit_manifest(cache, lambda tree: tree["splits"]["train"].append(tree["splits"]["train"][0]))
    assert Problem("manifest.json", None, f"lists {FIRST} twice") in validate(cache)
    edit_manifest(cache, lambda tree: tree["splits"].update(other=[tree["splits"]["train"].pop()]))
    assert Problem(FIRST, None, "is listed under the split other") in validate(cache)


def test_a_cache_without_shards_or_manifest(cache):
    edit_manifest(cache, lambda tree: tree.update(splits={}))
    assert Problem("manifest.json", None, "lists no shards") in validate(cache)
    (cache / "manifest.json").unlink()
    (problem,) = validate(cache)
    assert "no finished bakery cache" in problem.what
    assert str(problem) == f"manifest.json: {cache} is no finished bakery cache: it has no manifest.json"


def test_an_id_that_stands_in_two_shards_is_found_in_each_row(cache):
    shutil.copy(cache / FIRST, cache / SECOND)

    def same(tree):
        tree["splits"]["train"][1] = {**tree["splits"]["train"][0], "file": SECOND}

    edit_manifest(cache, same)
    problems = validate(cache)
    assert [(p.file, p.row) for p in problems] == [(SECOND, row) for row in range(10)]
    assert str(problems[3]) == f"{SECOND}, row 3: the id row0003 is also in {FIRST}, row 3"


# -- rows that cannot be, in files with the right checksum -------------------------------------------------------------

ROW = 8  # of the second shard: number 18, 4 response tokens of which 3 are targets


def rewrite(cache, name, change) -> None:
    """Change one column of row 8 of the second shard, as a program with a bug would write it."""
    table = pq.read_table(cache / SECOND)
    values = table.column(name).to_pylist()
    values[ROW] = change(values[ROW])
    at = table.schema.names.index(name)
    pq.write_table(
        table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type)), cache / SECOND
    )
    trust(cache, SECOND)


def put(at, value):
    return lambda values: [*values[:at], value, *values[at + 1 :]]


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("topk_logprobs", put(K, float("nan")), "target 1: a log-prob that is not finite"),
        ("topk_logprobs", put(K, 0.5), "target 1: a positive log-prob"),
        ("topk_logprobs", put(K + 1, -0.0), "target 1: log-probs that do not descend"),
        ("topk_logprobs", put(2 * K + 3, -90.0), "target 2: support and tail hold 0."),
        ("topk_ids", put(0, 32), "target 0: an id outside the vocabulary of 32"),
        ("topk_ids", put(0, -1), "target 0: an id outside the vocabulary of 32"),
        ("topk_ids", lambda ids: [ids[0], ids[0], *ids[2:]], "target 0: a duplicate id"),
        ("support_size", lambda _: [0, K, 2 * K], "target 0: an empty support"),
        ("tail_logprob", put(2, float("nan")), "target 2: a tail"),
        ("tail_logprob", put(2, 0.0), "target 2: support and tail hold 1."),
        ("token_logprob", put(1, 1.0), "target 1: a token log-prob"),
        ("log_norm_T", put(1, float("inf")), "target 1: a log_norm"),
        ("response", put(3, 32), "response has an id outside the vocabulary of 32"),
        ("student_context", put(0, -5), "student_context has an id outside"),
        ("teacher_context", put(0, 99), "teacher_context has an id outside"),
        ("id", lambda _: "row0002", f"the id row0002 is also in {FIRST}, row 2"),
    ],
)
def test_a_row_that_cannot_be_is_named(cache, column, change, says):
    rewrite(cache, column, change)
    problems = validate(cache)
    assert {(p.file, p.row) for p in problems} == {(SECOND, ROW)}, problems
    assert any(says in p.what for p in problems), problems


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("support_size", lambda _: [-K, 2 * K, 2 * K], "support"),
        ("support_size", lambda _: [K, 2 * K], "(2,1)"),
        ("support_size", lambda _: [K, K, K + 1], "13"),
        ("topk_ids", lambda ids: ids[1:], "11 ids"),
        ("tail_logprob", lambda tails: tails[1:], "2 tails"),
        ("is_target", lambda _: [True] * 4, "3 distributions for 4 targets"),
        ("is_target", lambda _: [True] * 3, "4 response tokens but 3"),
        ("is_target", lambda _: [False] * 4, "no token of the response is a target"),
        ("teacher_context", lambda _: [], "empty context"),
        ("log_norm_T", lambda norms: norms[1:], "reshape"),
        ("origin", lambda _: "heaven", "heaven"),
        ("response", put(0, None), "null"),
    ],
)
def test_a_row_that_is_no_record_is_found(cache, column, change, says):
    """Here the types themselves refuse, so the row that is named is the first of its row group."""
    rewrite(cache, column, change)
    problems = validate(cache)
    assert [p.file for p in problems] == [SECOND], problems
    assert says in problems[0].what


def test_supports_are_of_k_or_where_they_are_ragged_no_larger(cache):
    edit_manifest(cache, lambda tree: tree.update(k=K + 1))
    assert [p.what for p in validate(cache)] == ["target 0: a support that is not of k = 5"] * 20
    edit_manifest(cache, lambda tree: tree.update(k=K - 1, top_mass=0.9))
    assert [p.what for p in validate(cache)] == ["target 0: a support larger than k = 3"] * 20


def test_supports_that_sum_to_one_only_within_the_grid(tmp_path):
    """Half a step of rounding is no problem; a mass that no rounding explains is one."""
    cache = write_cache(tmp_path / "c", [record(n) for n in range(10)], logprob_step=1 / 64)
    table = pq.read_table(cache / FIRST)
    shifted = [[x - 1 / 32 for x in row] for row in table.column("topk_logprobs").to_pylist()]
    at = table.schema.names.index("topk_logprobs")
    pq.write_table(
        table.set_column(at, table.schema.field(at), pa.array(shifted, pa.list_(pa.float32()))), cache / FIRST
    )
    trust(cache, FIRST)
    found = validate(cache)
    assert len(found) >= 8  # not where nearly all of the mass is in the tail
    assert all("of the mass, not 1" in p.what for p in found)
