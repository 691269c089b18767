"""Targets a second that stage one's writer takes at K = 64, in CPU seconds of the process (docs/benchmarks.md).

.venv/bin/python benchmarks/writer_speed.py
"""

import platform
import time
from importlib.metadata import version
from statistics import median

import numpy as np
from scratch_cache import scratch_cache

from bakery.records import Example, Record, TopK, ids_array

ROWS, CONTEXT, RESPONSE, K, VOCABULARY, PER_CALL, ROUNDS = 1024, 32, 64, 64, 49152, 16, 5


def made_up(number: int, often: np.ndarray) -> Record:
    """Tokens and supports with the frequencies of words, log-probs that fall as a teacher's do, .1 in the tail."""
    rng = np.random.default_rng(number)
    tokens = ids_array(rng.choice(VOCABULARY, CONTEXT + RESPONSE, p=often))
    # The K largest of a Gumbel-perturbed distribution: a sample of distinct ids.
    noisy_NV = np.log(often[:4096]) + rng.gumbel(size=(RESPONSE, 4096))
    ids_NK = np.argsort(-noisy_NV, axis=1)[:, :K]
    p_NK = -np.sort(-rng.dirichlet(np.full(K, 0.1), RESPONSE), axis=1) + 1e-6
    logp_NK = np.log(0.9 * p_NK / p_NK.sum(1, keepdims=True))
    tail_N = np.full(RESPONSE, np.log(0.1)) + 0.01 * rng.standard_normal(RESPONSE)
    topk = TopK.from_rows(ids_NK, logp_NK, tail_N, logp_NK[:, 0])
    context, everything = tokens[:CONTEXT], np.ones(RESPONSE, bool)
    return Record(Example(f"{number:032x}", context, context, tokens[CONTEXT:], everything), topk, "teacher")


def main() -> None:
    often = 1 / np.arange(1, VOCABULARY + 1)
    records = [made_up(number, often / often.sum()) for number in range(ROWS)]
    seconds: dict[str, list[float]] = {"add": [], "publish": []}
    for _ in range(ROUNDS):
        with scratch_cache([r.example for r in records], K, VOCABULARY) as (writer, window):
            start = time.process_time()
            for at in range(0, ROWS, PER_CALL):
                writer.add(records[at : at + PER_CALL])
            added = time.process_time()
            writer.publish(window, ["train"] * ROWS)
            seconds["publish"].append(time.process_time() - added)
            seconds["add"].append(added - start)
            size = writer.manifest.total("bytes")
    targets = ROWS * RESPONSE
    print(f"{platform.machine()}, numpy {version('numpy')}, pyarrow {version('pyarrow')}; {time.strftime('%Y-%m-%d')}")
    print(f"{targets} targets, K = {K}, {PER_CALL} rows a call, {size / targets:.0f} bytes a target; {ROUNDS} rounds\n")
    print("| | CPU s | targets / CPU s |\n|---|---|---|")
    both = [sum(pair) for pair in zip(*seconds.values(), strict=True)]
    for name, times in {**seconds, "both": both}.items():
        print(f"| {name} | {median(times):.2f} | {targets / median(times):,.0f} |")


if __name__ == "__main__":
    main()
