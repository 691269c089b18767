"""Runs in vLLM's own virtual environment: questions from a JSON file to the in-process teacher, answers to an .npz.

python vllm_worker.py MODEL QUESTIONS.json ANSWERS.npz
"""

import json
import sys
import time

import numpy as np

from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import ids_array
from bakery.teachers.opening import open_teacher

if __name__ == "__main__":
    model, questions, answers = sys.argv[1:]
    with open(questions) as stream:
        asked = json.load(stream)
    config = TeacherConfig(
        backend="vllm",
        model_name_or_path=model,
        dtype="float32",
        top_k=asked["k"],
        engine={"max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True},
    )
    teacher = open_teacher(config, load_tokenizer(model)).open()
    contexts, responses = ([ids_array(ids) for ids in asked[name]] for name in ("contexts", "responses"))
    targets = [np.ones(len(r), bool) for r in responses]
    parts = ("ids", "logprobs", "tail_logprob", "token_logprob")
    teacher.score(contexts[:1], responses[:1], targets[:1], asked["k"])  # the first request is slow
    start = time.perf_counter()
    scored = teacher.score(contexts, responses, targets, asked["k"])
    found = {"score_seconds": time.perf_counter() - start}
    for i, topk in enumerate(scored):
        found |= {f"scored_{i}_{name}": getattr(topk, name) for name in parts}
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=asked["new_tokens"])
    for i, (response, topk) in enumerate(teacher.generate(contexts, sampling, asked["k"], list(range(len(contexts))))):
        found |= {f"written_{i}_{name}": getattr(topk, name) for name in parts}
        found[f"written_{i}_response"] = response
    np.savez(answers, **found)
