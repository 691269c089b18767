"""The padding and the shift, in numbers written by hand."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bakery.records import Example, Record, TopK, ids_array
from bakery.student.collate import collate


def floats(*values):
    return np.array(values, np.float32)


def records():
    """Two turns with a token between them that is no target, then a record that is all targets."""
    first = Example(
        "a", ids_array([5, 6, 7]), ids_array([1, 2]), ids_array([10, 11, 12, 13]), np.array([0, 1, 0, 1], bool)
    )
    second = Example("b", ids_array([8]), ids_array([9, 9, 9, 9]), ids_array([20, 21]), np.array([1, 1], bool))
    topks = [
        TopK(
            ids_array([30, 31, 32, 33]),
            floats(-0.5, -0.25, -1.5, -2.5),
            ids_array([1, 3]),
            floats(-1.0, -4.0),
            floats(-7.0, -1.5),
            floats([0.125], [0.25]),
        ),
        TopK(
            ids_array([40, 41, 42]),
            floats(-0.75, -1.25, -0.0625),
            ids_array([2, 1]),
            floats(-2.0, -inf),
            floats(-0.75, -8.0),
            floats([0.375], [0.5]),
        ),
    ]
    return [Record(e, t, "dataset") for e, t in zip((first, second), topks, strict=True)]


EXPECTED = {
    "input_ids": [[5, 6, 7, 10, 11, 12, 13], [8, 20, 21, 0, 0, 0, 0]],
    "attention_mask": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    # 11 stands at 4 and is predicted at 3, 13 stands at 6 and is predicted at 5; 20 at 0, 21 at 1.
    "target_index": [[0, 3], [0, 5], [1, 0], [1, 1]],
    "labels": [11, 13, 20, 21],
    "topk_logprobs": [[-0.5, -inf, -inf], [-0.25, -1.5, -2.5], [-0.75, -1.25, -inf], [-0.0625, -inf, -inf]],
    "tail_logprob": [-1.0, -4.0, -2.0, -inf],
    "log_norm": [0.125, 0.25, 0.375, 0.5],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers(name):
    assert collate(records())[name].tolist() == EXPECTED[name]


def test_the_real_entries_keep_their_ids():
    batch = collate(records())
    real = batch["topk_logprobs"] > -inf
    assert batch["topk_ids"][real].tolist() == [30, 31, 32, 33, 40, 41, 42]


def test_the_label_follows_the_position_that_predicts_it():
    batch = collate(records())
    row, position = batch["target_index"].T
    assert torch.equal(batch["input_ids"][row, position + 1], batch["labels"])


def test_types_are_those_that_torch_indexes_with():
    kinds = {name: tensor.dtype for name, tensor in collate(records()).items()}
    floating = {"topk_logprobs", "tail_logprob", "log_norm"}
    assert kinds == {name: torch.float32 if name in floating else torch.int64 for name in kinds}
    assert set(kinds) == {*EXPECTED, "topk_ids"}


@pytest.mark.parametrize("columns", [0, 2])
def test_without_exactly_one_norm_a_target_there_is_no_log_norm(columns):
    from dataclasses import replace

    first, second = records()
    other = replace(second, topk=replace(second.topk, log_norm=np.zeros((2, columns), np.float32)))
    assert "log_norm" not in collate([first, other])


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_supports_are_padded_target_by_target(sizes, as_long):
    """Against the plain way, a target at a time. `as_long`: all supports of one length, which is a fast path."""
    rng = np.random.default_rng(0)
    sizes = [[4] * len(row) for row in sizes] if as_long else sizes
    longest, given_records, expected = max(map(max, sizes)), [], []
    for row in sizes:
        entries = sum(row)
        ids, logprobs = ids_array(rng.integers(0, 99, entries)), -rng.random(entries).astype(np.float32)
        zeros = np.zeros(len(row), np.float32)
        topk = TopK(ids, logprobs, ids_array(row), zeros, zeros)
        example = Example("x", ids_array([1]), ids_array([1]), ids_array([2] * len(row)), np.ones(len(row), bool))
        given_records.append(Record(example, topk, "dataset"))
        ends = np.cumsum(row)
        for end, size in zip(ends, row, strict=True):
            empty = longest - size
            at = slice(end - size, end)
            expected.append(([*ids[at], *[0] * empty], [*logprobs[at], *[-inf] * empty]))
    batch = collate(given_records)
    assert batch["topk_ids"].tolist() == [ids for ids, _ in expected]
    assert batch["topk_logprobs"].tolist() == [logprobs for _, logprobs in expected]
