"""The dataset card of a cache: its README.md, which also tells `datasets` where each split's shards are."""

from bakery.shards.manifest import Manifest
from bakery.shards.versions import FORMAT_VERSION


def dataset_card(manifest: Manifest) -> str:
    teacher = manifest.teacher
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in manifest.splits)
    rows = "\n".join(
        f"| {split} | {manifest.total('rows', split):,} | {manifest.total('targets', split):,} "
        f"| {manifest.total('bytes', split):,} |"
        for split in manifest.splits
    )
    steps = sorted({manifest.logprob_step, manifest.logprob_step_max})
    grid = f"a grid of {' to '.join(map(str, steps))} nats" if manifest.grid else "exact float32"
    mass = f", or fewer once they hold {manifest.top_mass} of the mass" if manifest.top_mass else ""
    kept = f"| top-k | {manifest.k} of {manifest.vocab_size:,} tokens{mass} |"
    read = "`tail_logprob` is the log of the mass outside it."
    if manifest.draws:
        kept = f"| sample | {manifest.draws} draws at each target, from all {manifest.vocab_size:,} tokens |"
        read = "a\nlog-prob is the log of the token's share of the draws, `tail_logprob` the mean log-prob of them all."
    part = f"| part | {manifest.part[0]} of {manifest.part[1]}, to be merged |\n" if manifest.part else ""
    per_target = manifest.total("bytes") / max(manifest.total("targets"), 1)
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- bakery
- knowledge-distillation
---
# Teacher log-probabilities

Made by bakery {manifest.bakery_version}, cache format {FORMAT_VERSION}.

| | |
|---|---|
| teacher | `{teacher.name}` ({teacher.backend}, {teacher.dtype}, fingerprint `{teacher.fingerprint[:16]}`) |
| responses | {_responses(manifest)} |
{kept}
| log-probs | natural log, temperature 1, over the full vocabulary; stored on {grid} |
| other temperatures | {", ".join(map(str, manifest.temperatures)) or "none"} |
{part}| tokenizer | fingerprint `{manifest.tokenizer_fingerprint[:16]}` |

| split | rows | targets | bytes |
|---|---|---|---|
{rows}

{per_target:.0f} bytes a target. Support n predicts target n, the n-th true entry of `is_target`. `support_size` cuts
the flat `topk_ids` and `topk_logprobs` into one support a target; {read}

```python
from datasets import load_dataset
cache = load_dataset("path/to/this/directory")

from bakery import CacheReader
for record in CacheReader("path/to/this/directory").records("train"):
    ...
```
"""


def _responses(manifest: Manifest) -> str:
    sampling = manifest.sampling
    if sampling is None:
        return "given with the prompts"
    if sampling.prompts_alone:
        return "none: prompts for on-policy steps"
    writer = "the student as it trained" if "on_policy" in manifest.recipe else "the teacher"
    return (
        f"written by {writer} (temperature {sampling.temperature}, top-p {sampling.top_p}, at most "
        f"{sampling.max_new_tokens} tokens, {sampling.n} a prompt, seed {sampling.seed})"
    )
