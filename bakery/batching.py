"""Which sequences go through a model together, and how they stand side by side."""

import numpy as np
from numpy.typing import NDArray

from bakery.records import Ids


def plan_batches(lengths: list[int], tokens_per_batch: int, rows_per_batch: int | None = None) -> list[list[int]]:
    """Indices in batches, longest first (so that memory peaks at once), each at most `tokens_per_batch` padded tokens
    and `rows_per_batch` sequences.

    A single sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = bool(batches) and len(batches[-1]) != rows_per_batch
        if room and (len(batches[-1]) + 1) * longest <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def padded(sequences: list[Ids], left: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [B,T], filled up with 0 to the longest at the right or the left, and the mask [B,T]: 1 where one is."""
    longest = max(map(len, sequences))
    ids, mask = np.zeros((2, len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    return ids, mask
