"""One recipe, three backends: do the students that their caches teach agree? (docs/benchmarks.md)

The responses that the quickstart's teacher wrote are given to each backend to score, and a student is distilled from
each cache. What another training seed does is the noise to hold the differences against.

    make quickstart test-servers     # once
    .venv/bin/python benchmarks/backends_agree.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/servers"))
from real_servers import VLLM_ENVIRONMENT, VLLM_PYTHON, vllm_server  # noqa: E402

from bakery import CacheReader, cache_teacher, distill, load_recipe  # noqa: E402
from bakery.prompts.tokenizers import load_tokenizer  # noqa: E402
from bakery.reports.samples import prompt_text  # noqa: E402

MODEL = ROOT / "models/smollm2-135m-instruct"
ROWS = 48
STEPS = 10
SCORE_ALONE = """
import sys
from bakery import cache_teacher, load_recipe
if __name__ == "__main__":
    cache_teacher(load_recipe(sys.argv[1], sys.argv[2:]))
"""


def overrides(out, prompts, **more):
    sets = {
        "teacher.dtype": "float32",
        "teacher.top_k": 20,
        "teacher.tokens_per_batch": 2048,
        "prompts.path": str(prompts),
        "prompts.validation_fraction": 0.4,  # the rows are of its train split: 0.15 would hold out none
        "sampling": None,
        "cache.out": str(out),
        **more,
    }
    return [f"{key}={json.dumps(value)}" for key, value in sets.items()]


def main():
    work = Path(tempfile.mkdtemp(prefix="backends-agree-"))
    tokenizer = load_tokenizer(str(MODEL))
    prompts = work / "prompts.jsonl"
    with prompts.open("w") as stream:
        for _, record in zip(range(ROWS), CacheReader(ROOT / "caches/quickstart").records("train"), strict=False):
            response = tokenizer.decode(record.example.response, skip_special_tokens=True)
            stream.write(json.dumps({"prompt": prompt_text(tokenizer, record), "response": response}) + "\n")
    recipe = ROOT / "pipelines/quickstart.yaml"

    caches = {"hf": cache_teacher(load_recipe(recipe, overrides(work / "hf", prompts)))}
    with vllm_server(MODEL, work / "log") as url:
        api = {"base_url": url, "model": "smollm2", "timeout": 600}
        served = overrides(work / "openai", prompts, **{"teacher.backend": "openai", "teacher.api": api})
        caches["openai (vLLM)"] = cache_teacher(load_recipe(recipe, served))
    engine = {"max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True}
    inside = overrides(work / "vllm", prompts, **{"teacher.backend": "vllm", "teacher.engine": engine})
    (work / "score.py").write_text(SCORE_ALONE)
    environment = {**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    subprocess.run([VLLM_PYTHON, work / "score.py", recipe, *inside], check=True, env=environment, cwd=ROOT)
    caches["vllm"] = work / "vllm"

    print("| cache scored by | training seed | held-out KL before | after |\n|---|---|---|---|")
    for name, seed in [*((name, 0) for name in caches), ("hf", 1), ("hf", 2)]:
        run = work / f"run-{name[:4]}-{seed}"
        training = {"training.max_steps": STEPS, "training.seed": seed, "training.output_dir": str(run)}
        distill(load_recipe(recipe, overrides(caches[name], prompts, **training)))
        heldout = json.loads((run / "metrics.json").read_text())["heldout"]
        print(f"| {name} | {seed} | {heldout['before']['kl']:.5f} | {heldout['after']['kl']:.5f} |", flush=True)


if __name__ == "__main__":
    main()
