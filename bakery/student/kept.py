"""What was read last, kept within a bound."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """At most `limit` of what was asked for, by the sum of sizes; the latest is kept whatever its size."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, size: int, make: Callable[[], Any]) -> Any:
        """What `make()` gave for this key, if that is still there; else what it gives now, for which the ones not asked
        for the longest make room before."""
        if key in self._found:
            self._found.move_to_end(key)
        else:
            while self._found and self.held + size > self.limit:
                self.held -= self._found.popitem(last=False)[1][1]
            self._found[key] = make(), size
            self.held += size
        return self._found[key][0]

    def __reduce__(self) -> tuple[type["Kept"], tuple[int]]:
        """In another process it begins empty."""
        return Kept, (self.limit,)
