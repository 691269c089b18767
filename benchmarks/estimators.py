"""What the gradient of a sparse teacher is worth beside that of the whole distribution (docs/benchmarks.md).

.venv/bin/python benchmarks/estimators.py [--batches 4]

SmolLM2-135M teaches itself without some of its layers, on passages of Python's documentation, in float32. The caches
are real ones, made here by `bakery.cache_teacher`. For each batch, the gradient on the weights of the mean forward KL
over all of the vocabulary, then of each support: their angle, and the ratio of their norms. On all weights: a stride
through them takes some of the hidden channels and never the others, and a few channels hold most of the gradient. The
gradients of all batches together take 12 GiB.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
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
WHOLE = "full vocabulary"  # what gradients are held against
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


def gradients(student, teacher, batches: dict, asked: list[tuple]) -> Iterator[tuple[object, float, torch.Tensor]]:
    """(WHOLE, then each way; its loss in nats; its gradient) of one batch; the student runs once, and back for each."""
    first = next(iter(batches.values()))
    where = first["input_ids"], first["attention_mask"], first["target_index"]
    with torch.no_grad():
        logp_NV = logits_at(teacher, *where).log_softmax(-1)
    logits_NV = logits_at(student, *where)
    weights = list(student.parameters())

    def gradient(loss_N):
        loss = loss_N.mean()
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])

    # No names for the losses: one's [N,V] tensors would stay while those of the next are made.
    yield WHOLE, *gradient(kl_div(logits_NV.log_softmax(-1), logp_NV, log_target=True, reduction="none").sum(-1))
    del logp_NV
    for support, name in asked:
        batch = batches[name]
        sides = batch["topk_ids"], batch["topk_logprobs"], batch["labels"]
        tail_N = batch["tail_logprob"]
        way = support, name
        yield way, *gradient(sparse_loss(logits_NV, *sides, tail_logprob_N=tail_N, support=support))


def compared(one: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    """(cosine, ratio of norms)"""
    one_2, whole_2 = dot(one, one), dot(whole, whole)
    return min(dot(one, whole) / math.sqrt(one_2 * whole_2), 1.0), math.sqrt(one_2 / whole_2)


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """Summed in float64, a part at a time: whole copies of both would take gigabytes."""
    parts = zip(one.split(1 << 24), other.split(1 << 24), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in parts)


def degrees(cosine: float) -> float:
    return math.degrees(math.acos(cosine))


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
        count = len(here["top-50"]["labels"])
        targets += count
        for way, loss, gradient in gradients(student, teacher, here, asked):
            if way == WHOLE:
                kls.append(loss)
                whole = gradient
            else:
                figures[way].append(compared(gradient, whole))
            sums[way] = sums[way].add_(gradient, alpha=count) if number else gradient * count
    print(f"\n{name}: KL {mean(kls):.2f} nats, {batches} batches of about {targets // batches} targets\n")
    print("| support | of | entries | bytes | angle, ° | ratio of norms | all batches, ° | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for support, key in asked:
        manifest, data = caches[key].manifest, rows[key]
        entries = mean(len(data[i].topk.ids) for i in range(len(data))) / (data.targets / len(data))
        size = manifest.total("bytes") / manifest.total("targets")
        cosines, ratios = zip(*figures[support, key], strict=True)
        angles = [degrees(cosine) for cosine in cosines]
        cosine, ratio = compared(sums[support, key], sums[WHOLE])
        print(
            f"| `{support}` | {key} | {entries:.1f} | {size:.0f} | {mean(angles):.1f} ± {stdev(angles):.1f} "
            f"| {mean(ratios):.2f} ± {stdev(ratios):.2f} | {degrees(cosine):.1f} | {ratio:.2f} |",
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
