"""Does it help that the student is taught on its own words? (docs/results.md)

The quickstart's bake, trained from its cache for some steps with a share of them on-policy, for three divergences and
three seeds; then the share at equal teacher tokens: the more is asked on-policy, the fewer rows are cached. Results are
appended to a JSON lines file as they come, and a table is printed from it.

    make quickstart                                      # once: the cache
    .venv/bin/python benchmarks/on_policy.py             # all that the file lacks yet
    .venv/bin/python benchmarks/on_policy.py --table     # the tables alone
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "pipelines/quickstart.yaml"
RESULTS = ROOT / "runs/on-policy-results.jsonl"
STEPS, BATCH, NEW_TOKENS = 16, 4, 32
ROWS = STEPS * BATCH
FRACTIONS = (0.0, 0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)


def plan():
    """(divergence, fraction, share of the rows that are paid for, seed), the most telling first."""
    for seed in SEEDS:
        yield from (("forward_kl", fraction, 1.0, seed) for fraction in FRACTIONS)
    for seed in SEEDS:
        yield from ((other, fraction, 1.0, seed) for other in ("jsd", "reverse_kl") for fraction in (0.0, 0.5))
        yield from (("forward_kl", fraction, 1 - fraction, seed) for fraction in (0.25, 0.5))


def measured(divergence, fraction, share, seed):
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from bakery import CacheReader, distill, load_recipe
    from bakery.config import SamplingConfig
    from bakery.generation import end_ids
    from bakery.prompts.tokenizers import load_tokenizer
    from bakery.student.model import bare
    from bakery.student.sampling import sample_responses
    from bakery.teachers.opening import open_teacher

    cache = CacheReader(ROOT / "caches/quickstart")
    out = ROOT / "runs/on-policy-benchmark"
    shutil.rmtree(out, ignore_errors=True)
    sets = {
        "caches": [{"path": str(cache.path), "weight": share * ROWS / cache.rows("train")}],
        "on_policy": {"fraction": fraction, "max_new_tokens": NEW_TOKENS, "lag": 0},
        "loss.divergence": divergence,
        "loss.beta": 0.5,
        "training.output_dir": str(out),
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": BATCH,
        "training.seed": seed,
    }
    recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in sets.items()])
    distill(recipe, device="cpu")
    metrics = json.loads((out / "metrics.json").read_text())
    on_policy = CacheReader(out / "on-policy").manifest.total("targets") if fraction else 0
    paid = round(cache.manifest.total("targets", "train") * share * ROWS / cache.rows("train")) if fraction < 1 else 0

    # What the student writes on held-out prompts, as likely as the teacher with its prefix finds it.
    config = recipe.teacher
    tokenizer = load_tokenizer(config.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=torch.bfloat16)
    student = PeftModel.from_pretrained(base, out)
    rows = [record.example for record in cache.records("validation")]
    sampling = SamplingConfig(temperature=0.5, max_new_tokens=NEW_TOKENS)
    ends, seeds = end_ids(bare(student), tokenizer.eos_token_id), list(range(len(rows)))
    vocabulary = cache.manifest.vocab_size
    written = sample_responses(student, [e.student_context for e in rows], sampling, ends, vocabulary, seeds)
    teacher = open_teacher(config, tokenizer).open()
    scored = teacher.score([e.teacher_context for e in rows], written, [np.ones(len(r), bool) for r in written], 1)
    likelihood = sum(float(t.token_logprob.sum()) for t in scored) / sum(map(len, written))
    return {
        "divergence": divergence,
        "fraction": fraction,
        "share": share,
        "seed": seed,
        "kl": metrics["heldout"]["after"]["kl"],
        "kl_before": metrics["heldout"]["before"]["kl"],
        "likelihood": likelihood,
        "length": sum(map(len, written)) / len(written),
        "teacher_tokens": paid + on_policy,
        "seconds": metrics["seconds"]["train"],
    }


def tables(found):
    def line(divergence, fraction, share):
        same = [r for r in found if (r["divergence"], r["fraction"], r["share"]) == (divergence, fraction, share)]
        if not same:
            return
        cells = [f"{statistics.mean(r[name] for r in same):,.0f}" for name in ("teacher_tokens", "seconds")]
        for name in ("kl", "likelihood"):
            values = [r[name] for r in same]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        length = f"{statistics.mean(r['length'] for r in same):.1f}"
        name = "off-policy" if fraction == 0 else f"λ = {fraction:g}"
        print(f"| {divergence} | {name} | {len(same)} | {' | '.join(cells)} | {length} |")

    names = ("loss", "on-policy", "seeds", "teacher tokens", "training, s")
    names += ("held-out KL", "log-likelihood of samples", "length")
    head = f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|"
    print(head)
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        for fraction in FRACTIONS:
            line(divergence, fraction, 1.0)
    print(head)
    for fraction, share in ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 1.0)):
        line("forward_kl", fraction, share)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    only_table = parser.parse_args().table
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(r["divergence"], r["fraction"], r["share"], r["seed"]) for r in found}
    for arm in [] if only_table else [arm for arm in plan() if arm not in done]:
        found.append(measured(*arm))
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(found[-1]) + "\n")
    tables(found)


if __name__ == "__main__":
    main()
