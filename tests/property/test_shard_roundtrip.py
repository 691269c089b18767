"""Whatever a teacher answers, a shard gives it back: to the bit without a grid, within half a step with one."""

import io
from math import inf

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from caches_by_hand import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from bakery.records import Example, Record, TopK, ids_array
from bakery.shards.grid import EXACT, Grid
from bakery.shards.schema import from_arrow, to_arrow

many = settings(max_examples=40, deadline=None, database=None)
ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(-100, 0, width=32)


def floats(values) -> np.ndarray:
    return np.array(values, np.float32)


@st.composite
def records(draw, temperatures):
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
    n = sum(mask)
    supports = draw(st.lists(st.lists(ids, min_size=1, max_size=7, unique=True), min_size=n, max_size=n))
    values = [sorted(draw(st.lists(logprobs, min_size=len(s), max_size=len(s))), reverse=True) for s in supports]
    topk = TopK(
        ids_array([i for s in supports for i in s]),
        floats([v for row in values for v in row]),
        ids_array([len(s) for s in supports]),
        floats(draw(st.lists(logprobs | st.just(-inf), min_size=n, max_size=n))),
        floats(draw(st.lists(logprobs, min_size=n, max_size=n))),
        floats(draw(st.lists(logprobs, min_size=n * temperatures, max_size=n * temperatures))).reshape(n, temperatures),
    )
    contexts = [ids_array(draw(st.lists(ids, min_size=1, max_size=5))) for _ in range(2)]
    response = ids_array(draw(st.lists(ids, min_size=len(mask), max_size=len(mask))))
    example = Example(draw(st.text(max_size=9)), *contexts, response, np.array(mask))
    return Record(example, topk, draw(st.sampled_from(["dataset", "teacher", "student"])))


@many
@given(data=st.data(), temperatures=st.sampled_from([(), (2.0,), (0.5, 3.0)]))
def test_a_shard_without_a_grid_gives_every_bit_back(data, temperatures):
    given_records = data.draw(st.lists(records(len(temperatures)), min_size=1, max_size=5))
    file = io.BytesIO()
    batches = [to_arrow([r], EXACT, temperatures) for r in given_records]
    pq.write_table(pa.Table.from_batches(batches), file, row_group_size=2)
    assert [bits(r) for r in from_arrow(pq.read_table(file), EXACT, temperatures)] == [bits(r) for r in given_records]


GRIDS = [Grid(1 / 256, 1 / 16), Grid(1 / 64, 1 / 64), Grid(1 / 10, 1), Grid(0.3, 1), Grid(1, 1)]


@many
@given(record=records(0), grid=st.sampled_from(GRIDS))
def test_a_grid_moves_log_probs_by_half_a_step_and_nothing_else(record, grid):
    exact, stored = record.topk, grid.rounded(record.topk, ())
    moved = np.abs(stored.logprobs.astype(float) - exact.logprobs)
    assert (moved <= grid.step_at(exact.logprobs.astype(float)) / 2 + 1e-5).all()  # float32 at 100 nats
    assert stored.logprobs.max() <= 0
    assert (np.diff(stored.logprobs)[np.diff(stored.row_of_entry()) == 0] <= 0).all()
    for name in ("ids", "support_size", "tail_logprob", "token_logprob"):
        assert getattr(stored, name).tobytes() == getattr(exact, name).tobytes()
    # what is stored already lies on the grid, so that a shard can be written again from another
    assert grid.rounded(stored, ()).logprobs.tobytes() == stored.logprobs.tobytes()


@many
@given(values=st.lists(st.floats(-30, 1e-4), min_size=2, max_size=40), grid=st.sampled_from(GRIDS))
def test_no_rounding_passes_another(values, grid):
    """Most of all around the edges, where the step doubles."""
    steps, edges = grid.levels
    near = [-edge + sign * step / 2.1 for edge, step in zip(edges, steps, strict=True) for sign in (-1, 0, 1)]
    descending = np.unique([*values, *near])[::-1]
    topk = TopK.from_rows([np.arange(len(descending))], [descending], [-1], [-1])
    assert (np.diff(grid.rounded(topk, ()).logprobs) <= 0).all()


@many
@given(above=st.lists(st.floats(0, 0.49), min_size=1, max_size=9), grid=st.sampled_from(GRIDS), level=st.integers(0, 4))
def test_the_slack_is_what_rounding_can_do(above, grid, level):
    """Where it is largest: values that an edge takes half a step up."""
    steps, edges = grid.levels
    at = min(level, len(steps) - 1)
    values = np.sort(-edges[at] - steps[at] * np.array(above))[::-1]
    exact = TopK.from_rows([np.arange(len(values))], [values], [-1], [-1])
    stored = grid.rounded(exact, ())
    before, after = (t.sum_over_support(np.exp(t.logprobs.astype(float))) for t in (exact, stored))
    assert (np.abs(after - before) <= grid.mass_slack(stored) + 1e-6 * len(values)).all()
