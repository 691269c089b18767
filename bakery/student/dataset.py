"""Several caches as one map-style data set of records."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bakery.records import Record
from bakery.shards.reader import CacheReader
from bakery.student.kept import Kept

WINDOW_BYTES = 1 << 29  # a million targets at K = 64


class CacheDataset(Dataset):
    """The records of a split of several caches, each cache `weight` times: 2 is twice an epoch, 0.5 a fixed half.

    `temperature` narrows each record's log_norm to that one column; where it is not 1 and a cache lists it not, the
    record has no column. A row group is decoded as a whole and kept while memory for about `window_bytes` lasts, so
    rows are best asked for in the order that `student/order.py` gives. A copy in another process keeps its own.
    """

    def __init__(
        self,
        caches: list[tuple[CacheReader, float]],
        split: str,
        temperature: float,
        seed: int = 0,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.split, self.window_bytes = split, window_bytes
        self.readers = [reader for reader, _ in caches]
        self.sampled = any(reader.manifest.draws for reader in self.readers)  # then all are: check_loss
        self._columns = [_column(reader.manifest.temperatures, temperature) for reader in self.readers]
        rng = np.random.default_rng(seed)
        parts = [np.zeros((4, 0), np.int64)]  # of each row: its row group, its place there, tokens, targets
        sizes = [np.zeros(0, np.int64)]  # of each row group
        self._places: list[tuple[int, int]] = []
        for number, (reader, weight) in enumerate(caches):
            if split not in reader.splits:
                continue
            total, in_group = reader.rows(split), reader.group_rows(split)
            part = rng.permutation(total)[: round((weight % 1) * total)]
            chosen = np.concatenate([np.tile(np.arange(total), int(weight)), np.sort(part)])
            group = np.repeat(np.arange(len(in_group)), in_group)
            place = np.arange(total) - (np.cumsum(in_group) - in_group)[group]
            rows = [group + len(self._places), place, reader.lengths(split), reader.targets(split)]
            parts.append(np.stack(rows)[:, chosen])
            sizes.append(reader.group_bytes(split))
            self._places += [(number, there) for there in range(len(in_group))]
        self.groups, self._rows, self.lengths, self._targets = np.concatenate(parts, axis=1)
        self.group_bytes = np.concatenate(sizes)
        # Of rows asked for window by window no group is decoded twice: a window is at most one group larger than said.
        self._kept = Kept(window_bytes + int(self.group_bytes.max(initial=0)))

    @property
    def targets(self) -> int:
        """Target tokens of one pass."""
        return int(self._targets.sum())

    def windows(self) -> list[NDArray[np.int64]]:
        """All rows in their order, as stretches of about `window_bytes`: within one, none is decoded twice."""
        before = np.cumsum(self.group_bytes) - self.group_bytes
        number = (before // self.window_bytes)[self.groups]
        return np.split(np.arange(len(self)), np.flatnonzero(np.diff(number)) + 1)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Record:
        group = int(self.groups[index])
        number, there = self._places[group]
        read, column = self.readers[number].group, self._columns[number]
        records = self._kept.get(group, int(self.group_bytes[group]), lambda: read(self.split, there))
        record = records[self._rows[index]]
        if column is None:
            return record
        return replace(record, topk=replace(record.topk, log_norm=record.topk.log_norm[:, column]))


def held_out(readers: list[CacheReader], temperature: float) -> CacheDataset:
    """The rows to measure by; of caches that are all prompts alone, the prompts, to which answers can be shown."""
    measured = [reader for reader in readers if reader.manifest.total("targets")]
    return CacheDataset([(reader, 1.0) for reader in measured or readers], "validation", temperature)


def _column(temperatures: tuple[float, ...], temperature: float) -> list[int] | None:
    """The columns of log_norm that are wanted, one or none; None where these are all that there are."""
    wanted = [temperatures.index(temperature)] if temperature in temperatures else []
    return None if wanted == list(range(len(temperatures))) else wanted
