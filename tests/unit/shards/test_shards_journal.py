"""Answers on their way to a shard: whatever a crash leaves of the last batch, all before it is recovered."""

import os

import pyarrow as pa
import pytest
from caches_by_hand import record

from bakery.shards.grid import EXACT
from bakery.shards.journal import Journal
from bakery.shards.schema import shard_schema, to_arrow

SCHEMA = shard_schema(())


def batch(*numbers: int) -> pa.RecordBatch:
    return to_arrow([record(n) for n in numbers], EXACT, ())


def ids(batches) -> list[list[str]]:
    return [b.column("id").to_pylist() for b in batches]


@pytest.fixture
def torn(tmp_path):
    """A stream of three batches as a killed process leaves it, without its end, and where each batch ends."""
    journal = Journal(tmp_path / "whole", SCHEMA)
    sizes = [journal.append(batch(*numbers)) for numbers in ([4, 5, 6], [1, 2], [3])]
    data = (tmp_path / "whole/00000.arrows").read_bytes()
    ends = [len(data) - sum(sizes[i + 1 :]) for i in range(3)]
    yield data, ends
    journal.close()


def test_what_was_appended_is_there_before_the_stream_is_closed(tmp_path, torn):
    recovered = Journal(tmp_path / "whole", SCHEMA).recover()
    assert ids(recovered) == [["row0004", "row0005", "row0006"], ["row0001", "row0002"], ["row0003"]]
    assert recovered[0].equals(batch(4, 5, 6))


def test_a_stream_cut_at_any_byte_gives_every_whole_batch(tmp_path, torn):
    data, ends = torn
    assert ends[2] == len(data)
    answers = [batch(4, 5, 6), batch(1, 2), batch(3)]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/00000.arrows").write_bytes(data)
    for size in [*range(len(data), ends[1] - 1, -1), *range(ends[1] - 1, 0, -61)]:
        os.truncate(tmp_path / "cut/00000.arrows", size)
        recovered = Journal(tmp_path / "cut", SCHEMA).recover()
        assert len(recovered) == sum(end <= size for end in ends), f"cut at {size} of {len(data)}, batches at {ends}"
        assert all(found.equals(answer) for found, answer in zip(recovered, answers, strict=False))


def test_a_cut_batch_with_zeros_behind_it(tmp_path, torn):
    """After a power cut a file may have its full length without its last blocks."""
    data, ends = torn
    (tmp_path / "cut").mkdir()
    for size in range(ends[1], ends[1] + 9):
        (tmp_path / "cut/00000.arrows").write_bytes(data[:size].ljust(len(data), b"\0"))
        assert ids(Journal(tmp_path / "cut", SCHEMA).recover())[:2] == [
            ["row0004", "row0005", "row0006"],
            ["row0001", "row0002"],
        ]


def test_each_process_writes_a_stream_of_its_own(tmp_path):
    for numbers in ([1], [2, 3]):
        with Journal(tmp_path / "journal", SCHEMA) as journal:
            journal.append(batch(*numbers))
    assert sorted(p.name for p in (tmp_path / "journal").iterdir()) == ["00000.arrows", "00001.arrows"]
    assert ids(Journal(tmp_path / "journal", SCHEMA).recover()) == [["row0001"], ["row0002", "row0003"]]


def test_a_torn_stream_hides_none_that_came_after_it(tmp_path, torn):
    data, ends = torn
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/00000.arrows").write_bytes(data[: ends[1] - 1])
    with Journal(tmp_path / "journal", SCHEMA) as journal:
        journal.append(batch(3))
    assert ids(Journal(tmp_path / "journal", SCHEMA).recover()) == [["row0004", "row0005", "row0006"], ["row0003"]]


def test_streams_left_by_a_crash_in_the_middle_of_clearing_are_no_hindrance(tmp_path):
    for number in (1, 2, 3):
        with Journal(tmp_path / "journal", SCHEMA) as journal:
            journal.append(batch(number))
    (tmp_path / "journal/00000.arrows").unlink()
    with Journal(tmp_path / "journal", SCHEMA) as journal:
        journal.append(batch(4))
    assert ids(Journal(tmp_path / "journal", SCHEMA).recover()) == [["row0002"], ["row0003"], ["row0004"]]


def test_a_cleared_journal_is_gone_and_can_begin_again(tmp_path):
    with Journal(tmp_path / "journal", SCHEMA) as journal:
        journal.append(batch(1))
        journal.clear()
        assert not (tmp_path / "journal").exists()
        journal.clear()
        journal.append(batch(2))
    assert ids(Journal(tmp_path / "journal", SCHEMA).recover()) == [["row0002"]]


def test_what_is_no_answer_of_this_cache_is_not_recovered(tmp_path):
    (tmp_path / "journal").mkdir()
    assert Journal(tmp_path / "journal", SCHEMA).recover() == []
    (tmp_path / "journal/00000.arrows").write_bytes(b"not Arrow at all")
    (tmp_path / "journal/00001.arrows").write_bytes(b"")
    with Journal(tmp_path / "journal", shard_schema((2.0,))) as other:
        other.append(to_arrow([record(1, (2.0,))], EXACT, (2.0,)))
    assert Journal(tmp_path / "journal", SCHEMA).recover() == []
