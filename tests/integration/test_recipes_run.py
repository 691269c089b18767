"""pipelines/bake_prefix.yaml on the real model at small scale, and what local_toggle saves of memory."""

import json
import subprocess
import sys

import pytest
from builders import write_jsonl
from conftest import ROOT
from test_smollm2_bake import some_prompts

from bakery.cache import cache_teacher
from bakery.config import load_recipe
from bakery.distillation import distill
from bakery.evaluation import evaluate_run
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate


@pytest.fixture
def sets(smollm2, tmp_path):
    prompts = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in some_prompts(20)])
    return [
        f"prompts.path={prompts}",
        "prompts.validation_fraction=0.3",
        "sampling.max_new_tokens=16",
        f"cache.out={tmp_path / 'cache'}",
        f"training.output_dir={tmp_path / 'run'}",
    ]


@pytest.mark.slow
def test_bake_prefix_and_its_checkpoints(sets):
    recipe = load_recipe(
        ROOT / "pipelines/bake_prefix.yaml",
        [*sets, "training.max_steps=8", "training.save_steps=4", "training.per_device_train_batch_size=4"],
    )
    cache = CacheReader(cache_teacher(recipe))
    assert cache.manifest.teacher.backend == "local_toggle"
    distill(recipe, device="cpu")
    judged = evaluate_run(recipe, "cpu")
    assert [one.step for one in judged] == [0, 4, 8, 8]
    kls = [one.measures["kl"] for one in judged]
    assert kls[0] > kls[1] > kls[2] == pytest.approx(kls[3], rel=0.05)
    assert judged[2].baked > 0.3


# Not ru_maxrss: Linux lets a child begin with its parent's peak, and the parent is this whole test session.
PEAK = """
import re, sys
from pathlib import Path
from bakery.config import load_recipe
from bakery.distillation import distill
distill(load_recipe(sys.argv[1], sys.argv[2:]), device="cpu")
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
def test_local_toggle_has_no_second_copy_of_the_weights_in_memory(sets, smollm2, tmp_path):
    """Peak resident memory of two on-policy steps in processes of their own; the copy is 135 M weights of 4 bytes."""
    sets += ["student.dtype=float32", "teacher.dtype=float32", "training.max_steps=2", 'training.save_strategy="no"']
    sets += ["training.per_device_train_batch_size=2", "on_policy={fraction: 1, max_new_tokens: 8, lag: 0}"]
    cache_teacher(load_recipe(ROOT / "pipelines/bake_prefix.yaml", sets))
    peaks = {}
    for backend in ("local_toggle", "hf"):
        more = [f"teacher={json.dumps({'backend': backend, 'model_name_or_path': str(smollm2), 'top_k': 64})}"]
        more += ["teacher.dtype=float32", f"training.output_dir={tmp_path / backend}"]
        more += [f"student.model_name_or_path={smollm2}"]
        command = [sys.executable, "-c", PEAK, str(ROOT / "pipelines/bake_prefix.yaml"), *sets, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[backend] = int(done.stdout.splitlines()[-1])
        assert validate(tmp_path / backend / "on-policy") == []
    weights = (smollm2 / "model.safetensors").stat().st_size
    saved = peaks["hf"] - peaks["local_toggle"]
    print(f"\npeak memory: hf {peaks['hf'] / 1e6:,.0f} MB, local_toggle {peaks['local_toggle'] / 1e6:,.0f} MB")
    assert saved > 0.7 * weights
