"""Samples of a teacher's distribution in place of its top-k: the random numbers, and what is kept of the draws.

Every example has a random stream of its own, named by what the teacher reads, so that equal examples get equal draws
whatever stands beside them in a batch, in another process, or after a crash.

Legend: N targets, D draws, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakery.records import Ids, TopK, content_id, ids_array


class Streams:
    """One for each row of a call. Two numbers a draw, since a draw is made in two steps."""

    def __init__(self, contexts: list[Ids], behind: Sequence[Any], draws: int) -> None:
        """`behind` is what tells rows of one context apart: the given response, or the seed of one to be written."""
        keys = [content_id("draws", context, other) for context, other in zip(contexts, behind, strict=True)]
        self.draws = draws
        self.streams = [np.random.Generator(np.random.Philox(key=int(key, 16))) for key in keys]

    def next(self, rows: Any) -> NDArray[np.float64]:
        """Numbers in [0, 1) for the next target of each of `rows`, in order; a row may come several times. [N,2,D]"""
        return np.stack([self.streams[row].random((2, self.draws)) for row in rows])


def drawn_by(uniform_ND: NDArray[np.float64], logp_NV: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ids [N,D]: the first whose cumulated probability is above the number."""
    sums_NV = np.cumsum(np.exp(logp_NV), axis=1)
    below_ND = np.minimum(uniform_ND * sums_NV[:, -1:], np.nextafter(sums_NV[:, -1:], 0))
    return np.stack([np.searchsorted(sums, below, "right") for sums, below in zip(sums_NV, below_ND, strict=True)])


def sample_of(draws_ND: Any, mean_N: Any, token_N: Any) -> TopK:
    """The ids that came up and the logs of their shares, the most frequent first and by id among equals; `mean_N` is
    the mean log-prob of the draws, `token_N` the log-prob of the actual token."""
    targets, draws = draws_ND.shape
    sorted_ND = np.sort(draws_ND, axis=1)
    is_first_ND = np.concatenate([np.ones((targets, 1), bool), sorted_ND[:, 1:] != sorted_ND[:, :-1]], 1)
    first_M = np.flatnonzero(is_first_ND)
    ids_M, row_M = sorted_ND.reshape(-1)[first_M], first_M // draws
    count_M = np.diff(first_M, append=sorted_ND.size)
    order_M = np.lexsort((ids_M, -count_M, row_M))
    size_N = is_first_ND.sum(1).astype(np.int32)
    shares_M = np.log(count_M[order_M] / draws).astype(np.float32)
    mean_N, token_N = (np.ascontiguousarray(x, np.float32) for x in (mean_N, token_N))
    return TopK(ids_array(ids_M[order_M]), shares_M, size_N, mean_N, token_N, np.zeros((targets, 0), np.float32))
