"""An epoch's order: every row once, decided by seed and epoch, few row groups at a time, each decoded once."""

from collections import Counter
from itertools import pairwise
from weakref import WeakValueDictionary

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from builders import random_record, write_cache
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bakery.shards.reader import CacheReader
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.kept import Kept
from bakery.student.order import BATCHES_SORTED, WindowedOrder, like_lengths

ROWS = 480  # fifteen row groups


def made(path, name, rows=ROWS):
    records = [random_record(f"{name}{i:04d}", 2 + i % 3, 1 + i * i % 37, seed=i % 40) for i in range(rows)]
    return CacheReader(write_cache(path, {"train": records}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return made(tmp_path_factory.mktemp("order") / "a", "a")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return made(tmp_path_factory.mktemp("order") / "b", "b", 100)


def in_windows(*caches, of=4):
    """A data set whose window is about the `of`-th part of it."""
    whole = CacheDataset(list(caches), "train", 1.0)
    return CacheDataset(list(caches), "train", 1.0, window_bytes=int(whole.group_bytes.sum() / of) + 1)


def epoch(data, number=0, seed=3, batch_size=None):
    order = WindowedOrder(data, seed, batch_size)
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("of", [1, 4, 1000])
def test_every_row_once_an_epoch(reader, of, batch_size):
    data = in_windows((reader, 1.0), of=of)
    order = WindowedOrder(data, 0, batch_size)
    assert len(order) == ROWS
    assert sorted(order) == list(range(ROWS))


@pytest.mark.parametrize("batch_size", [None, 8])
def test_weights_of_several_caches(reader, small, batch_size):
    data = in_windows((small, 2.0), (reader, 0.5))
    seen = Counter(data[i].example.id for i in epoch(data, batch_size=batch_size))
    assert [seen[f"b{i:04d}"] for i in range(100)] == [2] * 100
    half = [key for key in seen if key.startswith("a")]
    assert len(half) == ROWS // 2
    assert {seen[key] for key in half} == {1}


@pytest.mark.parametrize("batch_size", [None, 8])
def test_seed_and_epoch_decide_and_nothing_else(reader, batch_size):
    data, again = (in_windows((reader, 1.0)) for _ in range(2))
    first = epoch(data, 1, batch_size=batch_size)
    np.random.seed(7)
    assert epoch(again, 1, batch_size=batch_size) == first
    others = [epoch(data, *asked, batch_size) for asked in ((0, 3), (2, 3), (1, 4))]
    assert all(other != first for other in others)


def test_an_empty_split_has_an_empty_order(reader):
    assert list(WindowedOrder(CacheDataset([(reader, 1.0)], "validation", 1.0), 0)) == []


def test_a_cache_that_fits_into_the_window_is_shuffled_as_a_whole(reader):
    """The place of a row, and the row before it, tell nothing of where it stood; bounds are four standard errors."""
    data = CacheDataset([(reader, 1.0)], "train", 1.0)
    orders = np.array([epoch(data, number) for number in range(20)])
    moved = np.abs(orders - np.arange(ROWS)).mean() / ROWS
    assert moved == pytest.approx(1 / 3, abs=4 * np.sqrt(1 / 18 / orders.size))
    together = (np.diff(data.groups[orders], axis=1) == 0).mean()
    expected = 31 / (ROWS - 1)
    assert together == pytest.approx(expected, abs=4 * np.sqrt(expected / orders.size))


def test_a_window_mixes_its_groups(reader):
    data = in_windows((reader, 1.0), of=3)
    groups = data.groups[epoch(data)]
    assert 4 <= len(set(groups[:160].tolist())) <= 7
    changes = (np.diff(groups[:100]) != 0).mean()
    assert changes > 0.7  # 1 - 1/5 of five groups side by side; 0.03 if they came one after the other


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 4000), st.integers(0, 9))
def test_a_window_and_a_group_are_memory_enough_to_decode_each_group_once(sizes, window_bytes, seed):
    class Rows:
        groups, group_bytes, lengths = np.repeat(np.arange(len(sizes)), 3), np.array(sizes), np.ones(3 * len(sizes))

    Rows.window_bytes = window_bytes
    order = list(WindowedOrder(Rows, seed))
    assert sorted(order) == list(range(3 * len(sizes)))
    kept, decoded = Kept(window_bytes + max(sizes)), []
    for row in order:
        group = int(Rows.groups[row])
        kept.get(group, sizes[group], lambda group=group: decoded.append(group))
    assert sorted(decoded) == list(range(len(sizes)))


class Decoded(list):
    """A row group's records, which a weak reference can watch."""


@pytest.mark.parametrize("batch_size", [None, 8])
def test_each_row_group_is_decoded_once_an_epoch_within_the_bound(reader, small, batch_size, monkeypatch):
    data = in_windows((reader, 1.0), (small, 2.0))
    limit = data.window_bytes + int(data.group_bytes.max())
    decoded, alive = Counter(), WeakValueDictionary()
    group = CacheReader.group

    def counting(reader, split, number):
        key = len(decoded), int(reader.group_bytes(split)[number])
        decoded[str(reader.path), number] += 1
        assert sum(size for _, size in alive) + key[1] <= limit
        alive[key] = records = Decoded(group(reader, split, number))
        return records

    monkeypatch.setattr(CacheReader, "group", counting)
    rows = sum(
        len(batch["input_ids"])
        for batch in DataLoader(data, 8, sampler=WindowedOrder(data, 0, batch_size), collate_fn=collate)
    )
    assert rows == len(data) == ROWS + 200
    assert len(decoded) == len(data.group_bytes) == 15 + 4
    assert set(decoded.values()) == {1}


# -- rows of like length ---------------------------------------------------------------------------------------------


def padding(lengths, order, size):
    return sum(
        max(lengths[b]) * len(b) - sum(lengths[b]) for b in (order[i : i + size] for i in range(0, len(order), size))
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(1, 9), st.integers(0, 40), st.integers(0, 9))
def test_like_lengths_are_the_same_rows_and_whole_batches_are_of_a_stretch(lengths, size, before, seed):
    rng, lengths = np.random.default_rng(seed), np.array(lengths)
    rows = rng.permutation(len(lengths))
    found = like_lengths(rows, lengths, size, before, rng)
    assert sorted(found) == list(range(len(lengths)))
    first = -before % size  # these complete a batch
    whole = [found[at : at + size] for at in range(first, len(found) - size + 1, size)]
    if len(whole) <= BATCHES_SORTED:  # one pool: what batches span does not overlap
        spans = sorted((lengths[batch].min(), lengths[batch].max()) for batch in whole)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))


@pytest.mark.parametrize("of", [1, 4])
def test_batches_of_like_length_are_little_padded(reader, of):
    data = in_windows((reader, 1.0), of=of)
    plain, grouped = (padding(data.lengths, np.array(epoch(data, batch_size=size)), 8) for size in (None, 8))
    assert grouped < 0.25 * plain
    batches = data.lengths[epoch(data, batch_size=8)].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(np.arange(len(batches)), batches)[0, 1]) < 0.3  # not from short to long


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 8])
def test_what_accelerate_skips_is_what_was_seen(reader, batch_size):
    """As the Trainer resumes: a fresh loader, its first batches skipped, then told its epoch."""

    def loader():
        data = in_windows((reader, 1.0))
        plain = DataLoader(data, 8, sampler=WindowedOrder(data, 3, batch_size), collate_fn=list)
        return prepare_data_loader(plain, put_on_device=False)

    def ids(batches):
        return [[record.example.id for record in batch] for batch in batches]

    unbroken = loader()
    unbroken.set_epoch(2)
    whole = ids(unbroken)
    resumed = skip_first_batches(loader(), 17)
    resumed.set_epoch(2)
    assert ids(resumed) == whole[17:]
    assert len(whole) == ROWS // 8
