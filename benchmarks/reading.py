"""Targets a second that one core hands to training out of a cache, in CPU seconds of the process (docs/benchmarks.md).

.venv/bin/python benchmarks/reading.py            the reader; on older commits too, where there is no window
.venv/bin/python benchmarks/reading.py --step     and what a LoRA step of SmolLM2-135M takes on this CPU
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import writer_speed
from measuring import Meter, machine
from scratch_cache import scratch_cache
from torch.utils.data import DataLoader

from bakery.shards.reader import CacheReader
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset

ROWS, BATCH, ROUNDS, KS = 2048, 8, 3, (20, 64, 128)
AT_RANDOM = 256  # rows of the global shuffle, which is slow


def records(k):
    """The writer's made-up records, each in a few places."""
    writer_speed.K = k
    often = 1 / np.arange(1, writer_speed.VOCABULARY + 1)
    some = [writer_speed.made_up(number, often / often.sum()) for number in range(256)]
    return [
        replace(record, example=replace(record.example, id=f"{number:032x}"))
        for number in range(ROWS)
        for record in [some[number % len(some)]]
    ]


def bulk(reader):
    """All rows as they lie, in batches."""
    batch = []
    for record in reader.records("train"):
        batch.append(record)
        if len(batch) == BATCH:
            collate(batch)
            batch = []


def global_shuffle(reader):
    """Rows anywhere, as training took them before there were windows."""
    chosen = np.random.default_rng(0).permutation(ROWS)[:AT_RANDOM].tolist()
    for at in range(0, AT_RANDOM, BATCH):
        collate([reader.read("train", row) for row in chosen[at : at + BATCH]])


def windowed(data, batch_size=None):
    """As the Trainer asks for them: a DataLoader over the rows in their order."""
    from bakery.student.order import WindowedOrder

    for _ in DataLoader(data, BATCH, sampler=WindowedOrder(data, 0, batch_size), collate_fn=collate):
        pass


def calls(reader):
    whole = CacheDataset([(reader, 1.0)], "train", 1.0)
    window = int(whole.group_bytes.sum()) // 4  # so that the windows change, as they do in a large cache

    def fresh():
        return CacheDataset([(reader, 1.0)], "train", 1.0, window_bytes=window)

    return {
        "bulk": lambda: bulk(reader),
        "global shuffle": lambda: global_shuffle(reader),
        "windowed": lambda: windowed(fresh()),
        "windowed, like lengths": lambda: windowed(fresh(), BATCH),
    }


def read_all(meter):
    print("| K | B a target | | targets / CPU s | × global shuffle | MiB held |\n|---|---|---|---|---|---|")
    for k in KS:
        rows = records(k)
        with scratch_cache([r.example for r in rows], k, writer_speed.VOCABULARY) as (writer, window):
            writer.add(rows)
            writer.publish(window, ["train"] * ROWS)
            writer.finish()
            del rows
            reader = CacheReader(writer.out)
            targets = reader.manifest.total("targets")
            results = meter.in_turns(calls(reader), ROUNDS, warm_up=1)
            share = {"global shuffle": AT_RANDOM / ROWS}
            rates = {name: targets * share.get(name, 1) / seconds for name, (seconds, _) in results.items()}
            for name, rate in rates.items():
                ratio, held = rate / rates["global shuffle"], results[name][1]
                size = reader.manifest.total("bytes") / targets
                print(f"| {k} | {size:.0f} | {name} | {rate:,.0f} | {ratio:.1f} | {held:,.0f} |", flush=True)


def a_step(meter):
    """Targets a CPU second of training: a fused LoRA step on eight passages of text."""
    from training_step import Steps, scored_passages

    with tempfile.TemporaryDirectory() as directory:
        data = CacheDataset([(scored_passages(Path(directory), BATCH, 1000, "cpu"), 1.0)], "train", 1.0)
        steps = Steps(data, True, "cpu", "float32")
        results = meter.in_turns({"step": lambda: steps.step(steps.cached_fused)}, ROUNDS, warm_up=1)
        seconds = results["step"][0]
        print(f"\na LoRA step of SmolLM2-135M, {data.targets} targets: {data.targets / seconds:,.0f} targets / CPU s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    meter = Meter("cpu")
    print(machine("cpu", "numpy", "pyarrow"), time.strftime("%H:%M"))
    print(f"{ROWS} rows of {writer_speed.RESPONSE} targets, batches of {BATCH}, medians of {ROUNDS} rounds\n")
    read_all(meter)
    if args.step:
        a_step(meter)


if __name__ == "__main__":
    main()
