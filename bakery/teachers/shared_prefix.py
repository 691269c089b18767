"""What many contexts begin with, and which of them to run together so that it is run once."""

from collections import defaultdict

import numpy as np

from bakery.batching import plan_batches
from bakery.records import Ids, ids_array

# Below this many tokens, or for fewer rows, what is saved is not worth batches that cannot be mixed.
SHORTEST = 64
FEWEST = 8
# A kept token costs a batch its keys and values in one layer at a time: at most this part of a token that is run.
KEPT = 1 / 8

NONE = ids_array([])


class SharedPrefixes:
    """Contexts with the same first SHORTEST tokens are a group; where it has FEWEST rows, all that they have in common
    is their prefix. At least one token of each context is left behind it.

    Which prefix a context has depends on the contexts given here, never on what was asked before.
    """

    def __init__(self, contexts: list[Ids]) -> None:
        groups: dict[bytes, list[Ids]] = defaultdict(list)
        for context in contexts:
            groups[_head(context)].append(context)
        found = {head: _common(group) for head, group in groups.items() if len(group) >= FEWEST}
        self._by_head = {head: prefix for head, prefix in found.items() if len(prefix) >= SHORTEST}

    def __bool__(self) -> bool:
        return bool(self._by_head)

    def of(self, *contexts: Ids) -> Ids:
        """The prefix that each of them has; empty where one has none or another."""
        prefix = self._by_head.get(_head(contexts[0]), NONE)
        size = len(prefix)
        return prefix if all(len(c) > size and np.array_equal(c[:size], prefix) for c in contexts) else NONE

    def batches(self, contexts: list[Ids], lengths: list[int], tokens_per_batch: int, lent: bool) -> list[list[int]]:
        """As plan_batches, each behind one prefix: `lent` to it, or else copied into it, and then no smaller."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        costs = list(lengths)
        for i, context in enumerate(contexts):
            prefix = self.of(context)
            groups[prefix.tobytes()].append(i)
            costs[i] -= int(lent * (1 - KEPT) * len(prefix))
        plans = [(rows, plan_batches([costs[i] for i in rows], tokens_per_batch)) for rows in groups.values()]
        return [[rows[i] for i in batch] for rows, plan in plans for batch in plan]


def _head(context: Ids) -> bytes:
    return context[:SHORTEST].tobytes()


def _common(contexts: list[Ids]) -> Ids:
    first, end = contexts[0], min(map(len, contexts)) - 1
    same = np.ones(end, bool)
    for context in contexts:
        same &= context[:end] == first[:end]
    return first[: end if same.all() else int(same.argmin())]
