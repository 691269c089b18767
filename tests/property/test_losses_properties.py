"""What holds of every loss for any distributions, in float64."""

from math import inf

import pytest
import torch
from dense_losses import SUPPORTS
from hypothesis import given, settings
from hypothesis import strategies as st

from bakery.losses import DIVERGENCES, sparse_loss
from bakery.losses.divergences import divergence_between

few = settings(max_examples=25, deadline=None, database=None)
weights = st.floats(0.01, 0.99)
scores = st.floats(-12, 12)


@st.composite
def pairs(draw, least=2, most=7):
    """Two rows of scores over one vocabulary."""
    v = draw(st.integers(least, most))
    rows = st.lists(scores, min_size=v, max_size=v)
    return torch.tensor([draw(rows)], dtype=torch.float64), torch.tensor([draw(rows)], dtype=torch.float64)


def sparse(teacher_NV, k):
    """What a cache holds of a dense teacher: (ids, logprobs, exact tail)."""
    logprobs_NK, ids_NK = teacher_NV.log_softmax(-1).topk(k)
    return ids_NK, logprobs_NK, teacher_NV.log_softmax(-1).scatter(-1, ids_NK, -inf).logsumexp(-1)


def value_and_gradient(logits, ids, logprobs, **given):
    logits = logits.clone().requires_grad_()
    loss = sparse_loss(logits, ids, logprobs, **given)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(pair=pairs(), weight=weights, data=st.data())
def test_merging_buckets_never_raises_a_divergence(name, pair, weight, data):
    logp, logq = (x.log_softmax(-1) for x in pair)
    v = logp.shape[-1]
    bucket = torch.tensor(data.draw(st.lists(st.integers(0, v - 1), min_size=v, max_size=v)))
    merged = [torch.zeros_like(x).index_add(-1, bucket, x.exp()).log() for x in (logp, logq)]
    fine, coarse = (
        divergence_between(logp, logq, name, weight, weight),
        divergence_between(*merged, name, weight, weight),
    )
    assert coarse.item() <= fine.item() + 1e-9


@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(pair=pairs(), weight=weights, data=st.data())
def test_the_tail_bucket_is_a_lower_bound_that_rises_with_k(name, pair, weight, data):
    teacher, student = pair
    v = teacher.shape[-1]
    k = data.draw(st.integers(1, v - 1))
    low, high, full = (
        sparse_loss(student, ids, logprobs, tail_logprob_N=tail, divergence=name, beta=weight, alpha=weight).item()
        for ids, logprobs, tail in (sparse(teacher, size) for size in (k, k + 1, v))
    )
    assert -1e-9 <= low <= high + 1e-9
    assert high <= full + 1e-9


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(pair=pairs(), weight=weights, temperature=st.sampled_from([1.0, 0.7, 2.0]), data=st.data())
def test_equal_distributions_are_at_zero(support, name, pair, weight, temperature, data):
    teacher, _ = pair
    v = teacher.shape[-1]
    # residual_to_label moves the tail, so that below K = V its teacher is another distribution
    k = v if support == "residual_to_label" else data.draw(st.integers(1, v))
    ids, logprobs, tail = sparse(teacher, k)
    norm = (teacher.log_softmax(-1) / temperature).logsumexp(-1)
    loss, gradient = value_and_gradient(
        teacher + 3, ids, logprobs, labels_N=ids[:, 0], tail_logprob_N=tail, log_norm_N=norm,
        support=support, divergence=name, beta=weight, alpha=weight, temperature=temperature,
    )  # fmt: skip
    # At T ≠ 1 the tail is 1 − Σ, whose last digits reverse KLs magnify: q(rest) · log of a wrong tail.
    assert loss.item() == pytest.approx(0, abs=1e-9)
    # truncated pulls up what it sees: only there is zero loss at equality no resting point, and only for the KLs
    if support != "truncated" or name in ("jsd", "scaled_jsd", "tvd"):
        assert name == "tvd" or gradient.abs().max().item() < 1e-5


@pytest.mark.parametrize("support", ["renormalized", "tail_bucket"])
@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(pair=pairs(), weight=weights, data=st.data())
def test_no_divergence_of_distributions_is_negative(support, name, pair, weight, data):
    teacher, student = pair
    ids, logprobs, tail = sparse(teacher, data.draw(st.integers(1, teacher.shape[-1])))
    given_ = {"support": support, "divergence": name, "beta": weight, "alpha": weight}
    assert sparse_loss(student, ids, logprobs, tail_logprob_N=tail, **given_).item() >= -1e-9


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", DIVERGENCES)
@few
@given(pair=pairs(), weight=weights, data=st.data())
def test_neither_padding_nor_order_changes_value_or_gradient(support, name, pair, weight, data):
    teacher, student = pair
    v = teacher.shape[-1]
    k = data.draw(st.integers(1, v))
    ids, logprobs, tail = sparse(teacher, k)
    given_ = {
        "labels_N": torch.tensor([data.draw(st.integers(0, v - 1))]),
        "tail_logprob_N": tail,
        "support": support, "divergence": name, "beta": weight, "alpha": weight,
    }  # fmt: skip
    want, want_gradient = value_and_gradient(student, ids, logprobs, **given_)

    pads = data.draw(st.lists(st.integers(-1, v + 3), min_size=1, max_size=4))
    order = torch.tensor([*data.draw(st.permutations(range(k))), *range(k, k + len(pads))])
    rest = torch.tensor(data.draw(st.permutations(range(1, k + len(pads)))), dtype=torch.long)
    order = order[torch.cat([torch.zeros(1, dtype=torch.long), rest])]  # padding anywhere but first
    padded_ids = torch.cat([ids, torch.tensor([pads])], -1)[:, order]
    padded_logprobs = torch.cat([logprobs, torch.full((1, len(pads)), -inf, dtype=torch.float64)], -1)[:, order]
    loss, gradient = value_and_gradient(student, padded_ids, padded_logprobs, **given_)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    if name != "tvd":  # whose gradient turns over where p = q, and there the last digit decides
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-9, atol=1e-12)
