"""The grid of stored log-probs, by hand."""

from math import exp

import numpy as np
import pytest
from builders import topk_of
from caches_by_hand import record, write_cache

from bakery.records import TopK
from bakery.shards.grid import EXACT, Grid
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate

DEFAULT = Grid(1 / 256, 1 / 16)


def one(*logprobs):
    return TopK.from_rows([np.arange(len(logprobs))], [logprobs], [-9], [-9])


@pytest.mark.parametrize(
    ("logprob", "step"),
    # An edge is the first multiple of the step at or above j · log 4 = 1.3863, 2.7726, 4.1589, 5.5452.
    [
        (0, 1 / 256),
        (-1.39, 1 / 256),
        (-178 / 128, 1 / 128),  # 1.390625
        (-2.78, 1 / 128),
        (-178 / 64, 1 / 64),  # 2.78125
        (-4.18, 1 / 64),
        (-134 / 32, 1 / 32),  # 4.1875
        (-5.56, 1 / 32),
        (-89 / 16, 1 / 16),  # 5.5625
        (-50, 1 / 16),
    ],
)
def test_steps_double_with_each_factor_of_four(logprob, step):
    assert DEFAULT.step_at(np.array([logprob])) == [step]


def test_rounding_by_hand():
    stored = DEFAULT.rounded(one(-0.1, -1.7, -3.0, -5.0, -8.0, -8.04), ())
    # 25.6, 217.6, 192, 160, 128 and 128.64 steps
    assert stored.logprobs.tolist() == [-26 / 256, -218 / 128, -192 / 64, -160 / 32, -8.0, -129 / 16]


def test_one_step_everywhere_is_the_grid_of_format_1():
    topk = topk_of(3 * np.random.default_rng(0).standard_normal((5, 300)), [0] * 5, 60)
    uniform = (np.round(topk.logprobs.astype(float) * 64) / 64).astype(np.float32)
    assert Grid(1 / 64, 1 / 64).rounded(topk, ()).logprobs.tobytes() == uniform.tobytes()


def test_the_coarsest_is_a_bound_that_need_not_be_met():
    assert Grid(1 / 10, 0.75).step_at(np.array([-40.0])) == pytest.approx(0.4)


def test_without_a_grid_nothing_moves_and_nothing_is_slack():
    topk = one(-0.1, -3.3)
    assert not EXACT
    assert EXACT.rounded(topk, ()) is topk
    assert EXACT.mass_slack(topk).tolist() == [0]


def test_the_slack_by_hand():
    stored = one(-0.5, -6.0)  # steps of 1/256 and 1/16
    expected = exp(-0.5) * (exp(1 / 512) - 1) + exp(-6) * (exp(1 / 32) - 1)
    assert DEFAULT.mass_slack(stored) == pytest.approx([expected])


def test_a_cache_on_it_is_sound_and_read_with_all_its_mass(tmp_path):
    rows = [record(n, (2.0,), vocab=500, k=60) for n in range(8)]
    steps = {"logprob_step": 1 / 256, "logprob_step_max": 1 / 16}
    cache = write_cache(tmp_path / "c", rows, k=60, vocab_size=500, temperatures=(2.0,), **steps)
    assert validate(cache) == []
    for row, read in zip(rows, CacheReader(cache).records(), strict=True):
        mass = read.topk.sum_over_support(np.exp(read.topk.logprobs.astype(float)))
        assert mass + np.exp(read.topk.tail_logprob.astype(float)) == pytest.approx(1, abs=1e-6)
        assert np.abs(read.topk.logprobs - row.topk.logprobs).max() <= 1 / 16
