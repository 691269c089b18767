"""What a target takes on disk: bytes, time and what storing loses, for what plain Parquet allows (docs/benchmarks.md).

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/storage.py [--scored DIR] [--rows 128] [--rounds 9]

SmolLM2-135M scores passages of Python's documentation, top-128 in float32; DIR keeps them for the next time. Each
encoding writes those targets to a file and reads them back into numpy arrays, all encodings in turns: CPU seconds of
one thread, medians. What is lost is the KL from the exact distribution, support and tail, to what is read back.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from encoding import BAKERY, DELTA, DICTIONARY, Codes, Encoding, Naive, entries_sorted, grid
from estimators import CHARACTERS
from measuring import Meter, machine
from passages import make_cache, write_prompts

from bakery.records import Record, TopK


def float16(topk: TopK) -> TopK:
    return replace(topk, logprobs=topk.logprobs.astype(np.float16).astype(np.float32))


def by_id(topk: TopK) -> tuple[np.ndarray, ...]:
    return (topk.ids,)


def ties_by_id(topk: TopK) -> tuple[np.ndarray, ...]:
    return topk.ids, -topk.logprobs


AT_ANY_K = [
    Naive("int64, float32, nested, snappy", None),
    Encoding("float32 to the bit", None),
    Encoding("float32 with the values of float16", float16),
    Codes("8-bit codes, a scale a target", None, logprobs=DICTIONARY),
    Encoding("grid 1/64: format 1", grid(1 / 64, 1 / 64)),
    Encoding("grid 1/32", grid(1 / 32, 1 / 32)),
    Encoding("grid 1/128 to 1/16", grid(1 / 128, 1 / 16)),
    Encoding("grid 1/256 to 1/8", grid(1 / 256, 1 / 8)),
    BAKERY,
]
OTHER_WAYS = [
    Encoding("grid 1/512 to 1/16", grid(1 / 512, 1 / 16)),
    Encoding("grid 1/256 to 1/32", grid(1 / 256, 1 / 32)),
    Encoding("entries in the order of ids", sort_keys=by_id),
    Encoding("… and ids as differences (DELTA)", sort_keys=by_id, ids=DELTA),
    Encoding("… and zstd 9", sort_keys=by_id, level=9),
    Encoding("equal log-probs in the order of ids", sort_keys=ties_by_id),
    Encoding("ids in a dictionary", ids=DICTIONARY),
    Encoding("log-probs in a dictionary", logprobs=DICTIONARY),
    Encoding("log-probs in a float16 column", dtype=np.float16),
    *(Encoding(f"zstd {level}", level=level) for level in (1, 9, 15)),
    *(Encoding(f"row groups of {rows}", rows=rows) for rows in (8, 128)),
]


def kl_lost(exact: TopK, read: TopK) -> np.ndarray:
    """KL [N] from one to the other, nats. Of the masses as well, which float32 leaves at not quite 1."""
    exact, read = (entries_sorted(topk, topk.ids) for topk in (exact, read))
    if not np.array_equal(exact.ids, read.ids) or not np.array_equal(exact.tail_logprob, read.tail_logprob):
        raise SystemExit("what was read back is not what was written")
    p, q = exact.logprobs.astype(np.float64), read.logprobs.astype(np.float64)
    return exact.sum_over_support(np.exp(p) * (p - q) - np.exp(p) + np.exp(q))


def bytes_a_target(path: Path) -> tuple[float, float, float]:
    """Of the ids, of the log-probs, of all columns."""
    metadata, sizes = pq.read_metadata(path), {}
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes["topk_ids"], sizes["topk_logprobs"], sum(sizes.values())


def measure(topk: TopK, targets: np.ndarray, encodings: list[Encoding], directory: Path, rounds: int) -> None:
    files = {e: directory / f"{number}.parquet" for number, e in enumerate(encodings)}
    calls = {(e, "write"): partial(e.write, topk, targets, path) for e, path in files.items()}
    calls |= {(e, "read"): partial(e.read, path) for e, path in files.items()}
    spent = {call: s / len(topk) * 1e6 for call, (s, _) in Meter("cpu").in_turns(calls, rounds, warm_up=1).items()}
    print("| | ids, B | log-probs, B | all, B | write, µs | read, µs | KL lost | at most |")
    print("|---|---|---|---|---|---|---|---|")
    for e, path in files.items():
        ids, logprobs, whole = (size / len(topk) for size in bytes_a_target(path))
        lost = kl_lost(topk, e.read(path))
        times = f"{spent[e, 'write']:.1f} | {spent[e, 'read']:.2f}"
        print(
            f"| {e.name} | {ids:.1f} | {logprobs:.1f} | {whole:.1f} | {times} | {lost.mean():.1e} | {lost.max():.1e} |"
        )
    for e, path in files.items():
        try:
            duckdb.read_parquet(str(path)).to_arrow_table()
        except duckdb.Error as error:
            print(f'\nduckdb {version("duckdb")} does not read "{e.name}": {str(error).splitlines()[0]}')


def joined(records: list[Record]) -> tuple[TopK, np.ndarray]:
    """The targets of all records end to end, and how many each has."""
    topks = [vars(record.topk).values() for record in records]
    columns = [np.concatenate(parts) for parts in zip(*topks, strict=True)]
    return TopK(*columns), np.array([len(record.topk) for record in records])


def scored_text(directory: Path, rows: int) -> list[Record]:
    """Made once for a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(directory / "prompts.jsonl", rows, CHARACTERS)
    return list(make_cache(prompts, {"top_k": 128}, out=str(directory / "cache"), logprob_step=0).records())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scored", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as temporary:
        records = scored_text(args.scored or Path(temporary), args.rows)
        topk, targets = joined(records)
        print(f"{machine('cpu', 'transformers', 'pyarrow', 'numpy')}\n{len(records)} rows, {targets.sum():,} targets")
        for k, encodings in ((64, AT_ANY_K + OTHER_WAYS), (20, AT_ANY_K), (128, AT_ANY_K)):
            print(f"\nK = {k}\n")
            measure(topk.keep_entries(k), targets, encodings, Path(temporary), args.rounds)


if __name__ == "__main__":
    main()
