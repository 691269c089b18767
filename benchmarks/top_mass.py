"""What a top-mass saves on disk and what it takes from the gradient on the weights (docs/benchmarks.md).

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/top_mass.py [--scored DIR] [--rows 128] [--batches 4]

Text and bytes are those of benchmarks/storage.py at K = 64 in bakery's encoding; the students and their batches are
those of benchmarks/estimators.py. The gradient of the forward KL with the tail bucket is held
against that of the full vocabulary, and against that of all 64 entries in float32, over all batches together.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from encoding import BAKERY
from estimators import ROWS, STUDENTS, WHOLE, compared, degrees, gradients
from measuring import machine
from passages import MODEL
from storage import bytes_a_target, joined, kl_lost, scored_text

from bakery.config import StudentConfig
from bakery.models import load_causal_lm
from bakery.records import Record, TopK
from bakery.student.collate import collate
from bakery.student.model import load_student

CUTS = (  # entries at most, and a top-mass
    *((64, mass) for mass in (None, 0.999, 0.99, 0.98, 0.95, 0.9, 0.89)),
    *((48, 0.95), (48, 0.93), (36, None)),
)
UNCUT = "64 in float32"


def cut(topk: TopK, k: int, mass: float | None) -> TopK:
    topk = topk.keep_entries(k)
    return topk if mass is None else topk.keep_mass(mass)


def as_read(topk: TopK) -> TopK:
    return BAKERY.topk(BAKERY.columns(topk))


def sizes(records: list[Record], directory: Path) -> None:
    everything, targets = joined(records)
    print(f"{len(records)} rows, {targets.sum():,} targets\n")
    print("| K | top-mass | entries | all, B | KL lost | at most |\n|---|---|---|---|---|---|")
    for k, mass in CUTS:
        topk, path = cut(everything, k, mass), directory / "cut.parquet"
        BAKERY.write(topk, targets, path)
        size, lost = bytes_a_target(path)[-1] / len(topk), kl_lost(topk, BAKERY.read(path))
        entries = len(topk.ids) / len(topk)
        print(f"| {k} | {mass or ''} | {entries:.1f} | {size:.1f} | {lost.mean():.1e} | {lost.max():.1e} |", flush=True)


def cosines(name: str, student, teacher, records: list[Record]) -> None:
    sums, kls, targets = {}, [], []
    for at in range(0, len(records), ROWS):
        rows = records[at : at + ROWS]
        batches = {UNCUT: collate(rows)}
        batches |= {how: collate([replace(r, topk=as_read(cut(r.topk, *how))) for r in rows]) for how in CUTS}
        targets.append(len(batches[UNCUT]["labels"]))
        for way, loss, gradient in gradients(student, teacher, batches, [("tail_bucket", how) for how in batches]):
            if way == WHOLE:
                kls.append(loss)
            sums[way] = sums[way].add_(gradient, alpha=targets[-1]) if at else gradient * targets[-1]
    kl = np.average(kls, weights=targets)
    print(f"\n{name}: KL {kl:.2f} nats, batches of {', '.join(map(str, targets))} targets\n")
    print(f"| K | top-mass | cosine to {WHOLE} | angle, ° | to {UNCUT} | angle, ° |\n|---|---|---|---|---|---|")
    for how in (UNCUT, *CUTS):
        k, mass = how if how in CUTS else (UNCUT, None)
        both = (compared(sums["tail_bucket", how], sums[other])[0] for other in (WHOLE, ("tail_bucket", UNCUT)))
        cells = " | ".join(f"{cosine:.5f} | {degrees(cosine):.2f}" for cosine in both)
        print(f"| {k} | {mass or ''} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scored", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    print(machine("cpu", "transformers", "pyarrow", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        records = scored_text(args.scored or Path(temporary), args.rows)
        records = [replace(record, topk=record.topk.keep_entries(64)) for record in records]
        sizes(records, Path(temporary))
    teacher = load_causal_lm(str(MODEL), revision=None, dtype="float32").eval()
    for name, dropped in STUDENTS.items():
        config = StudentConfig(model_name_or_path=str(MODEL), lora=None, drop_layers=dropped, dtype="float32")
        cosines(name, load_student(config, "cpu").eval(), teacher, records[: args.batches * ROWS])


if __name__ == "__main__":
    main()
