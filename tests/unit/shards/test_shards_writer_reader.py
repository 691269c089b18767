"""Records in, the same records out: over windows, shards, row groups, crashes, and other people's readers."""

import errno

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from caches_by_hand import bits, edit_manifest, files, fill, identity, record, trust, write_cache

from bakery.errors import CacheError, OutputError, RecipeError
from bakery.shards.journal import Journal
from bakery.shards.manifest import Manifest
from bakery.shards.reader import CacheReader
from bakery.shards.writer import CacheWriter

RECORDS = [record(n) for n in range(150)]


def fifth(r) -> str:
    return "validation" if int(r.example.id[3:]) % 5 == 0 else "train"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Three windows of 70, 70 and 10; training shards of 56 (row groups of 32 and 24), 56 and 8 rows."""
    return write_cache(tmp_path_factory.mktemp("caches") / "c", RECORDS, fifth)


def open_writer(out, **changes) -> CacheWriter:
    return CacheWriter.open_or_resume(out, identity(**changes), {"made": "by hand"})


# -- writer and reader -------------------------------------------------------------------------------------------------


def test_every_record_comes_back_to_the_bit_and_in_order(cache):
    reader = CacheReader(cache)
    assert reader.splits == ["train", "validation"]
    for split in reader.splits:
        expected = [bits(r) for r in RECORDS if fifth(r) == split]
        assert [bits(r) for r in reader.records(split)] == expected
        assert reader.rows(split) == len(expected)


def test_one_row_at_a_time_is_the_same_as_all_in_a_row(cache):
    reader = CacheReader(cache)
    assert [group for shard in reader._files["train"] for group in shard.group_ends] == [32, 56, 32, 56, 8]
    for split in reader.splits:
        rows = [bits(r) for r in reader.records(split)]
        for i in [*range(len(rows)), *np.random.default_rng(0).permutation(len(rows)).tolist()]:
            assert bits(reader.read(split, i)) == rows[i], (split, i)


def test_lengths_and_targets_of_rows(cache):
    reader = CacheReader(cache)
    rows = [r for r in RECORDS if fifth(r) == "train"]
    assert reader.lengths("train").tolist() == [len(r.example.student_context) + len(r.example.response) for r in rows]
    # row n has 1 + n % 5 response tokens, of which the first is a target only where it is alone: rows 1 to 6 have
    assert reader.targets("train").tolist()[:5] == [1, 2, 3, 4, 1]
    assert reader.targets("train").sum() == reader.manifest.total("targets", "train") == 30 * (1 + 2 + 3 + 4)


def test_rows_and_splits_that_are_not_there(cache):
    reader = CacheReader(cache)
    for index in (-1, 120):
        with pytest.raises(IndexError, match=f"row {index} of 120"):
            reader.read("train", index)
    for ask in (reader.records, reader.lengths, lambda split: reader.read(split, 0)):
        with pytest.raises(CacheError, match="has no split 'test', only train, validation"):
            list(ask("test"))


def test_an_unfinished_cache_is_not_read(tmp_path):
    with open_writer(tmp_path / "c") as writer:
        writer.add(RECORDS[:3])
    with pytest.raises(CacheError, match="is no finished bakery cache"):
        CacheReader(tmp_path / "c")


def test_a_damaged_shard_is_named_when_it_is_opened(tmp_path):
    write_cache(tmp_path / "c", RECORDS[:40])
    shard = tmp_path / "c/data/train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=rf"{shard} has {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        CacheReader(tmp_path / "c")
    shard.write_bytes(whole[:-4] + b"PAR0")
    with pytest.raises(CacheError, match=rf"{shard}: damaged"):
        CacheReader(tmp_path / "c")
    shard.unlink()
    with pytest.raises(CacheError, match=rf"{shard} is missing"):
        CacheReader(tmp_path / "c")


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path):
    write_cache(tmp_path / "c", RECORDS[:40])
    shard = tmp_path / "c/data/train-00000.parquet"
    whole, rows = shard.read_bytes(), [bits(r) for r in RECORDS[:40]]
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    errors = {}
    for at in range(1, len(whole) - 8, 97):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            assert [bits(r) for r in CacheReader(tmp_path / "c").records()] == rows, f"byte {at} of {len(whole)}"
        except CacheError as error:
            errors[at] = str(error)
    assert all(str(shard) in error for error in errors.values())
    assert sum(at < footer for at in errors) > 0.9 * footer / 97  # pages carry checksums


def test_a_shard_of_another_schema_is_foreign(tmp_path):
    write_cache(tmp_path / "c", RECORDS[:40])
    name = "data/train-00000.parquet"
    pq.write_table(pq.read_table(tmp_path / "c" / name).drop(["origin"]), tmp_path / "c" / name)
    trust(tmp_path / "c", name)
    with pytest.raises(CacheError, match="its columns are not those of a bakery shard"):
        CacheReader(tmp_path / "c")


def test_rows_that_the_manifest_does_not_count(tmp_path):
    write_cache(tmp_path / "c", RECORDS[:40])
    edit_manifest(tmp_path / "c", lambda tree: tree["splits"]["train"][0].update(rows=39))
    with pytest.raises(CacheError, match="holds 40 rows, the manifest says 39"):
        CacheReader(tmp_path / "c")


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_shards_do_not_depend_on_the_order_of_answers_or_on_crashes(cache, tmp_path):
    with open_writer(tmp_path / "c") as writer:
        writer.add(RECORDS[100:3:-7])
        writer.add(RECORDS[149:150])
    with open_writer(tmp_path / "c") as writer:
        (first, *_) = writer.windows([r.example for r in RECORDS])
        assert len(writer.missing(first.examples)) == 70 - len([n for n in range(100, 3, -7) if n < 70])
        writer.add([r for r in RECORDS[:70] if r.example in writer.missing([r.example])])
        writer.publish(first, [fifth(r) for r in RECORDS[:70]])
    with open_writer(tmp_path / "c") as writer:
        assert [w.number for w in writer.windows([r.example for r in RECORDS])] == [1, 2]
        assert writer.missing([RECORDS[149].example]) == []
        fill(writer, RECORDS, fifth)
    assert files(tmp_path / "c") == files(cache)


def test_a_crash_while_a_shard_is_written_publishes_nothing(cache, tmp_path, monkeypatch):
    def tear(table, path, **_):
        path.write_bytes(b"PAR1 torn")
        raise OSError(errno.ENOSPC, "Error writing bytes")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", tear)
        with pytest.raises(OutputError, match=f"{tmp_path}/c cannot be written: No space left on device; what was"):
            write_cache(tmp_path / "c", RECORDS, fifth)
    assert list((tmp_path / "c/data").iterdir()) == []
    assert Manifest.load(tmp_path / "c/manifest.partial.json").splits == {}
    with open_writer(tmp_path / "c") as writer:
        assert writer.missing([r.example for r in RECORDS[:70]]) == []
        fill(writer, RECORDS, fifth)
    assert files(tmp_path / "c") == files(cache)


def test_a_published_window_leaves_the_journal_and_the_memory(tmp_path):
    with open_writer(tmp_path / "c") as writer:
        for window in writer.windows([r.example for r in RECORDS]):
            writer.add([r for r in RECORDS if r.example in window.examples])
            assert (len(writer.answered), (tmp_path / "c/journal").exists()) == (len(window.examples), True)
            writer.publish(window, ["train"] * len(window.examples))
            assert (len(writer.answered), (tmp_path / "c/journal").exists()) == (0, False)


def test_rows_of_a_window_that_was_published_before_a_crash_are_forgotten(tmp_path, monkeypatch):
    """Or else the journal would never be empty again, and grow with every window of the run."""
    examples = [r.example for r in RECORDS]
    with monkeypatch.context() as patch, open_writer(tmp_path / "c") as writer:
        patch.setattr(Journal, "clear", interrupted)
        (first, *_) = writer.windows(examples)
        writer.add(RECORDS[:70])
        with pytest.raises(KeyboardInterrupt):
            writer.publish(first, ["train"] * 70)
    with open_writer(tmp_path / "c") as writer:
        (second, _) = writer.windows(examples)
        writer.add(RECORDS[70:140])
        writer.publish(second, ["train"] * 70)
        assert (len(writer.answered), (tmp_path / "c/journal").exists()) == (0, False)


def interrupted(*_):
    raise KeyboardInterrupt


def test_more_windows_than_a_shards_name_can_count_are_refused_before_anything_is_asked(tmp_path):
    examples = [RECORDS[0].example] * 100_001
    says = r"100,001 windows of 1 rows .*a cache has 100,000 at most; set cache.rows_per_shard=2 or more"
    with open_writer(tmp_path / "c", rows_per_shard=1) as writer, pytest.raises(RecipeError, match=says):
        writer.windows(examples)
    with open_writer(tmp_path / "c", rows_per_shard=1) as writer:
        assert writer.windows(examples[:-1])[-1].number == 99_999


def test_a_finished_cache_holds_nothing_of_its_making(cache):
    assert [name for name in files(cache) if not name.startswith("data/")] == ["README.md", "manifest.json"]
    assert sorted(p.name for p in cache.iterdir()) == ["README.md", "data", "manifest.json"]


# -- where it may write ------------------------------------------------------------------------------------------------


def test_another_identity_is_refused_with_the_key_and_both_values(cache):
    with pytest.raises(CacheError, match=r"another recipe \(k: 4 there, 5 here; top_mass: None there, 0.9 here\)"):
        open_writer(cache, k=5, top_mass=0.9)


@pytest.mark.parametrize("name", ["notes.txt", "data/notes.txt", "README.md"])
def test_a_directory_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / "c/data").mkdir(parents=True)
    (tmp_path / "c" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=rf"{tmp_path}/c holds something else \({name}\)"):
        open_writer(tmp_path / "c")
    assert files(tmp_path / "c") == {name: b"mine"}


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "c").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="is a file; name a directory"):
        open_writer(tmp_path / "c")


def test_an_empty_directory_will_do(tmp_path):
    (tmp_path / "c/data").mkdir(parents=True)  # as a run leaves it that was killed in its first moment
    with open_writer(tmp_path / "c") as writer:
        fill(writer, RECORDS[:2])
    assert CacheReader(tmp_path / "c").rows("train") == 2


# -- other readers -----------------------------------------------------------------------------------------------------

NINE = RECORDS[9].topk  # row 8 of the training split: 1 + 9 % 5 = 5 tokens, 4 targets, 16 entries


def test_pandas_reads_it(cache):
    frame = pd.concat(pd.read_parquet(p) for p in sorted(cache.glob("data/train-*.parquet")))
    assert len(frame) == 120
    row = frame[frame["id"] == "row0009"].iloc[0]
    assert row["topk_ids"].tolist() == NINE.ids.tolist()
    assert row["topk_logprobs"].tobytes() == NINE.logprobs.tobytes()
    assert row["support_size"].tolist() == [4, 4, 4, 4]


def test_polars_reads_it(cache):
    frame = pl.read_parquet(cache / "data/train-*.parquet")
    row = frame.row(by_predicate=pl.col("id") == "row0009", named=True)
    assert row["tail_logprob"] == NINE.tail_logprob.tolist()
    assert row["is_target"] == [False, True, True, True, True]
    assert frame["support_size"].list.len().sum() == 300


def test_duckdb_reads_it(cache):
    rows = duckdb.sql(
        f"select count(*), sum(len(topk_ids)), sum(list_sum(support_size)) from '{cache}/data/validation-*.parquet'"
    )
    assert rows.fetchall()[0] == (30, 120, 120)  # rows 0, 5, …: 1 target of 4 entries each
    found = duckdb.sql(f"select token_logprob from '{cache}/data/*.parquet' where id = 'row0009'").fetchall()[0][0]
    assert found == NINE.token_logprob.tolist()


def test_datasets_reads_it_with_its_splits(cache, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    loaded = datasets.load_dataset(str(cache))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 120, "validation": 30}
    row = loaded["train"][7]
    assert row["id"] == "row0009"
    assert row["topk_ids"] == NINE.ids.tolist()
    assert row["topk_logprobs"] == NINE.logprobs.tolist()


def test_the_card_counts_what_is_there(cache):
    card = (cache / "README.md").read_text(encoding="utf-8")
    size = sum(p.stat().st_size for p in cache.glob("data/train-*"))
    assert f"| train | 120 | 300 | {size:,} |" in card
    assert "| top-k | 4 of 32 tokens |" in card
    assert "stored on exact float32" in card
