"""Record <-> Arrow: what is stored, what is rounded and what is read back."""

from dataclasses import replace
from math import exp, inf, log

import numpy as np
import pyarrow as pa
import pytest
from builders import topk_of
from caches_by_hand import bits, record

from bakery.errors import CacheError
from bakery.records import Example, Record, TopK, ids_array
from bakery.shards.grid import EXACT, Grid, rescaled
from bakery.shards.schema import from_arrow, shard_schema, to_arrow

STEP = 1 / 64
GRID = Grid(STEP, STEP)


def ragged() -> Record:
    topk = TopK(
        ids_array([5, 0, 9, 1, 2, 3]),
        np.array([-0.1, -2.5, -0.30000001, -0.7, -1.3, -9.87654321], np.float32),
        ids_array([2, 1, 3]),
        np.array([-7.25, -1.5, -inf], np.float32),
        np.array([-0.1, -30, -1.3], np.float32),
        np.array([[0.5, 2.25], [0.25, 1e-7], [3, 4]], np.float32),
    )
    mask = np.array([True, False, True, True])
    return Record(Example("é", ids_array([1]), ids_array([2, 3]), ids_array([4, 5, 6, 7]), mask), topk, "student")


def test_the_wire_format():
    """Whoever changes this changes versions.py and docs/cache-format.md with it."""
    assert shard_schema((2.0,)).to_string() == "\n".join(
        [
            "id: string not null",
            *(
                f"{name}: list<item: {kind}> not null\n  child 0, item: {kind}"
                for name, kind in [
                    ("student_context", "int32"),
                    ("teacher_context", "int32"),
                    ("response", "int32"),
                    ("is_target", "bool"),
                    ("topk_ids", "int32"),
                    ("topk_logprobs", "float"),
                    ("support_size", "int32"),
                    ("tail_logprob", "float"),
                    ("token_logprob", "float"),
                ]
            ),
            "origin: string not null",
            "log_norm_T: list<item: float> not null\n  child 0, item: float",
        ]
    )
    assert shard_schema(()) == shard_schema((2.0,)).remove(11)


def test_a_row_is_flat_on_disk():
    row = to_arrow([ragged()], EXACT, (2.0, 4.0)).to_pylist()[0]
    assert row["topk_ids"] == [5, 0, 9, 1, 2, 3]
    assert row["support_size"] == [2, 1, 3]
    assert row["log_norm_T"] == [0.5, 2.25, 0.25, np.float32(1e-7), 3, 4]
    assert row["tail_logprob"] == [-7.25, -1.5, -inf]
    assert row["is_target"] == [True, False, True, True]


def test_step_0_keeps_every_bit():
    records = [ragged(), replace(ragged(), origin="teacher")]
    batch = to_arrow(records, EXACT, (2.0, 4.0))
    assert [bits(r) for r in from_arrow(batch, EXACT, (2.0, 4.0))] == [bits(r) for r in records]
    # a slice, and a table of several chunks, as readers meet them
    table = pa.Table.from_batches([batch.slice(1, 1), batch])
    assert [bits(r) for r in from_arrow(table, EXACT, (2.0, 4.0))] == [bits(r) for r in [records[1], *records]]


def test_the_grid_by_hand():
    # log .5 = −.693 → −.75, log .25 = −1.386 → −1.5 on a grid of .25
    topk = TopK.from_rows([[8, 3]], [[log(0.5), log(0.25)]], [log(0.25)], [log(0.5)])
    stored = Grid(0.25, 0.25).rounded(topk, ())
    assert stored.logprobs.tolist() == [-0.75, -1.5]
    assert stored.tail_logprob[0] == np.float32(log(0.25))
    # Σ exp = .472367 + .223130 = .695497; read is scaled by .75 / .695497 = 1.078366
    assert np.exp(rescaled(stored).logprobs) == pytest.approx([0.472367 * 1.078366, 0.223130 * 1.078366], abs=2e-6)


def test_rounding_is_at_most_half_a_step_and_tails_are_exact():
    exact = record(4, vocab=500, k=60).topk
    stored = GRID.rounded(exact, ())
    assert np.abs(stored.logprobs - exact.logprobs).max() <= STEP / 2
    assert np.abs(stored.logprobs - exact.logprobs).max() > STEP / 4  # and it does round
    assert (stored.logprobs / STEP == np.round(stored.logprobs / STEP)).all()
    assert stored.logprobs.max() <= 0
    for name in ("ids", "support_size", "tail_logprob", "token_logprob"):
        assert getattr(stored, name).tobytes() == getattr(exact, name).tobytes()


def test_what_is_read_holds_all_that_the_tail_does_not():
    example = record(4, vocab=500, k=60)
    read = next(iter(from_arrow(to_arrow([example], GRID, ()), GRID, ()))).topk
    mass = read.sum_over_support(np.exp(read.logprobs.astype(float)))
    assert mass + np.exp(read.tail_logprob.astype(float)) == pytest.approx(1, abs=1e-6)
    assert np.abs(read.logprobs - example.topk.logprobs).max() <= STEP
    assert (np.diff(read.logprobs)[np.diff(read.row_of_entry()) == 0] <= 0).all()


def test_a_teacher_that_is_sure_is_read_as_sure():
    tail = log(1e-9)
    topk = TopK.from_rows([[0, 1]], [[-1e-6, log(1e-6)]], [tail], [tail])
    read = next(iter(from_arrow(to_arrow([one_target(topk)], GRID, ()), GRID, ()))).topk
    assert exp(read.logprobs[1]) == pytest.approx(1e-6, rel=STEP)
    assert -1.02e-6 < read.logprobs[0] < -0.98e-6
    assert read.tail_logprob[0] == np.float32(tail)


def one_target(topk: TopK) -> Record:
    n = len(topk)
    return Record(Example("x", ids_array([1]), ids_array([1]), ids_array([1] * n), np.ones(n, bool)), topk, "dataset")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("lead", [5.0, 8.0])
def test_the_norm_leaves_the_true_rest_at_its_temperature(lead, temperature):
    """1 − Σ exp(read / T − norm), all in what a reader has, against the dense distribution."""
    logits_NV = np.random.default_rng(0).standard_normal((8, 300))
    logits_NV[:, 7] += lead * np.linspace(1, 2, 8)  # from rather sure to very sure
    topk = topk_of(logits_NV, np.zeros(8, int), 20, (temperature,))
    p_NV = np.exp(logits_NV / temperature - np.logaddexp.reduce(logits_NV / temperature, axis=1, keepdims=True))
    np.put_along_axis(p_NV, topk.ids.reshape(8, 20), 0, axis=1)
    rest_N = p_NV.sum(axis=1)

    read = next(iter(from_arrow(to_arrow([one_target(topk)], GRID, (temperature,)), GRID, (temperature,)))).topk
    inside = read.logprobs.astype(float) / temperature - read.log_norm[read.row_of_entry(), 0].astype(float)
    found_N = 1 - read.sum_over_support(np.exp(inside))
    assert found_N == pytest.approx(rest_N, rel=1e-5, abs=2e-7)


def test_step_0_keeps_the_exact_norm():
    topk = topk_of(np.random.default_rng(0).standard_normal((3, 50)), [0, 1, 2], 5, (2.0,))
    assert EXACT.rounded(topk, (2.0,)) is topk


@pytest.mark.parametrize("value", [None, [1, None]])
def test_a_null_is_named(value):
    table = to_arrow([ragged()], EXACT, ())
    column = pa.array([value], pa.list_(pa.int32()))
    broken = table.set_column(3, pa.field("response", column.type), column)
    with pytest.raises(CacheError, match="column response holds a null"):
        list(from_arrow(broken, EXACT, ()))


def test_a_foreign_origin_is_named():
    table = to_arrow([ragged()], EXACT, ())
    broken = table.set_column(10, "origin", pa.array(["heaven"]))
    with pytest.raises(CacheError, match="origin 'heaven' is none of dataset, teacher, student"):
        list(from_arrow(broken, EXACT, ()))
