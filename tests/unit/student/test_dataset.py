"""Several caches as one data set, each as often as its weight says."""

from collections import Counter

import numpy as np
import pytest
from builders import random_record, write_cache

from bakery.shards.reader import CacheReader
from bakery.student.dataset import CacheDataset


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
