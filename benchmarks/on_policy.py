"""Does it help that the student is taught on its own words? (docs/results.md)

The quickstart's bake, trained from its cache for some steps with a share of them on-policy: three divergences, three
seeds, at equal steps and at equal teacher tokens (the more is asked on-policy, the fewer rows are cached), from the
student as it is and from one that cached steps have warmed up. Results are appended to a JSON lines file as they come,
and tables are printed from it.

    make quickstart                                      # once: the cache
    .venv/bin/python benchmarks/on_policy.py             # all that the file lacks yet
    .venv/bin/python benchmarks/on_policy.py --table     # the tables alone
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "pipelines/quickstart.yaml"
CACHE = ROOT / "caches/quickstart"
WARM, RUN = ROOT / "runs/on-policy-warm", ROOT / "runs/on-policy-benchmark"
RESULTS = ROOT / "benchmarks/on_policy_results.jsonl"
STEPS, BATCH, NEW_TOKENS = 16, 4, 32
ROWS = STEPS * BATCH
WRITTEN = 4  # samples to each held-out prompt
FRACTIONS = (0.0, 0.25, 0.5, 1.0)
DIVERGENCES = ("forward_kl", "jsd", "reverse_kl")
SEEDS = (0, 1, 2)


class Arm(NamedTuple):
    start: str  # "base", or "warm": after STEPS steps of forward KL from the cache
    divergence: str
    fraction: float  # of steps that are on-policy
    share: float  # of the cached rows that are paid for
    seed: int


def plan():
    """The most telling first."""
    part = {fraction: 1 - fraction for fraction in (0.25, 0.5)}
    for seed in SEEDS:
        yield from (Arm("base", "forward_kl", fraction, 1.0, seed) for fraction in FRACTIONS)
        yield from (Arm("base", "forward_kl", fraction, share, seed) for fraction, share in part.items())
    for seed in SEEDS:
        yield from (Arm("warm", "forward_kl", fraction, 1.0, seed) for fraction in (0.0, 1.0))
    for seed in SEEDS:
        for other in DIVERGENCES[1:]:
            yield from (Arm("base", other, fraction, 1.0, seed) for fraction in FRACTIONS)
    for seed in SEEDS:
        for other in DIVERGENCES[1:]:
            yield from (Arm("base", other, fraction, share, seed) for fraction, share in part.items())
    for seed in SEEDS:
        for other in DIVERGENCES[1:]:
            yield from (Arm("warm", other, fraction, 1.0, seed) for fraction in (0.0, 1.0))


class Bench:
    """What all arms are measured with: the held-out rows, and the teacher with its prefix."""

    def __init__(self):
        from bakery import CacheReader, load_recipe
        from bakery.prompts.tokenizers import load_tokenizer
        from bakery.teachers.opening import open_teacher

        self.cache = CacheReader(CACHE)
        self.config = load_recipe(RECIPE).teacher
        self.tokenizer = load_tokenizer(self.config.model_name_or_path)
        self.teacher = open_teacher(self.config, self.tokenizer).open()
        self.prompts = [record.example for record in self.cache.records("validation")] * WRITTEN

    def trained(self, arm, steps=STEPS):
        """The run of an arm, in RUN."""
        from bakery import distill, load_recipe

        shutil.rmtree(RUN, ignore_errors=True)
        sets = {
            "student.model_name_or_path": str(WARM) if arm.start == "warm" else self.config.model_name_or_path,
            "caches": [{"path": str(CACHE), "weight": arm.share * ROWS / self.cache.rows("train")}],
            "on_policy": {"fraction": arm.fraction, "max_new_tokens": NEW_TOKENS, "lag": 0},
            "loss.divergence": arm.divergence,
            "loss.beta": 0.5,
            "training.output_dir": str(RUN),
            "training.max_steps": steps,
            "training.per_device_train_batch_size": BATCH,
            "training.seed": arm.seed,
        }
        recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in sets.items()])
        distill(recipe, device="cpu")
        return json.loads((RUN / "metrics.json").read_text())

    def student(self, start):
        """The student that RUN's adapter makes of where it started."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = WARM if start == "warm" else self.config.model_name_or_path
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), RUN)

    def warm_up(self):
        self.trained(Arm("base", "forward_kl", 0.0, 1.0, 100))
        self.student("base").merge_and_unload().save_pretrained(WARM)
        self.tokenizer.save_pretrained(WARM)

    def measured(self, arm):
        from bakery import CacheReader
        from bakery.reports.evaluate import evaluate

        metrics = self.trained(arm)
        asked = CacheReader(RUN / "on-policy").manifest.total("targets") if arm.fraction else 0
        cached = self.cache.manifest.total("targets", "train") * arm.share * ROWS / self.cache.rows("train")
        student = self.student(arm.start)
        own = OwnWords(self.own_words(student, arm.seed))
        tokens = sum(len(record.topk) for record in own)
        return {
            **arm._asdict(),
            "kl": metrics["heldout"]["after"]["kl"],
            "kl_before": metrics["heldout"]["before"]["kl"],
            "own_kl": evaluate(student, own)["kl"],
            "likelihood": sum(float(record.topk.token_logprob.sum()) for record in own) / tokens,
            "length": tokens / len(own),
            "teacher_tokens": asked + (round(cached) if arm.fraction < 1 else 0),
            "seconds": metrics["seconds"]["train"],
        }

    def own_words(self, student, seed):
        """What the student writes to the held-out prompts, as the teacher with its prefix finds it."""
        from bakery.config import SamplingConfig
        from bakery.generation import end_ids
        from bakery.student.model import bare
        from bakery.student.sampling import sample_responses
        from bakery.teachers.asking import answer_batch, plan_calls

        sampling = SamplingConfig(temperature=0.5, max_new_tokens=NEW_TOKENS)
        ends, seeds = end_ids(bare(student), self.tokenizer.eos_token_id), list(range(len(self.prompts)))
        contexts = [example.student_context for example in self.prompts]
        written = sample_responses(student, contexts, sampling, ends, self.cache.manifest.vocab_size, seeds)
        answered = [example.answered(ids) for example, ids in zip(self.prompts, written, strict=True)]
        calls = plan_calls(self.teacher, answered, None)
        return [record for call in calls for record in answer_batch(self.teacher, call, self.config, None)]


class OwnWords(list):
    """Records, as `evaluate` reads them."""

    sampled = False  # supports are top-k

    @property
    def lengths(self):
        return np.array([len(r.example.student_context) + len(r.example.response) for r in self])


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS = ("start", "loss", "on-policy", "seeds", "teacher tokens", "training, s")
COLUMNS += ("held-out KL", "KL on its own words", "log-likelihood of samples", "length")


def row(found, arm):
    same = [r for r in found if all(r[name] == value for name, value in arm._asdict().items() if name != "seed")]
    if not same:
        return
    cells = [f"{statistics.mean(r[name] for r in same):,.0f}" for name in ("teacher_tokens", "seconds")]
    for name in ("kl", "own_kl", "likelihood"):
        values = [r[name] for r in same]
        cells.append(f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if values[1:] else ""))
    cells.append(f"{statistics.mean(r['length'] for r in same):.1f}")
    name = f"λ = {arm.fraction:g}" if arm.fraction else "off-policy"
    print(f"| {arm.start} | {arm.divergence} | {name} | {len(same)} | {' | '.join(cells)} |")


def tables(found):
    shares = {fraction: 1 - fraction if 0 < fraction < 1 else 1.0 for fraction in FRACTIONS}
    for title, start, share_of in (
        ("At equal steps", "base", dict.fromkeys(FRACTIONS, 1.0)),
        ("At equal teacher tokens", "base", shares),
        ("From a student that is warm", "warm", dict.fromkeys(FRACTIONS, 1.0)),
    ):
        print(f"\n## {title}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for divergence in DIVERGENCES:
            for fraction in FRACTIONS:
                row(found, Arm(start, divergence, fraction, share_of[fraction], 0))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    only_table = parser.parse_args().table
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {Arm(*(r[name] for name in Arm._fields)) for r in found}
    todo = [] if only_table else [arm for arm in plan() if arm not in done]
    bench = Bench() if todo else None
    for arm in todo:
        if arm.start == "warm" and not (WARM / "config.json").exists():
            bench.warm_up()
        found.append(bench.measured(arm))
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(found[-1]) + "\n")
    tables(found)


if __name__ == "__main__":
    main()
