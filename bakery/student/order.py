"""The order in which an epoch takes its rows: shuffled, yet with few row groups in use at a time."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from bakery.student.dataset import CacheDataset

BATCHES_SORTED = 50  # together by length: few enough that the same rows do not meet in every epoch

Indices = NDArray[np.int64]


class WindowedOrder(Sampler[int]):
    """Every row once, in an order that `seed` and the epoch decide and nothing else.

    All row groups are shuffled and cut into windows of about `rows.window_bytes`, then the rows of each window are. A
    cache that fits into one window is shuffled as a whole. With `batch_size`, batches of so many rows of a window are
    of like length, and these batches are shuffled.
    """

    def __init__(self, rows: CacheDataset, seed: int, batch_size: int | None = None) -> None:
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        self.epoch = 0
        self._by_group = np.argsort(rows.groups, kind="stable")
        self._ends = np.cumsum(np.bincount(rows.groups, minlength=len(rows.group_bytes)))

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls this before each epoch, also before the one that a resumed run goes on in."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        given = 0
        for groups in self._windows(rng):
            window = rng.permutation(np.concatenate([self._rows_of(group) for group in groups]))
            if self.batch_size:
                window = like_lengths(window, self.rows.lengths, self.batch_size, given, rng)
            yield from window.tolist()
            given += len(window)

    def _windows(self, rng: np.random.Generator) -> list[Indices]:
        """All row groups in windows of like size. A group belongs where its middle lies, so that a window may hold half
        a group more at either end."""
        groups = rng.permutation(len(self._ends))
        size = self.rows.group_bytes[groups]
        count = max(1, -(-int(size.sum()) // self.rows.window_bytes))
        cuts = np.searchsorted(np.cumsum(size) - size / 2, np.arange(1, count) * (size.sum() / count))
        return [window for window in np.split(groups, cuts) if len(window)]

    def _rows_of(self, group: int) -> Indices:
        return self._by_group[self._ends[group - 1] if group else 0 : self._ends[group]]


def like_lengths(rows: Indices, lengths: Indices, size: int, given: int, rng: np.random.Generator) -> Indices:
    """`rows`, which are shuffled, so that batches of `size` hold rows of like length and come in a random order.

    `given` rows were given before: the first few complete the batch that these have begun, the last few begin another;
    both stay as they are.
    """
    first = min(-given % size, len(rows))
    batches = (len(rows) - first) // size
    head, middle, tail = np.split(rows, [first, first + batches * size])
    if not batches:
        return rows
    pools = np.array_split(middle.reshape(batches, size), -(-batches // BATCHES_SORTED))
    ordered = [pool.reshape(-1)[np.argsort(lengths[pool.reshape(-1)], kind="stable")] for pool in pools]
    return np.concatenate([head, rng.permutation(np.concatenate(ordered).reshape(batches, size)).reshape(-1), tail])
