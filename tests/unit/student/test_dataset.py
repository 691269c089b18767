"""Several caches as one data set, each as often as its weight says."""

import pickle
from collections import Counter
from weakref import WeakSet

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import random_record, write_cache
from caches_by_hand import bits
from forked import processes
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bakery.shards.reader import CacheReader
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.kept import Kept
from bakery.student.order import WindowedOrder


def made(path, name, rows, **options):
    train = [random_record(f"{name}{i}", 3 + i % 4, 2 + i % 5, seed=i, **options) for i in range(rows)]
    heldout = [random_record(f"{name}-held{i}", 6, 4, seed=100 + i, **options) for i in range(2)]
    return CacheReader(write_cache(path, {"train": train, "validation": heldout}, **_temperatures(options)))


def _temperatures(options):
    return {"temperatures": options["temperatures"]} if "temperatures" in options else {}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches")
    return made(path / "a", "a", 5), made(path / "b", "b", 8)


def ids(data):
    return [data[i].example.id for i in range(len(data))]


def test_one_cache_is_its_rows_in_order(readers):
    data = CacheDataset([(readers[0], 1.0)], "train", 1.0)
    assert ids(data) == ["a0", "a1", "a2", "a3", "a4"]
    assert ids(CacheDataset([(readers[0], 1.0)], "validation", 1.0)) == ["a-held0", "a-held1"]


def test_weight_2_is_twice_and_one_half_a_fixed_half(readers):
    data = CacheDataset([(readers[0], 2.0), (readers[1], 0.5)], "train", 1.0, seed=3)
    counts = Counter(ids(data))
    assert [counts[f"a{i}"] for i in range(5)] == [2] * 5
    half = {key for key in counts if key.startswith("b")}
    assert len(half) == 4
    assert {counts[key] for key in half} == {1}
    again = CacheDataset([(readers[0], 2.0), (readers[1], 0.5)], "train", 1.0, seed=3)
    assert ids(again) == ids(data)


def test_the_seed_chooses_the_half(readers):
    halves = {tuple(ids(CacheDataset([(readers[1], 0.5)], "train", 1.0, seed=s))) for s in range(6)}
    assert len(halves) > 1


def test_weight_one_and_a_half_is_all_rows_and_half_again(readers):
    counts = Counter(ids(CacheDataset([(readers[1], 1.5)], "train", 1.0)))
    assert sorted(counts.values()) == [1] * 4 + [2] * 4


def test_lengths_and_targets_are_those_of_the_rows(readers):
    data = CacheDataset([(readers[1], 0.5), (readers[0], 2.0)], "train", 1.0)
    rows = [data[i] for i in range(len(data))]
    assert data.lengths.tolist() == [len(r.example.student_context) + len(r.example.response) for r in rows]
    assert data.targets == sum(r.example.targets for r in rows)


def test_a_row_is_the_one_that_was_written(readers):
    record, expected = CacheDataset([(readers[0], 1.0)], "train", 1.0)[3], random_record("a3", 6, 5, seed=3)
    np.testing.assert_array_equal(record.example.response, expected.example.response)
    np.testing.assert_array_equal(record.topk.logprobs, expected.topk.logprobs)
    np.testing.assert_array_equal(record.topk.ids, expected.topk.ids)


def test_a_split_that_only_one_cache_has(readers, tmp_path):
    no_heldout = CacheReader(write_cache(tmp_path / "c", {"train": [random_record("c0")]}))
    assert ids(CacheDataset([(no_heldout, 1.0), (readers[0], 1.0)], "validation", 1.0)) == ["a-held0", "a-held1"]
    assert len(CacheDataset([(no_heldout, 1.0)], "validation", 1.0)) == 0
    assert CacheDataset([(no_heldout, 1.0)], "validation", 1.0).targets == 0


@pytest.mark.parametrize(("temperature", "column"), [(0.5, 0), (2.0, 1), (1.0, None)])
def test_log_norm_is_the_column_of_the_temperature(temperature, column, tmp_path):
    reader = made(tmp_path / "warm", "w", 2, temperatures=(0.5, 2.0))
    expected = random_record("w1", 4, 3, seed=1, temperatures=(0.5, 2.0)).topk.log_norm
    row = CacheDataset([(reader, 1.0)], "train", temperature)[1].topk.log_norm
    np.testing.assert_array_equal(row, expected[:, [] if column is None else [column]])


def test_rows_of_several_shards_and_groups_are_those_of_the_readers(tmp_path):
    records = [random_record(f"r{i:03d}", 4, 1 + i % 3, seed=i) for i in range(150)]
    reader = CacheReader(write_cache(tmp_path / "c", {"train": records}, rows_per_shard=70))
    assert reader.group_rows("train").tolist() == [32, 32, 6, 32, 32, 6, 10]
    data = CacheDataset([(reader, 1.0)], "train", 1.0, window_bytes=1)
    for index in np.random.default_rng(0).permutation(150).tolist():
        assert bits(data[index]) == bits(records[index])


def test_more_shards_than_footers_are_kept_of(tmp_path, monkeypatch):
    records = [random_record(f"r{i:03d}", 4, 2, seed=i) for i in range(12)]
    path = write_cache(tmp_path / "c", {"train": records}, rows_per_shard=4)
    monkeypatch.setattr("bakery.shards.reader.FOOTERS_KEPT", 2)
    opened, real = [], pq.ParquetFile

    def counting(path, metadata=None, **options):
        opened.append((str(path), metadata))
        return real(path, metadata=metadata, **options)

    monkeypatch.setattr("bakery.shards.reader.pq.ParquetFile", counting)
    reader = CacheReader(path)
    assert [bits(record) for record in reader.records("train")] == [bits(record) for record in records]
    assert {metadata for _, metadata in opened} == {None}
    assert Counter(path for path, _ in opened) == {str(path): 2 for path in (path / "data").iterdir()}


def test_a_copy_in_another_process_reads_the_same_and_begins_with_nothing(readers, monkeypatch):
    data = CacheDataset([(readers[0], 2.0), (readers[1], 0.5)], "train", 1.0)
    there = ids(data)
    copy = pickle.loads(pickle.dumps(data))
    decoded, group = [], CacheReader.group
    monkeypatch.setattr(CacheReader, "group", lambda own, *asked: decoded.append(asked) or group(own, *asked))
    assert ids(data) == there
    assert decoded == []  # kept
    assert ids(copy) == there
    assert len(decoded) == len(data.group_bytes)


def test_workers_that_inherit_nothing_give_the_same_batches(readers):
    """A process of a fork server gets its data set as a pickle, as one that is spawned does."""
    data = CacheDataset([(readers[0], 2.0), (readers[1], 1.0)], "train", 1.0)
    settings = {"batch_size": 3, "sampler": WindowedOrder(data, 5), "collate_fn": collate}
    here = list(DataLoader(data, **settings))
    there = list(DataLoader(data, **settings, num_workers=1, multiprocessing_context=processes))
    assert len(here) == len(there) == 6
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Found:
    """A value that is alive as long as somebody keeps it."""

    def __init__(self, key):
        self.key = key


def found(key, alive):
    value = Found(key)
    alive.add(value)
    return value


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=60), st.integers(0, 100))
def test_kept_is_within_its_limit_and_tells_the_truth(asked, limit):
    kept, alive = Kept(limit), WeakSet()
    for key in asked:
        size = key[1]
        assert kept.get(key, size, lambda key=key: found(key, alive)).key == key
        assert kept.held <= max(limit, size)
        assert kept.held == sum(value.key[1] for value in alive)


def test_what_was_asked_for_last_stays():
    kept, made = Kept(3), []
    for key in "abcadab":
        kept.get(key, 1, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "d", "b"]
