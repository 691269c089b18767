"""plan_batches: a partition, under its budget, longest first. padded: rectangles by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakery.batching import padded, plan_batches
from bakery.records import ids_array


def test_hand_written_plan():
    #          0  1  2  3  4  5
    lengths = [3, 9, 4, 4, 1, 10]
    # 10 alone (9 beside it would make 20), 9 alone (4 beside it: 18), 4+4+3 = 12 padded, 1 would make 16.
    assert plan_batches(lengths, 15) == [[5], [1], [2, 3, 0], [4]]
    assert plan_batches(lengths, 16) == [[5], [1], [2, 3, 0, 4]]
    assert plan_batches(lengths, 20) == [[5, 1], [2, 3, 0, 4]]


@pytest.mark.parametrize(("lengths", "expected"), [([], []), ([7, 50, 7], [[1], [0], [2]])])
def test_a_sequence_beyond_the_budget_goes_alone(lengths, expected):
    assert plan_batches(lengths, 5) == expected


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 120))
def test_every_sequence_once_under_the_budget_longest_first(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.integers(40, 120))
def test_no_batch_has_room_for_the_next_sequence(lengths, budget):
    batches = plan_batches(lengths, budget)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_padded_at_either_side():
    sequences = [ids_array([5]), ids_array([6, 0, 8]), ids_array([9, 10])]
    ids, mask = padded(sequences)
    assert ids.tolist() == [[5, 0, 0], [6, 0, 8], [9, 10, 0]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    ids, mask = padded(sequences, left=True)
    assert ids.tolist() == [[0, 0, 5], [6, 0, 8], [0, 9, 10]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == "int64"
