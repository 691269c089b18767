"""Stage one through a proxy that spoils answers: at the end the cache is complete and right, or the run says precisely
what is missing and the next one asks for that alone."""

import json
import os
from contextlib import closing

import numpy as np
import pytest
from fault_proxy import FaultProxy
from stub_server import Stub, serving

from bakery import CacheReader, cache_teacher, load_recipe
from bakery.errors import RecipeError, TeacherError
from bakery.shards.validate import validate
from bakery.teachers.opening import open_teacher, probe_teacher

RETRIED = ["429", "500", "reset", "close_early", "truncated_json", "delay"]
BAD_CONTENT = ["fewer_than_k", "duplicate_id", "nan", "positive", "shifted", "other_model", "fewer_choices"]


@pytest.fixture
def stub(tiny_tokenizer):
    from bakery.config import TeacherConfig
    from bakery.teachers.fake import FakeTeacher

    teacher = FakeTeacher(TeacherConfig(backend="fake", model_name_or_path="x"), tiny_tokenizer)
    with serving(Stub(teacher, tiny_tokenizer)) as server:
        yield server


@pytest.fixture
def recipe(tmp_path):
    """A recipe on any server: 24 rows to score, a few to a request."""
    rows = [{"prompt": f"question {i}", "response": f"answer {i * i}"} for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(url, out, *more):
        tree = {
            "teacher.backend": "openai",
            "teacher.model_name_or_path": "data/golden-tokenizer",
            "teacher.top_k": 8,
            "teacher.api": {
                "base_url": url,
                "model": "stub",
                "timeout": 1.0,
                "max_retries": 3,
                "in_flight": 4,
                "prompts_per_request": 3,
            },
            "prompts.path": str(tmp_path / "prompts.jsonl"),
            "cache.out": str(tmp_path / out),
            "cache.rows_per_shard": 10,
        }
        empty = tmp_path / "empty.yaml"
        empty.write_text("{}")
        return load_recipe(empty, [*(f"{key}={json.dumps(value)}" for key, value in tree.items()), *more])

    return make


def shards(path):
    return {file.name: file.read_bytes() for file in sorted((path / "data").iterdir())}


@pytest.mark.parametrize("fault", RETRIED)
def test_what_passes_is_retried(stub, recipe, fault):
    """Every third completion fails once; the cache is that of an untroubled run, to the byte."""
    plain = cache_teacher(recipe(stub.url, "plain"))
    with serving(FaultProxy(stub.url, lambda number, body: fault if number % 3 == 1 else None)) as proxy:
        troubled = cache_teacher(recipe(proxy.url, "troubled"))
    assert len(proxy.faults) >= 3
    assert shards(troubled) == shards(plain)


@pytest.mark.parametrize("fault", BAD_CONTENT)
def test_a_wrong_answer_is_asked_for_again(stub, recipe, fault):
    plain = cache_teacher(recipe(stub.url, "plain"))
    spoil_once = set()

    def plan(number, body):
        first = str(body["prompt"][0])
        if number < 5 or len(body["prompt"]) == 1 or first in spoil_once:
            return None  # the probe's own requests, and second tries
        spoil_once.add(first)
        return fault

    with serving(FaultProxy(stub.url, plan)) as proxy:
        troubled = cache_teacher(recipe(proxy.url, "troubled"))
    assert proxy.faults
    assert shards(troubled) == shards(plain)


@pytest.mark.parametrize("fault", ["fewer_than_k", "nan", "other_model", "500"])
def test_what_never_comes_is_named_and_the_next_run_asks_for_it_alone(stub, recipe, fault):
    plain = cache_teacher(recipe(stub.url, "plain"))
    poisoned = [list(r.example.response) for r in CacheReader(plain).records()][7]

    def plan(number, body):
        wrong = any(prompt[-len(poisoned) :] == poisoned for prompt in body["prompt"])
        return fault if wrong and not body.get("echo") and body.get("prompt_logprobs") else None

    with serving(FaultProxy(stub.url, plan)) as proxy, pytest.raises(TeacherError, match="1 of 24 examples") as error:
        cache_teacher(recipe(proxy.url, "troubled"))
    assert "run the same command again" in str(error.value)
    before = len(stub.requests)
    troubled = cache_teacher(recipe(stub.url, "troubled", f"teacher.api.base_url={stub.url}"))
    asked = [prompt for body in stub.requests[before:] for prompt in body["prompt"]]
    assert [prompt for prompt in asked if prompt[-len(poisoned) :] == poisoned]
    assert (
        sum(len(body["prompt"]) for body in stub.requests[before:] if body.get("prompt_logprobs")) <= 1 + 2
    )  # + probe
    assert shards(troubled) == shards(plain)
    assert validate(troubled) == []


def test_order_of_answers_never_changes_the_cache(stub, recipe):
    slow = {1, 2, 6}
    with serving(FaultProxy(stub.url, lambda number, body: "500" if number in slow else None)) as proxy:
        one = cache_teacher(recipe(proxy.url, "one", "teacher.api.in_flight=8"))
    two = cache_teacher(recipe(stub.url, "two", "teacher.api.in_flight=1", "teacher.api.prompts_per_request=1"))
    assert shards(one) == shards(two)


def test_written_responses_are_those_of_the_seed(stub, recipe, tmp_path):
    sampling = 'sampling={"temperature": 0.8, "max_new_tokens": 12, "n": 2, "seed": 3}'
    one = cache_teacher(recipe(stub.url, "one", sampling))
    two = cache_teacher(recipe(stub.url, "two", sampling, "teacher.api.in_flight=1"))
    assert shards(one) == shards(two)
    responses = [record.example.response.tobytes() for record in CacheReader(one).records()]
    assert len(set(responses)) > len(responses) // 2  # two samples of a prompt are two


def test_scored_by_prompt_logprobs_or_echo_alike(stub, recipe, monkeypatch):
    """Defect 1: entry t of either answer belongs to token t itself."""
    plain = cache_teacher(recipe(stub.url, "plain"))
    answer = stub.answer

    def only_echo(path, body):
        if body and body.get("prompt_logprobs"):
            body = {**body, "prompt_logprobs": None, "logprobs": None, "max_tokens": 0, "echo": False, "prompt": []}
            return 200, {"model": "stub", "choices": []}
        return answer(path, body)

    monkeypatch.setattr(stub, "answer", only_echo)
    assert shards(cache_teacher(recipe(stub.url, "echo"))) == shards(plain)


def test_defect_1_an_answer_shifted_by_one_is_refused(stub, recipe, monkeypatch):
    """A server whose scored entries stand one place early is found out when it is opened."""
    ranked = stub._ranked

    def early(sequence, t, k):
        row = ranked(sequence, min(t + 1, len(sequence) - 1), k)
        own = {str(int(sequence[t])): {"logprob": -2.0}}
        return row and t and {**row, **own}

    monkeypatch.setattr(stub, "_ranked", early)
    with pytest.raises(TeacherError, match="not the scored one"):
        cache_teacher(recipe(stub.url, "shifted"))


def test_defect_10_k_above_the_servers_limit_names_the_flag(stub, recipe):
    with pytest.raises(TeacherError, match="--max-logprobs"):
        cache_teacher(recipe(stub.url, "wide", "teacher.top_k=64"))


def test_temperatures_are_refused_for_a_server(stub, recipe):
    with pytest.raises(RecipeError, match=r"cache\.temperatures"):
        cache_teacher(recipe(stub.url, "warm", "cache.temperatures=[2.0]"))


def test_the_key_is_sent_and_never_written(stub, recipe, tmp_path, monkeypatch, caplog):
    secret = "sk-" + "very" + "secret"
    monkeypatch.setenv("MY_KEY", secret)
    out = cache_teacher(recipe(stub.url, "keyed", "teacher.api.key_env=MY_KEY"))
    assert f"Bearer {secret}" in stub.keys
    with serving(FaultProxy(stub.url, lambda number, body: "500")) as proxy, pytest.raises(TeacherError) as error:
        cache_teacher(recipe(proxy.url, "failing", "teacher.api.key_env=MY_KEY", "teacher.api.max_retries=0"))
    assert secret not in str(error.value) + repr(error.value.__cause__) + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert out / "manifest.json" in files
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_defect_9_a_proxy_variable_does_not_reroute_loopback(stub, recipe, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setitem(os.environ, name, "http://127.0.0.1:9")
    assert cache_teacher(recipe(stub.url, "direct")).is_dir()


def test_reuse_takes_over_what_another_cache_answers(stub, recipe):
    plain = cache_teacher(recipe(stub.url, "plain"))
    before = len(stub.requests)
    smaller = cache_teacher(recipe(stub.url, "smaller", "teacher.top_k=4"), reuse=[plain])
    assert len(stub.requests) == before
    fresh = cache_teacher(recipe(stub.url, "fresh", "teacher.top_k=4"))
    for mine, theirs in zip(CacheReader(smaller).records(), CacheReader(fresh).records(), strict=True):
        assert mine.topk.ids.tolist() == theirs.topk.ids.tolist()
        assert abs(mine.topk.tail_logprob - theirs.topk.tail_logprob).max() < 0.02  # the grid of the entries that left


SAMPLING = 'sampling={"temperature": 0.8, "max_new_tokens": 12, "seed": 3}'


def test_a_chat_endpoint_writes_the_same_cache(stub, recipe):
    """Tokens named by text and bytes are mapped to the ids that the completions endpoint gives."""
    by_ids = cache_teacher(recipe(stub.url, "ids", SAMPLING))
    by_chat = cache_teacher(recipe(stub.url, "chat", SAMPLING, "teacher.api.endpoint=chat"))
    for one, other in zip(CacheReader(by_ids).records(), CacheReader(by_chat).records(), strict=True):
        assert one.example.response.tolist() == other.example.response.tolist()
        assert one.topk.ids.tolist() == other.topk.ids.tolist()
        assert one.topk.logprobs.tolist() == other.topk.logprobs.tolist()


def test_a_chat_endpoint_whose_tokens_are_others_is_refused(stub, recipe, monkeypatch, tmp_path):
    """Defect 7: a token string is never encoded again for its first piece."""
    monkeypatch.setattr(stub, "name", lambda token: {"token": "whole words", "bytes": list(b"whole words")})
    with pytest.raises(TeacherError, match="no single token of the student's vocabulary"):
        cache_teacher(recipe(stub.url, "words", SAMPLING, "teacher.api.endpoint=chat"))
    assert not (tmp_path / "words").exists()


class Following(Stub):
    """Its log-probs are those after the sampling temperature, as vLLM's processed_logprobs are."""

    temperature = 1.0

    def answer(self, path, body):
        self.temperature = (body or {}).get("temperature") or 1.0
        return super().answer(path, body)

    def _row(self, sequence, t, k):
        if t == 0:
            return None
        logits = self.teacher._after(sequence[:t]) / self.temperature
        logprobs = logits - np.logaddexp.reduce(logits)
        best = [int(sequence[t]), *np.argsort(-logprobs, kind="stable")[:k].tolist()]
        return {i: float(logprobs[i]) for i in dict.fromkeys(best)}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_log_probs_that_follow_the_temperature_are_refused(stub, recipe, endpoint):
    refused = pytest.raises(TeacherError, match=r"follow the sampling temperature; .*raw_logprobs")
    with serving(Following(stub.teacher, stub.tokenizer)) as following, refused:
        cache_teacher(recipe(following.url, "hot", SAMPLING, f"teacher.api.endpoint={endpoint}"))


def test_a_chat_endpoint_is_opened_by_two_tokens(stub, recipe, monkeypatch):
    chat, bodies = Stub._chat, []
    monkeypatch.setattr(Stub, "_chat", lambda self, body: bodies.append(body) or chat(self, body))
    with closing(
        open_teacher(recipe(stub.url, "chat", "teacher.api.endpoint=chat").teacher, stub.tokenizer)
    ) as teacher:
        teacher.open()
    assert [(body["temperature"], body["max_tokens"]) for body in bodies] == [(0.0, 1), (2.0, 1)]


def test_a_chat_endpoint_scores_nothing(stub, recipe):
    with pytest.raises(RecipeError, match="cannot score given responses"):
        cache_teacher(recipe(stub.url, "scored", "teacher.api.endpoint=chat"))


def test_a_chat_endpoint_is_probed(stub, recipe):
    found = probe_teacher(recipe(stub.url, "chat", "teacher.api.endpoint=chat").teacher)
    assert (found.generates, found.score_by, found.raw, found.max_length) == (True, None, True, 1024)


def test_a_server_is_probed(stub, recipe):
    found = probe_teacher(recipe(stub.url, "any").teacher)
    assert (found.generates, found.score_by, found.aligned, found.raw) == (True, "prompt_logprobs", True, True)
    assert (found.largest_k, found.whole_vocabulary) == (20, True)
