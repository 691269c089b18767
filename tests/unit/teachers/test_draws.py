"""Draws: the right distribution, to the last tail; equal for equal rows; and what is kept of them."""

from math import log, sqrt

import numpy as np
import pytest
import torch

from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import ids_array, topk_problem
from bakery.teachers.distributions import BLOCK, draw
from bakery.teachers.draws import Streams, drawn_by, sample_of
from bakery.teachers.opening import open_teacher

ALMOST_ONE = 1 - 2**-53


def test_a_sample_is_counted_most_frequent_first_and_by_id_among_equals():
    topk = sample_of(np.array([[7, 2, 7, 5], [3, 3, 3, 3], [9, 1, 4, 0]]), [-1.0, -2.0, -3.0], [-0.5, -0.1, -9.0])
    assert topk.support_size.tolist() == [3, 1, 4]
    assert topk.ids.tolist() == [7, 2, 5, 3, 0, 1, 4, 9]
    assert topk.logprobs == pytest.approx([log(0.5), log(0.25), log(0.25), 0, *[log(0.25)] * 4])
    assert (topk.tail_logprob.tolist(), topk.token_logprob.tolist()) == ([-1, -2, -3], pytest.approx([-0.5, -0.1, -9]))
    assert topk_problem(topk, 10, 4) is None
    assert topk_problem(topk, 10, 8) is None  # 4, 2, 2 of 8 could be counts, too
    assert topk_problem(topk, 10, 3) == (0, "a log-prob that is of no count of 3 draws")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("logprobs", [log(0.5), log(0.5), log(0.25)], "counts that do not add up to 4 draws"),
        ("logprobs", [log(0.6), log(0.2), log(0.2)], "a log-prob that is of no count of 4 draws"),
        ("logprobs", [log(0.5), log(0.25), -40.0], "a log-prob that is of no count of 4 draws"),
        ("tail_logprob", [-np.inf], "a mean log-prob of draws that is not finite"),
    ],
)
def test_what_is_no_sample_is_found(field, value, problem):
    topk = sample_of(np.array([[7, 2, 7, 5]]), [-1.0], [-0.5])
    getattr(topk, field)[:] = value
    assert topk_problem(topk, 10, 4) == (0, problem)


@pytest.mark.parametrize("draws", [1, 50, 4096])
def test_every_count_survives_the_log_in_float32(draws):
    counts = np.arange(1, draws + 1)
    shares = np.log(counts / draws).astype(np.float32)
    assert np.round(np.exp(shares.astype(np.float64)) * draws).tolist() == counts.tolist()


# -- the inverse of the cumulated distribution -------------------------------------------------------------------------


def test_drawn_by_hand():
    logp = np.log([[0.5, 0.25, 1e-300, 0.25]])
    uniform = np.array([[0.0, 0.4999, 0.5, 0.7499, 0.7501, ALMOST_ONE]])
    assert drawn_by(uniform, logp).tolist() == [[0, 0, 1, 1, 3, 3]]


def test_a_block_then_a_token_in_it_by_hand():
    """Tokens of the first, second and third block, and behind the vocabulary one that is likelier than all of them."""
    logits = torch.full((1, 2 * BLOCK + 20), -torch.inf)
    likely = {3: 0.1, BLOCK: 0.2, 2 * BLOCK - 1: 0.2, 2 * BLOCK: 0.25, 2 * BLOCK + 9: 0.25}
    for token, p in likely.items():
        logits[0, token] = log(p)
    logits[0, 2 * BLOCK + 10] = 3.0
    uniform = np.array(
        [[[0.0, 0.099, 0.101, 0.499, 0.501, ALMOST_ONE], [0.9, ALMOST_ONE, 0.49, 0.51, 0.0, ALMOST_ONE]]]
    )
    sample = draw(logits, torch.tensor([BLOCK]), uniform, 2 * BLOCK + 10)
    drawn = [3, 3, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 9]
    assert sample.draws_ND.tolist() == [drawn]
    assert float(sample.token_N) == pytest.approx(log(0.2) - log(1 + np.exp(3.0)), abs=1e-6)
    assert float(sample.mean_N) == pytest.approx(np.mean([log(likely[token]) for token in drawn]), abs=1e-6)


def test_a_tail_of_a_million_small_tokens_has_its_share():
    """.999 on one token, and 1e-3 over 262,143 of 4e-9 each, which a float32 sum would lose: five standard errors."""
    tokens, targets, draws = 262_144, 8, 4096
    logits = torch.full((targets, tokens), log(1e-3 / (tokens - 1)))
    logits[:, 77] = log(0.999)
    uniform = np.random.default_rng(0).random((targets, 2, draws))
    drawn = draw(logits, torch.zeros(targets, dtype=torch.long), uniform, tokens).draws_ND.numpy()
    outside = drawn[drawn != 77]
    many = targets * draws
    assert abs(len(outside) / many - 1e-3) < 5 * sqrt(1e-3 / many)
    assert abs(outside.mean() / tokens - 0.5) < 5 * sqrt(1 / 12 / len(outside))


def test_shares_are_the_probabilities_within_five_standard_errors():
    logits = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(3))
    p, many = logits[0].double().softmax(-1).numpy(), 400_000
    uniform = np.random.default_rng(1).random((1, 2, many))
    for drawn in (
        draw(logits, torch.tensor([0]), uniform, 300).draws_ND[0],
        drawn_by(uniform[:, 0], np.log(p)[None])[0],
    ):
        shares = np.bincount(drawn, minlength=300) / many
        assert (np.abs(shares - p) < 5 * np.sqrt(p / many)).all()


# -- teachers ----------------------------------------------------------------------------------------------------------

DRAWS = 64
RNG = np.random.default_rng(5)
CONTEXTS, RESPONSES = ([ids_array(RNG.integers(0, 256, n)) for n in sizes] for sizes in ((3, 17, 9, 3), (7, 4, 12, 7)))
TARGETS = [RNG.random(len(r)) < 0.7 for r in RESPONSES]
for mask in TARGETS:
    mask[-1] = True


@pytest.fixture(params=["fake", "hf"])
def teacher(request, tiny_model):
    return make(request.param, tiny_model)


def make(backend, path, draws=DRAWS):
    config = TeacherConfig(
        backend=backend,
        model_name_or_path=str(path),
        support="sampled",
        draws=draws,
        dtype="float32",
        device="cpu",
        tokens_per_batch=48,
    )
    return open_teacher(config, load_tokenizer(str(path))).open()


def moved(a, b):
    """The share of draws that are others."""
    counts = np.zeros((2, len(a), 512))
    for number, topk in enumerate((a, b)):
        counts[number, topk.row_of_entry(), topk.ids] = np.exp(topk.logprobs)
    return np.abs(counts[0] - counts[1]).sum() / 2 / len(a)


def test_every_answer_is_a_sample(teacher):
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=9)
    written = teacher.generate(CONTEXTS, sampling, DRAWS, [1, 2, 3, 4])
    scored = teacher.score(CONTEXTS, RESPONSES, TARGETS, DRAWS)
    for topk in [*scored, *(topk for _, topk in written)]:
        assert topk_problem(topk, teacher.vocab_size, DRAWS) is None
    assert [len(topk) for topk in scored] == [mask.sum() for mask in TARGETS]
    assert [len(topk) for _, topk in written] == [len(response) for response, _ in written]


def test_draws_depend_on_the_row_alone(teacher):
    """Logits move by rounding with the shape of a batch, so that a draw at the edge of two tokens may move, too."""
    together = teacher.score(CONTEXTS, RESPONSES, TARGETS, DRAWS)
    backwards = teacher.score(CONTEXTS[::-1], RESPONSES[::-1], TARGETS[::-1], DRAWS)[::-1]
    for i, topk in enumerate(together):
        [alone] = teacher.score([CONTEXTS[i]], [RESPONSES[i]], [TARGETS[i]], DRAWS)
        assert max(moved(topk, alone), moved(topk, backwards[i])) <= (1e-3 if teacher.info.backend == "hf" else 0)
    [again] = teacher.score(CONTEXTS[:1], RESPONSES[:1], TARGETS[:1], DRAWS)
    [once_more] = teacher.score(CONTEXTS[:1], RESPONSES[:1], TARGETS[:1], DRAWS)
    assert moved(again, once_more) == 0
    other = ids_array([*RESPONSES[0][:-1], RESPONSES[0][-1] + 1])
    [another] = teacher.score(CONTEXTS[:1], [other], TARGETS[:1], DRAWS)
    assert moved(again, another) > 0.05  # of another response, though the distributions are the same


def test_what_is_written_has_draws_by_its_seed(teacher):
    sampling = SamplingConfig(temperature=0, max_new_tokens=9)
    (response, first), (_, second) = teacher.generate([CONTEXTS[0]] * 2, sampling, DRAWS, [1, 2])
    [(_, again)] = teacher.generate([CONTEXTS[0]], sampling, DRAWS, [1])
    assert moved(first, again) <= 1e-3
    assert moved(first, second) > 0.05
    [scored] = teacher.score([CONTEXTS[0]], [response], [np.ones(len(response), bool)], DRAWS)
    np.testing.assert_allclose(scored.token_logprob, first.token_logprob, atol=2e-4)


@pytest.mark.parametrize("backend", ["fake", "hf"])
def test_a_teachers_shares_are_its_probabilities_within_five_standard_errors(backend, tiny_model):
    many = 4096
    [topk] = make(backend, tiny_model, many).score(CONTEXTS[2:3], RESPONSES[2:3], TARGETS[2:3], many)
    config = TeacherConfig(backend=backend, model_name_or_path=str(tiny_model), dtype="float32", device="cpu")
    whole = open_teacher(config, load_tokenizer(str(tiny_model))).open()
    [dense] = whole.score(CONTEXTS[2:3], RESPONSES[2:3], TARGETS[2:3], whole.vocab_size)
    p, shares = np.zeros((2, len(topk), whole.vocab_size))
    p[dense.row_of_entry(), dense.ids] = np.exp(dense.logprobs)
    shares[topk.row_of_entry(), topk.ids] = np.exp(topk.logprobs)
    p /= p.sum(1, keepdims=True)  # ids that pad the output are never drawn, and this model likes them
    assert (np.abs(shares - p) < 5 * np.sqrt(p / many) + 5 / many).all()
    mean, spread = (p * np.log(p)).sum(1), np.sqrt((p * np.log(p) ** 2).sum(1) - (p * np.log(p)).sum(1) ** 2)
    assert (np.abs(topk.tail_logprob - mean) < 5 * spread / sqrt(many)).all()
    np.testing.assert_allclose(topk.token_logprob, dense.token_logprob, atol=1e-5)


def test_streams_are_the_same_in_any_order_and_in_pieces():
    whole = Streams(CONTEXTS, RESPONSES, 5).next([0, 0, 0, 2, 2])
    pieces = Streams(CONTEXTS, RESPONSES, 5)
    assert np.array_equal(pieces.next([2]), whole[3:4])
    assert np.array_equal(pieces.next([0, 2, 0]), whole[[0, 4, 1]])
    assert np.array_equal(pieces.next([0]), whole[2:3])
    assert len({float(u) for u in Streams(CONTEXTS, RESPONSES, 5).next(range(4)).ravel()}) == 40
