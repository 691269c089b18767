"""What the gradient of a sparse teacher is worth beside that of the whole distribution (docs/benchmarks.md).

.venv/bin/python benchmarks/estimators.py [--batches 4]

SmolLM2-135M teaches itself without some of its layers, on passages of Python's documentation, in float32. The caches
are real ones, made here by `bakery.cache_teacher`. For each batch, the gradient on the weights of the mean forward KL
over all of the vocabulary, then of each support: their angle, and the ratio of their norms. Both are taken on every
eighth weight, so that the gradients of all batches together can be held as well.
"""

import argparse
import math
import tempfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from measuring import machine
from passages import MODEL, make_cache, write_prompts
from torch.nn.functional import kl_div

from bakery.config import StudentConfig
from bakery.heads import logits_at
from bakery.losses import sparse_loss
from bakery.models import load_causal_lm
from bakery.shards.reader import CacheReader
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.model import load_student

CHARACTERS, ROWS = 900, 4  # of a passage; passages of a batch
STRIDE = 8
STUDENTS = {"24 of 30 layers": tuple(range(10, 16)), "28 of 30 layers": (14, 15)}
TEACHERS = {
    "top-50": {"top_k": 50},
    "top-12": {"top_k": 12},
    "33 draws": {"support": "sampled", "draws": 33},  # about 12 different tokens
    "50 draws": {"support": "sampled", "draws": 50},
}
SUPPORTS = ("truncated", "tail_bucket", "residual_to_label", "renormalized")


def make_caches(directory: Path, rows: int) -> dict[str, CacheReader]:
    prompts, caches = write_prompts(directory / "prompts.jsonl", rows, CHARACTERS), {}
    for name, how in TEACHERS.items():
        reuse = [caches["top-50"].path] if name == "top-12" else []
        caches[name] = make_cache(prompts, how, reuse, out=str(directory / name))
    return caches


def excess(reader: CacheReader) -> float:
    """Σ p̂ log p̂ − Σ p̂ log p, nats a target: how far a KL from the shares themselves would be above that from p."""
    topks = [record.topk for record in reader.records()]
    sums = [topk.sum_over_support(np.exp(topk.logprobs.astype(float)) * topk.logprobs) for topk in topks]
    return float(np.concatenate([x - topk.tail_logprob for x, topk in zip(sums, topks, strict=True)]).mean())


def ways(caches: dict[str, CacheReader]) -> list[tuple[str, str]]:
    """(support, cache), each a gradient that is compared."""
    drawn = [name for name, reader in caches.items() if reader.manifest.draws]
    cut = [name for name in caches if name not in drawn]
    return [(support, name) for support in SUPPORTS for name in reversed(cut)] + [("sampled", name) for name in drawn]


def gradients(student, teacher, batches: dict[str, dict], asked: list[tuple[str, str]]):
    """(dense KL in nats, gradient of it, {way: gradient}) of one batch; the student runs once, and back for each."""
    first = next(iter(batches.values()))
    where = first["input_ids"], first["attention_mask"], first["target_index"]
    with torch.no_grad():
        logp_NV = logits_at(teacher, *where).log_softmax(-1)
    logits_NV = logits_at(student, *where)
    weights = list(student.parameters())

    def gradient(loss_N):
        parts = torch.autograd.grad(loss_N.mean(), weights, retain_graph=True)
        return torch.cat([part.flatten()[::STRIDE] for part in parts])

    dense_N = kl_div(logits_NV.log_softmax(-1), logp_NV, log_target=True, reduction="none").sum(-1)
    dense, whole = dense_N.mean().item(), gradient(dense_N)
    del dense_N, logp_NV  # with the [N,V] tensors that the way back has kept
    found = {}
    for support, name in asked:
        batch = batches[name]
        sides = batch["topk_ids"], batch["topk_logprobs"], batch["labels"]
        tail_N = batch["tail_logprob"]
        # No name for the loss: it would keep one support's [N,V] tensors while those of the next are made.
        found[support, name] = gradient(sparse_loss(logits_NV, *sides, tail_logprob_N=tail_N, support=support))
    return dense, whole, found


def cosine(one: torch.Tensor, whole: torch.Tensor) -> float:
    one, whole = one.double(), whole.double()
    return min(float(one @ whole / one.norm() / whole.norm()), 1.0)


def compared(one: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    """(angle in degrees, ratio of norms)"""
    return math.degrees(math.acos(cosine(one, whole))), float(one.double().norm() / whole.double().norm())


def measure(name: str, dropped: tuple[int, ...], caches: dict[str, CacheReader], teacher, batches: int) -> None:
    config = StudentConfig(model_name_or_path=str(MODEL), lora=None, drop_layers=dropped, dtype="float32")
    student = load_student(config, "cpu").eval()
    rows = {key: CacheDataset([(reader, 1.0)], "train", 1.0) for key, reader in caches.items()}
    asked = ways(caches)
    kls, targets, sums = [], 0, {}
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in asked}
    for number in range(batches):
        here = {
            key: collate([data[i] for i in range(number * ROWS, (number + 1) * ROWS)]) for key, data in rows.items()
        }
        kl, whole, found = gradients(student, teacher, here, asked)
        kls.append(kl)
        count = len(here["top-50"]["labels"])
        targets += count
        for way in asked:
            figures[way].append(compared(found[way], whole))
        for way, one in {**found, "whole": whole}.items():
            sums[way] = sums.get(way, 0) + count * one
    print(f"\n{name}: KL {mean(kls):.2f} nats, {batches} batches of about {targets // batches} targets\n")
    print("| support | of | entries | bytes | angle, ° | ratio of norms | all batches, ° | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for support, key in asked:
        manifest, data = caches[key].manifest, rows[key]
        entries = mean(len(data[i].topk.ids) for i in range(len(data))) / (data.targets / len(data))
        size = manifest.total("bytes") / manifest.total("targets")
        angles, ratios = zip(*figures[support, key], strict=True)
        angle, ratio = compared(sums[support, key], sums["whole"])
        print(
            f"| `{support}` | {key} | {entries:.1f} | {size:.0f} | {mean(angles):.1f} ± {stdev(angles):.1f} "
            f"| {mean(ratios):.2f} ± {stdev(ratios):.2f} | {angle:.1f} | {ratio:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    print(machine("cpu", "transformers"))
    teacher = load_causal_lm(str(MODEL), revision=None, dtype="float32").eval()
    with tempfile.TemporaryDirectory() as directory:
        caches = make_caches(Path(directory), args.batches * ROWS)
        for name in ("33 draws", "50 draws"):
            print(f"\n{name}: the KL from their shares would be {excess(caches[name]):.2f} nats too high")
        for name, dropped in STUDENTS.items():
            measure(name, dropped, caches, teacher, args.batches)


if __name__ == "__main__":
    main()
