"""What every teacher promises, whatever is behind it: one suite, one factory for each backend.

A new backend adds a factory to TEACHERS and passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conftest import TINY_TOKENIZER

from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import ids_array, topk_problem
from bakery.teachers.opening import open_teacher
from bakery.teachers.protocol import Generator, Scorer

TEMPERATURES = (0.5, 2.0)


@dataclass
class Case:
    teacher: Any
    k: int
    tolerance: float  # nats between two ways to the same answer
    contexts: list
    responses: list
    targets: list
    new_tokens: int
    dense: Callable  # sequence -> logits [T,V] of all of it, by a path of its own


def fake(request):
    tokenizer = load_tokenizer(str(TINY_TOKENIZER))
    config = TeacherConfig(backend="fake", model_name_or_path=str(TINY_TOKENIZER))
    teacher = open_teacher(config, tokenizer, TEMPERATURES).open()

    def dense(sequence):
        """The whole vocabulary as support, one prefix at a time."""
        rows = []
        for end in range(1, len(sequence) + 1):
            prefix, next_token = ids_array(sequence[:end]), ids_array([0])
            whole = teacher.score([prefix], [next_token], [np.ones(1, bool)], teacher.vocab_size)[0]
            rows.append(whole.logprobs[np.argsort(whole.ids)])
        return np.stack(rows)

    return Case(teacher, 16, 1e-6, *_random_questions(), 40, dense)


def hf_tiny(request):
    path = str(request.getfixturevalue("tiny_model"))
    # A small budget, so that one call is several batches.
    config = TeacherConfig(model_name_or_path=path, dtype="float32", device="cpu", tokens_per_batch=48)
    teacher = open_teacher(config, load_tokenizer(path), TEMPERATURES).open()
    return Case(teacher, 16, 2e-4, *_random_questions(), 40, _dense_of_transformers(path))


def hf_behind_a_prefix(request):
    """Ten contexts that begin with the same 70 tokens, which are run once."""
    path = str(request.getfixturevalue("tiny_model"))
    config = TeacherConfig(model_name_or_path=path, dtype="float32", device="cpu", tokens_per_batch=100)
    teacher = open_teacher(config, load_tokenizer(path), TEMPERATURES).open()
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, 256, 70)
    contexts = [ids_array([*prefix, n, *rng.integers(0, 256, 3 * n % 7)]) for n in range(10)]
    responses = [ids_array(rng.integers(0, 256, 4 + n % 5)) for n in range(10)]
    teacher.plan(contexts, [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)], "score")
    assert len(teacher.shared.of(*contexts)) == 70
    targets = [_separated(len(r)) for r in responses]
    return Case(teacher, 16, 2e-4, contexts, responses, targets, 40, _dense_of_transformers(path))


def hf_smollm2(request):
    path = str(request.getfixturevalue("smollm2"))
    tokenizer = load_tokenizer(path)
    config = TeacherConfig(model_name_or_path=path, dtype="float32", device="cpu")
    teacher = open_teacher(config, tokenizer, TEMPERATURES).open()
    texts = [
        ("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n", "Hello! How can I help?<|im_end|>"),
        ("The capital of France is", " Paris, and"),
    ]
    contexts, responses = ([ids_array(tokenizer.encode(pair[side])) for pair in texts] for side in (0, 1))
    return Case(
        teacher,
        64,
        2e-4,
        contexts,
        responses,
        [_separated(len(r)) for r in responses],
        6,
        _dense_of_transformers(path),
    )


TEACHERS = [fake, hf_tiny, hf_behind_a_prefix, hf_smollm2]


def _dense_of_transformers(path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def dense(sequence):
        return model(torch.as_tensor(sequence).long()[None]).logits[0].numpy()

    return dense


def _separated(length):
    """Two stretches of targets with something between that is none; the last token is a target."""
    mask = np.ones(length, bool)
    mask[[0, length // 2]] = False
    return mask


def _random_questions():
    rng = np.random.default_rng(0)
    contexts = [ids_array(rng.integers(0, 256, n)) for n in (3, 17, 9)]
    responses = [ids_array(rng.integers(0, 256, n)) for n in (7, 4, 12)]
    return contexts, responses, [_separated(7), np.ones(4, bool), _separated(12)]


@pytest.fixture(scope="module", params=TEACHERS, ids=lambda make: make.__name__)
def case(request):
    return request.param(request)


@pytest.fixture(scope="module")
def scored(case):
    return case.teacher.score(case.contexts, case.responses, case.targets, case.k)


@pytest.fixture(scope="module")
def written(case):
    return write(case, seed=7)


def write(case, seed, contexts=None, **options):
    """Sampled hot or cold; what comes back is said to be at temperature 1 all the same."""
    contexts = case.contexts if contexts is None else contexts
    sampling = SamplingConfig(**({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": case.new_tokens} | options))
    return case.teacher.generate(contexts, sampling, case.k, [1000 * seed + row for row in range(len(contexts))])


def _assert_same(ours, theirs, tolerance):
    assert ours.support_size.tolist() == theirs.support_size.tolist()
    for name in ("logprobs", "tail_logprob", "token_logprob", "log_norm"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=0, err_msg=name)


def _rows(topk, k):
    return topk.ids.reshape(-1, k), topk.logprobs.reshape(-1, k)


def test_what_opens_is_a_scorer_and_a_generator(case):
    assert isinstance(case.teacher, Scorer)
    assert isinstance(case.teacher, Generator)


def test_every_answer_is_a_distribution_of_exactly_k_entries(case, scored, written):
    for topk in [*scored, *(topk for _, topk in written)]:
        assert topk_problem(topk, case.teacher.vocab_size) is None
        assert set(topk.support_size.tolist()) == {case.k}


def test_one_row_a_target(case, scored, written):
    assert [len(topk) for topk in scored] == [int(target.sum()) for target in case.targets]
    assert [len(topk) for _, topk in written] == [len(response) for response, _ in written]


def test_support_and_tail_hold_all_of_the_mass(scored, written):
    for topk in [*scored, *(topk for _, topk in written)]:
        mass = topk.sum_over_support(np.exp(topk.logprobs.astype(np.float64)))
        np.testing.assert_allclose(mass + np.exp(topk.tail_logprob.astype(np.float64)), 1, atol=1e-5)


def test_row_n_predicts_target_n(case, scored):
    """Scoring a response is stepping through it: the n-th row is the answer to everything before target n."""
    for context, response, target, topk in zip(case.contexts, case.responses, case.targets, scored, strict=True):
        for row, at in enumerate(np.flatnonzero(target)):
            prefix = ids_array([*context, *response[:at]])
            [step] = case.teacher.score([prefix], [response[at : at + 1]], [np.ones(1, bool)], case.k)
            logprobs = topk.logprobs.reshape(-1, case.k)[row]
            np.testing.assert_allclose(logprobs, step.logprobs, atol=case.tolerance, rtol=0)
            assert topk.token_logprob[row] == pytest.approx(step.token_logprob[0], abs=case.tolerance)


def test_the_support_is_the_top_of_the_dense_softmax(case, scored):
    for context, response, target, topk in zip(case.contexts, case.responses, case.targets, scored, strict=True):
        logits = case.dense(np.concatenate([context, response]))[len(context) - 1 :][np.flatnonzero(target)]
        logp = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
        ids, logprobs = _rows(topk, case.k)
        np.testing.assert_allclose(np.take_along_axis(logp, ids, 1), logprobs, atol=case.tolerance)
        tokens = logp[:, : case.teacher.vocab_size]
        np.testing.assert_allclose(-np.sort(-tokens)[:, : case.k], logprobs, atol=case.tolerance)
        np.testing.assert_allclose(
            logp[np.arange(len(logp)), response[target]], topk.token_logprob, atol=case.tolerance
        )


def test_token_logprob_is_the_entry_in_the_support_or_no_more_than_the_least(case, scored, written):
    pairs = [(r[t], topk) for r, t, topk in zip(case.responses, case.targets, scored, strict=True)]
    inside = outside = 0
    for tokens, topk in [*pairs, *written]:
        for token, ids, logprobs, own in zip(tokens, *_rows(topk, case.k), topk.token_logprob, strict=True):
            if token in ids:
                inside += 1
                assert own == pytest.approx(float(logprobs[ids == token][0]), abs=1e-6)
            else:
                outside += 1
                assert own <= logprobs[-1] + 1e-6
    assert inside
    assert outside or case.k >= 64  # random tokens fall outside; real ones hardly ever


def test_answers_depend_neither_on_the_batch_nor_on_the_order(case, scored):
    backwards = case.teacher.score(case.contexts[::-1], case.responses[::-1], case.targets[::-1], case.k)
    for i, topk in enumerate(scored):
        [alone] = case.teacher.score([case.contexts[i]], [case.responses[i]], [case.targets[i]], case.k)
        _assert_same(topk, alone, case.tolerance)
        _assert_same(topk, backwards[-1 - i], case.tolerance)


def test_generated_distributions_are_the_scored_ones_at_temperature_1(case, written):
    """Whatever temperature and top-p the tokens were sampled with."""
    responses = [response for response, _ in written]
    again = case.teacher.score(case.contexts, responses, [np.ones(len(r), bool) for r in responses], case.k)
    for (_, sampled), topk in zip(written, again, strict=True):
        _assert_same(sampled, topk, case.tolerance)


def test_a_seed_decides_what_is_written(case, written):
    again = write(case, seed=7)
    other = write(case, seed=8, temperature=1.5)
    third = write(case, seed=9, temperature=1.5)
    for (response, topk), (same, same_topk) in zip(written, again, strict=True):
        assert response.tolist() == same.tolist()
        _assert_same(topk, same_topk, 0)
    assert [r.tolist() for r, _ in other] != [r.tolist() for r, _ in third]


def test_a_response_ends_at_its_end_of_turn_or_is_as_long_as_asked_for(case, written):
    for response, _ in written:
        ends = np.flatnonzero(response == case.teacher.eos_token_id)
        assert len(response) == (ends[0] + 1 if len(ends) else case.new_tokens)


def test_a_response_is_made_of_tokens(case):
    """Ids that pad a model's output layer are never written: no cache could hold them."""
    many = [case.contexts[0]] * (24 if case.new_tokens >= 40 else 2)
    for response, _ in write(case, seed=0, contexts=many, temperature=3.0, top_p=1.0):
        assert response.min() >= 0
        assert response.max() < case.teacher.vocab_size


def test_temperature_0_is_greedy(case):
    for seed in (0, 1):
        for response, topk in write(case, seed, temperature=0):
            assert response.tolist() == topk.ids.reshape(-1, case.k)[:, 0].tolist()


def test_top_p_samples_from_the_nucleus_alone(case):
    for _, topk in write(case, seed=3, temperature=1, top_p=0.3):
        likelier = topk.logprobs.reshape(-1, case.k) > topk.token_logprob[:, None] + 1e-6
        ahead = (np.exp(topk.logprobs.reshape(-1, case.k)) * likelier).sum(1)
        assert ahead.max() < 0.3


def test_log_norm_is_the_dense_one(case, scored):
    for context, response, target, topk in zip(case.contexts, case.responses, case.targets, scored, strict=True):
        logits = case.dense(np.concatenate([context, response]))[len(context) - 1 :][np.flatnonzero(target)]
        logp = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
        dense = np.stack([np.logaddexp.reduce(logp / t, axis=1) for t in TEMPERATURES], 1)
        np.testing.assert_allclose(topk.log_norm, dense, atol=case.tolerance)


def test_at_another_temperature_the_support_holds_no_more_than_all(scored, written):
    for topk in [*scored, *(topk for _, topk in written)]:
        for column, temperature in enumerate(TEMPERATURES):
            norm = topk.log_norm[:, column][topk.row_of_entry()].astype(np.float64)
            mass = topk.sum_over_support(np.exp(topk.logprobs / temperature - norm))
            assert mass.max() <= 1 + 1e-5
