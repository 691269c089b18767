"""The support `sampled`: averaged over all draws that can be, value and gradient are those of the dense forward KL."""

from itertools import product
from math import inf, log

import pytest
import torch
from test_losses_fused import HEADS, Case

from bakery.errors import RecipeError
from bakery.losses import check_loss_options, sparse_loss
from bakery.losses.fused import fused_loss
from bakery.teachers.draws import sample_of

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LOGITS = torch.tensor([[0.1, -0.7, 1.3]], dtype=torch.float64)


def loss_and_gradient(draws, mean=True):
    """Of one target with those draws, as a sample is stored."""
    logits = LOGITS.clone().requires_grad_()
    topk = sample_of(torch.tensor([draws]).numpy(), [P.log()[list(draws)].mean()], [0.0])
    ids, shares = torch.from_numpy(topk.ids)[None].long(), torch.from_numpy(topk.logprobs)[None].double()
    tail = P.log()[list(draws)].mean()[None] if mean else None
    loss = sparse_loss(logits, ids, shares, tail_logprob_N=tail, support="sampled")
    return loss.item(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_over_all_draws_that_can_be_it_is_the_dense_forward_kl(draws):
    """Every outcome, weighted by its probability: nothing here is left to chance."""
    value, gradient = 0.0, torch.zeros(1, 3, dtype=torch.float64)
    for outcome in product(range(3), repeat=draws):
        loss, grad = loss_and_gradient(outcome)
        value, gradient = value + P[list(outcome)].prod() * loss, gradient + P[list(outcome)].prod() * grad
    q = LOGITS.softmax(-1)
    assert float(value) == pytest.approx(float((P * (P / q).log()).sum()), abs=1e-7)  # shares are float32
    torch.testing.assert_close(gradient, q - P, atol=1e-7, rtol=0)


def test_one_sample_by_hand():
    """Draws 0, 0, 2 at q = (.2, .3, .5): ⅔ (log .5 − log .2) + ⅓ (log .2 − log .5), gradient q − (⅔, 0, ⅓)."""
    logits = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log().requires_grad_()
    shares, mean = torch.tensor([[2 / 3, 1 / 3]]).double().log(), torch.tensor([2 / 3 * log(0.5) + 1 / 3 * log(0.2)])
    given = {"tail_logprob_N": mean.double(), "support": "sampled"}
    loss = sparse_loss(logits, torch.tensor([[0, 2]]), shares, **given)
    assert loss.item() == pytest.approx(2 / 3 * log(2.5) + 1 / 3 * log(0.4), abs=1e-7)
    want = [0.2 - 2 / 3, 0.3, 0.5 - 1 / 3]
    assert torch.autograd.grad(loss.sum(), logits)[0][0].tolist() == pytest.approx(want)
    padded = sparse_loss(logits, torch.tensor([[0, 2, 0, 1]]), torch.cat([shares, shares * 0 - inf], 1), **given)
    assert padded.item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.autograd.grad(padded.sum(), logits)[0][0].tolist() == pytest.approx(want)


def test_without_the_draws_mean_it_is_the_kl_from_their_shares():
    assert loss_and_gradient((0, 0, 2), mean=False)[0] == pytest.approx(
        2 / 3 * (log(2 / 3) - LOGITS.log_softmax(-1)[0, 0].item())
        + 1 / 3 * (log(1 / 3) - LOGITS.log_softmax(-1)[0, 2].item())
    )


def test_the_whole_vocabulary_drawn_is_a_sample_like_any_other():
    loss, gradient = loss_and_gradient((0, 1, 2))
    assert loss == pytest.approx(float((P.log() - LOGITS.log_softmax(-1)[0]).mean()))
    torch.testing.assert_close(gradient, LOGITS.softmax(-1) - 1 / 3, atol=1e-7, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_the_fused_loss_is_the_plain_one(head, weight):
    case = Case(**HEADS[head])
    draws = torch.multinomial(case.teacher.exp(), 6, replacement=True, generator=torch.Generator().manual_seed(0))
    topk = sample_of(draws.numpy(), case.teacher.gather(1, draws).mean(1), case.teacher[:, 0])
    real = torch.arange(6) < torch.from_numpy(topk.support_size)[:, None]
    assert len(set(topk.support_size.tolist())) > 1  # so that there is padding
    ids = torch.zeros(real.shape, dtype=torch.long).masked_scatter(real, torch.from_numpy(topk.ids).long())
    shares = torch.full(real.shape, -inf).masked_scatter(real, torch.from_numpy(topk.logprobs))
    given = {"tail_logprob_N": torch.from_numpy(topk.tail_logprob), "support": "sampled"}
    plain = sparse_loss(case.logits(), ids, shares, **given)
    plain = plain + weight * torch.nn.functional.cross_entropy(case.logits(), case.labels, reduction="none")
    total, fused = fused_loss(case.hidden, case.head, ids, shares, case.labels, cross_entropy_weight=weight, **given)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(case.gradients(total), case.gradients(plain.sum()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "says"), [({"divergence": "jsd"}, "got jsd at 1.0"), ({"temperature": 2.0}, "got forward_kl at 2.0")]
)
def test_what_draws_are_no_unbiased_estimate_of_is_refused(change, says):
    given = {"divergence": "forward_kl", "beta": 0.5, "alpha": 0.1, "temperature": 1.0}
    check_loss_options("sampled", **given)
    with pytest.raises(RecipeError, match=f"sampled takes draws at temperature 1, .* {says}; choose forward_kl at 1"):
        check_loss_options("sampled", **given | change)
