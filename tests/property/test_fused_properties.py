"""The fused loss against the plain one, for any sizes, heads, supports and losses, in float64."""

from math import inf

import pytest
import torch
from dense_losses import SUPPORTS, rowwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from bakery.losses import DIVERGENCES, fused, heads, sparse_loss
from bakery.losses.fused import fused_loss
from bakery.losses.heads import LMHead

few = settings(max_examples=12, deadline=None, database=None)


@st.composite
def problems(draw):
    """Hidden states and a head; a dense teacher and what a cache holds of it, rows of uneven length."""
    n, v, h = draw(st.integers(1, 7)), draw(st.integers(2, 9)), draw(st.integers(1, 4))
    make = {"generator": torch.Generator().manual_seed(draw(st.integers(0, 2**31))), "dtype": torch.float64}
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))
    hidden, weight = spread * torch.randn(n, h, **make), torch.randn(v, h, **make)
    bias = torch.randn(v, **make) if draw(st.booleans()) else None
    scale, softcap = draw(st.sampled_from([1.0, 0.25, 3.0])), draw(st.sampled_from([None, 1.5, 20.0]))
    teacher_NV = (2 * torch.randn(n, v, **make)).log_softmax(-1)
    k = draw(st.integers(1, v))
    logprobs_NK, ids_NK = teacher_NV.topk(k)
    sizes_N = torch.tensor(draw(st.lists(st.integers(1, k), min_size=n, max_size=n)))
    logprobs_NK[torch.arange(k) >= sizes_N[:, None]] = -inf
    outside_NV = torch.ones(n, v, dtype=torch.bool)
    for row, size in enumerate(sizes_N):
        outside_NV[row, ids_NK[row, :size]] = False
    tail_N = teacher_NV.masked_fill(~outside_NV, -inf).logsumexp(-1)
    labels_N = torch.randint(v, (n,), generator=make["generator"])
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    cached = {"topk_ids_NK": ids_NK, "topk_logprobs_NK": logprobs_NK, "tail_logprob_N": tail_N, "labels_N": labels_N}
    return leaves, LMHead(weight, bias, scale, softcap), teacher_NV, sizes_N, cached


def logits_of(hidden_NH, head):
    x = head.scale * (hidden_NH @ head.weight_VH.T + (0 if head.bias_V is None else head.bias_V))
    return head.softcap * (x / head.softcap).tanh() if head.softcap else x


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@few
@given(
    problem=problems(),
    chunk=st.integers(1, 7),
    floats=st.integers(1, 30),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    cross_entropy_weight=st.sampled_from([0.0, 0.5]),
    weight=st.floats(0.01, 0.99),
)
def test_the_fused_loss_is_the_plain_one(
    support, divergence, problem, chunk, floats, temperature, cross_entropy_weight, weight
):
    leaves, head, teacher_NV, _, cached = problem
    cached["log_norm_N"] = (teacher_NV / temperature).logsumexp(-1)
    given_ = {"support": support, "divergence": divergence, "beta": weight, "alpha": weight, "temperature": temperature}
    logits = logits_of(leaves[0], head)
    plain_N = sparse_loss(logits, **cached, **given_)
    plain_N = plain_N + cross_entropy_weight * cross_entropy(logits, cached["labels_N"], reduction="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "TARGETS_PER_CHUNK", chunk)
        patch.setattr(heads, "FLOATS_IN_CACHE", floats)
        total, loss_N = fused_loss(leaves[0], head, **cached, **given_, cross_entropy_weight=cross_entropy_weight)
    torch.testing.assert_close(loss_N, plain_N, rtol=1e-9, atol=1e-11)
    gradients = (torch.autograd.grad(x, leaves) for x in (total, plain_N.sum()))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@few
@given(problem=problems(), weight=st.floats(0.01, 0.99))
def test_the_fused_loss_is_the_dense_formula(support, divergence, problem, weight):
    """Each row alone, in plain probabilities: no log-sum-exp anywhere."""
    leaves, head, teacher_NV, sizes_N, cached = problem
    given_ = {"support": support, "divergence": divergence, "beta": weight, "alpha": weight}
    p_NV, q_NV = teacher_NV.exp(), logits_of(leaves[0], head).softmax(-1)
    ids, labels = ([row[None] for row in cached[name]] for name in ("topk_ids_NK", "labels_N"))
    want_N = [
        rowwise(support, divergence, p[None], q[None], row[:, :size], label, weight, weight)
        for p, q, row, size, label in zip(p_NV, q_NV, ids, sizes_N, labels, strict=True)
    ]
    _, loss_N = fused_loss(leaves[0], head, **cached, **given_)
    torch.testing.assert_close(loss_N, torch.cat(want_N), rtol=1e-8, atol=1e-10)
