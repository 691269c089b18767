"""Several caches as one map-style data set of records."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bakery.records import Record
from bakery.shards.reader import CacheReader


class CacheDataset(Dataset):
    """The records of a split of several caches, each cache `weight` times: 2 is twice an epoch, 0.5 a fixed half.

    `temperature` narrows each record's log_norm to that one column; where it is not 1 and a cache lists it not, the
    record has no column.
    """

    def __init__(self, caches: list[tuple[CacheReader, float]], split: str, temperature: float, seed: int = 0) -> None:
        self.split, self.temperature = split, temperature
        self.readers = [reader for reader, _ in caches]
        self.sampled = any(reader.manifest.draws for reader in self.readers)  # then all are: check_compatible
        rng = np.random.default_rng(seed)
        places, lengths, targets = [], [], []
        for number, (reader, weight) in enumerate(caches):
            if split not in reader.splits:
                continue
            rows = reader.rows(split)
            part = rng.permutation(rows)[: round((weight % 1) * rows)]
            chosen = np.concatenate([np.tile(np.arange(rows), int(weight)), np.sort(part)])
            places.append(np.stack([np.full(len(chosen), number), chosen], 1))
            lengths.append(reader.lengths(split)[chosen])
            targets.append(reader.targets(split)[chosen])
        self.places = np.concatenate(places) if places else np.zeros((0, 2), int)
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, int)
        self._targets = np.concatenate(targets) if targets else np.zeros(0, int)

    @property
    def targets(self) -> int:
        """Target tokens of one pass."""
        return int(self._targets.sum())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Record:
        number, row = (int(x) for x in self.places[index])
        reader = self.readers[number]
        record = reader.read(self.split, row)
        temperatures = reader.manifest.temperatures
        column = [temperatures.index(self.temperature)] if self.temperature in temperatures else []
        return replace(record, topk=replace(record.topk, log_norm=record.topk.log_norm[:, column]))
