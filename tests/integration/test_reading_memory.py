"""A cache may be larger than the memory there is: an epoch of twelve times the rows takes no more of it."""

import shutil
from dataclasses import dataclass
from multiprocessing import Queue
from pathlib import Path

import numpy as np
import pytest
from caches_by_hand import edit_manifest
from forked import processes

from bakery.records import Example, Record, TopK, ids_array

ROWS, TARGETS, K, TIMES, WINDOW = 512, 64, 64, 12, 4 << 20
MIB = 1 << 20


def wide_record(number: int) -> Record:
    """34 KB of memory once decoded."""
    rng = np.random.default_rng(number)
    ids_NK = np.arange(K) + rng.integers(0, 9000, (TARGETS, 1))
    logp_NK = np.log(0.9 / K) - np.sort(rng.random((TARGETS, K)))
    topk = TopK.from_rows(ids_NK, logp_NK, np.full(TARGETS, -1.0), logp_NK[:, 0])
    context, response = ids_array([number % 100]), ids_array(rng.integers(0, 9000, TARGETS))
    return Record(Example(f"{number:032x}", context, context, response, np.ones(TARGETS, bool)), topk, "dataset")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One of a shard, and one of eight shards that are copies of it."""
    from builders import write_cache

    home = tmp_path_factory.mktemp("memory")
    records = [wide_record(number) for number in range(ROWS)]
    small = write_cache(home / "small", {"train": records}, k=K, vocab=9100, logprob_step=1 / 64)
    large = shutil.copytree(small, home / "large")
    names = [f"data/train-{number:05d}.parquet" for number in range(TIMES)]
    for name in names[1:]:
        shutil.copyfile(large / names[0], large / name)

    def eightfold(tree):
        [entry] = tree["splits"]["train"]
        tree["splits"]["train"] = [entry | {"file": name} for name in names]

    edit_manifest(large, eightfold)
    return small, large


@dataclass(frozen=True)
class Epochs:
    """In a process of its own: reads the cache in the order of training, twice, and tells what it took."""

    path: Path
    window: int
    answer: Queue

    def __call__(self) -> None:
        from torch.utils.data import DataLoader

        from bakery.shards.reader import CacheReader
        from bakery.student.collate import collate
        from bakery.student.dataset import CacheDataset
        from bakery.student.order import WindowedOrder

        # Not ru_maxrss, which a child inherits.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = memory("VmHWM")
        data = CacheDataset([(CacheReader(self.path), 1.0)], "train", 1.0, window_bytes=self.window)
        order = WindowedOrder(data, 0)
        rows = 0
        for epoch in range(2):
            order.set_epoch(epoch)
            rows += sum(len(batch["input_ids"]) for batch in DataLoader(data, 8, sampler=order, collate_fn=collate))
        self.answer.put((rows, int(data.group_bytes.sum()), memory("VmHWM") - before))


def memory(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def read(path: Path, window: int) -> tuple[int, int, int]:
    """Rows read, bytes that they all take when they are decoded, bytes that the process took at its peak."""
    answer = processes.Queue()
    process = processes.Process(target=Epochs(path, window, answer))
    process.start()
    found = answer.get(timeout=60)
    process.join()
    return found


def test_twelve_times_the_rows_take_no_more_memory(caches):
    small, large = caches
    rows, decoded, peak = read(small, WINDOW)
    more_rows, more_decoded, more_peak = read(large, WINDOW)
    assert (rows, more_rows) == (2 * ROWS, 2 * ROWS * TIMES)
    assert more_decoded == TIMES * decoded
    assert more_peak < more_decoded / 3
    assert more_peak < peak + 8 * MIB
    assert read(large, 1 << 30)[2] > 0.8 * more_decoded  # what a window of all the cache takes: the meter sees it
