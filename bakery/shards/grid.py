"""The grid that stored log-probs sit on: fine where the teacher is sure, coarse among tokens it hardly expects.

A rounding error of up to half a step s at a token of probability p costs p·s²/24 nats of KL on average, whereas a bit
saved there is worth as much as anywhere. So steps grow as 1/√p: they double with each factor of four in probability.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log

import numpy as np
from numpy.typing import NDArray

from bakery.records import TopK

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Steps in nats: finest · 2^j, for as long as that is at most `coarsest`. A `finest` of 0 keeps float32 to the bit.

    From −logprob = edge_j on, values are multiples of step j; edge_j is the first of those at or above j · log 4, so
    that rounding never passes an edge and log-probs that descend still do.
    """

    finest: float
    coarsest: float

    def __bool__(self) -> bool:
        return self.finest > 0

    @property
    def levels(self) -> tuple[Array, Array]:
        """(steps, edges)"""
        return _levels(self.finest, self.coarsest)

    def step_at(self, logprobs: Array) -> Array:
        steps, edges = self.levels
        if len(steps) == 1:
            return np.full_like(logprobs, steps[0])
        return steps[np.searchsorted(edges[1:], -logprobs, side="right")]

    def rounded(self, topk: TopK, temperatures: tuple[float, ...]) -> TopK:
        """Log-probs on the grid, and log_norm made the norm of what a reader will have.

        The tail is never touched. At temperature T the norm moves with the support, so that the tail's share,
        1 − Σ exp(read / T − norm), stays exact; `read` are the rounded, rescaled log-probs. Against the unmoved norm
        that difference would be rounding noise wherever the teacher is sure.
        """
        if not self or not len(topk):
            return topk
        exact = topk.logprobs.astype(np.float64)
        steps = self.step_at(exact)
        stored = replace(topk, logprobs=np.minimum(np.round(exact / steps) * steps, 0).astype(np.float32))
        if not temperatures:
            return stored
        read = rescaled(stored).logprobs
        norms = topk.log_norm.astype(np.float64)
        for column, temperature in enumerate(temperatures):
            had, has = (
                np.log(topk.sum_over_support(np.exp(logprobs.astype(np.float64) / temperature)))
                for logprobs in (topk.logprobs, read)
            )
            norms[:, column] = has - np.minimum(had - norms[:, column], 0)
        return replace(stored, log_norm=norms.astype(np.float32))

    def mass_slack(self, stored: TopK) -> Array:
        """How far rounding can have moved the mass of each support. [N]"""
        if not self:
            return np.zeros(len(stored))
        logprobs = stored.logprobs.astype(np.float64)
        return stored.sum_over_support(np.exp(logprobs) * np.expm1(self.step_at(logprobs) / 2))


EXACT = Grid(0, 0)


@lru_cache  # for every record is rounded and checked by itself
def _levels(finest: float, coarsest: float) -> tuple[Array, Array]:
    doublings = int(np.floor(np.log2(coarsest / finest)))
    level = np.arange(doublings + 1, dtype=np.float64)
    steps = finest * np.exp2(level)
    edges = np.ceil(level * log(4) / steps) * steps
    return steps, edges.astype(np.float32).astype(np.float64)  # as an edge is stored


def rescaled(topk: TopK) -> TopK:
    """The support scaled to hold exactly 1 − exp(tail). Derived the other way round, the tail would be mostly noise:
    a rounding step is larger than the whole tail where the teacher is sure."""
    mass = topk.sum_over_support(np.exp(topk.logprobs.astype(np.float64)))
    inside = np.log(np.maximum(-np.expm1(topk.tail_logprob.astype(np.float64)), 1e-30))
    shifted = topk.logprobs + np.repeat(inside - np.log(mass), topk.support_size)
    return replace(topk, logprobs=np.minimum(shifted, 0).astype(np.float32))
