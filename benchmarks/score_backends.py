"""Tokens scored a second by each teacher, side by side in one run, on SmolLM2-135M in float32 (docs/benchmarks.md).

make test-servers            # once: installs what the servers need
.venv/bin/python benchmarks/score_backends.py
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/servers"))
from real_servers import VLLM_ENVIRONMENT, VLLM_PYTHON, vllm_server  # noqa: E402

from bakery.config import ApiConfig, TeacherConfig  # noqa: E402
from bakery.prompts.tokenizers import load_tokenizer  # noqa: E402
from bakery.records import Example, ids_array  # noqa: E402
from bakery.teachers.asking import answer_batch, ask_all  # noqa: E402
from bakery.teachers.opening import open_teacher  # noqa: E402

MODEL = ROOT / "models/smollm2-135m-instruct"
SEQUENCES, CONTEXT, RESPONSE, K = 64, 16, 96, 20


def questions(tokenizer):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    ids = ids_array(tokenizer.encode(text[:60_000]))[: SEQUENCES * (CONTEXT + RESPONSE)].reshape(SEQUENCES, -1)
    everything = np.ones(RESPONSE, bool)
    return [Example(str(i), row[:CONTEXT], row[:CONTEXT], row[CONTEXT:], everything) for i, row in enumerate(ids)]


def timed(config, examples, per_call, in_flight):
    teacher = open_teacher(config, load_tokenizer(str(MODEL))).open()
    batches = [examples[i : i + per_call] for i in range(0, len(examples), per_call)]
    answer_batch(teacher, examples[:2], config, None)  # the first request is slow everywhere
    start = time.perf_counter()
    answered = sum(
        len(pairs) for pairs in ask_all(lambda b: answer_batch(teacher, b, config, None), batches, in_flight)
    )
    assert answered == len(examples)
    return time.perf_counter() - start


def in_process(examples):
    """The engine lives in a virtual environment of its own; the worker says how long scoring took."""
    with tempfile.TemporaryDirectory() as directory:
        asked = Path(directory) / "questions.json"
        sides = {"contexts": "teacher_context", "responses": "response"}
        tree = {name: [getattr(e, field).tolist() for e in examples] for name, field in sides.items()}
        asked.write_text(json.dumps({**tree, "k": K, "new_tokens": 1}))
        subprocess.run(
            [VLLM_PYTHON, ROOT / "tests/servers/vllm_worker.py", MODEL, asked, Path(directory) / "a.npz"],
            check=True,
            env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return float(np.load(Path(directory) / "a.npz")["score_seconds"])


def main():
    examples = questions(load_tokenizer(str(MODEL)))
    hf = TeacherConfig(model_name_or_path=str(MODEL), dtype="float32", tokens_per_batch=2048)
    rows = [("hf", "batches of 2,048 tokens", timed(hf, examples, 16, 1))]
    with tempfile.TemporaryDirectory() as directory, vllm_server(MODEL, Path(directory) / "log") as url:
        for in_flight in (1, 8, 64):
            api = ApiConfig(base_url=url, model="smollm2", in_flight=in_flight, timeout=600)
            config = TeacherConfig(backend="openai", model_name_or_path=str(MODEL), top_k=K, api=api)
            rows.append(
                ("openai (vLLM)", f"{in_flight} in flight, 1 prompt a request", timed(config, examples, 1, in_flight))
            )
        rows.append(("openai (vLLM)", "8 in flight, 8 prompts a request", timed(config, examples, 8, 8)))
    rows.append(("vllm", "in the process", in_process(examples)))
    rows.append(("hf", "again, at the end", timed(hf, examples, 16, 1)))
    targets = SEQUENCES * RESPONSE
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "openai"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(f"{SEQUENCES} sequences of {CONTEXT} + {RESPONSE} tokens, top-{K}, float32; {time.strftime('%Y-%m-%d')}\n")
    print("| backend | how | s | targets/s | × hf |\n|---|---|---|---|---|")
    for name, how, seconds in rows:
        print(f"| {name} | {how} | {seconds:.1f} | {targets / seconds:.0f} | {rows[0][2] / seconds:.2f} |")


if __name__ == "__main__":
    main()
