"""Divergences against numbers worked out by hand: T = (.75, .25), S = (.25, .75) and S = (.5, .5)."""

from math import inf, log

import pytest
import torch

from bakery.losses.divergences import (
    DIVERGENCES,
    divergence_between,
    forward_kl,
    jsd,
    mixed_kl,
    reverse_kl,
    scaled_jsd,
    skew_kl,
    tvd,
)


def logs(*p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


T, S, EVEN = logs(0.75, 0.25), logs(0.25, 0.75), logs(0.5, 0.5)


def test_forward_kl_by_hand():
    # .75 log(.75/.25) + .25 log(.25/.75) = .75 log 3 − .25 log 3 = .5 log 3
    assert forward_kl(T, S).item() == pytest.approx(0.5 * log(3))
    # .75 log 1.5 + .25 log .5 = .3041 − .1733
    assert forward_kl(T, EVEN).item() == pytest.approx(0.13081, abs=1e-5)


def test_reverse_kl_by_hand():
    # .5 log(.5/.75) + .5 log(.5/.25) = .5 log(4/3)
    assert reverse_kl(T, EVEN).item() == pytest.approx(0.5 * log(4 / 3))
    assert reverse_kl(T, EVEN).item() != pytest.approx(forward_kl(T, EVEN).item(), abs=1e-2)


def test_mixed_kl_by_hand():
    # .75 · .13081 + .25 · .14384
    assert mixed_kl(T, EVEN, 0.25).item() == pytest.approx(0.134068, abs=1e-5)


def test_mixed_kl_at_the_ends_is_each_kl_to_the_bit():
    logp, logq = torch.randn(64, 9).log_softmax(-1), torch.randn(64, 9).log_softmax(-1)
    assert torch.equal(mixed_kl(logp, logq, 0.0), forward_kl(logp, logq))
    assert torch.equal(mixed_kl(logp, logq, 1.0), reverse_kl(logp, logq))


def test_jsd_by_hand():
    # M = (.5, .5): ½ · .13081 + ½ · .13081
    assert jsd(T, S, 0.5).item() == pytest.approx(0.13081, abs=1e-5)
    # β = .75 weighs the teacher inside M: M = .75 · (.75, .25) + .25 · (.5, .5) = (.6875, .3125)
    #   KL(T‖M) = .75 log(.75/.6875) + .25 log(.25/.3125) =  .065258 − .055786 = .009473
    #   KL(S‖M) = .5  log(.5/.6875)  + .5  log(.5/.3125)  = −.159227 + .235002 = .075775
    #   .75 · .009473 + .25 · .075775 = .026048
    assert jsd(T, EVEN, 0.75).item() == pytest.approx(0.026048, abs=1e-5)


def test_mixed_kl_and_jsd_are_different_losses():
    sure, spread = logs(1 - 1e-6, 1e-6), logs(0.01, 0.99)
    assert jsd(sure, spread, 0.5).item() < log(2)
    assert mixed_kl(sure, spread, 0.5).item() > 8  # ≈ ½ · log 100 + ½ · .99 log(.99e6) = 2.3 + 6.8


def test_jsd_jumps_at_both_ends_and_scaled_jsd_does_not():
    assert jsd(T, S, 0.0).item() == forward_kl(T, S).item()
    assert jsd(T, S, 1.0).item() == reverse_kl(T, S).item()
    assert jsd(T, S, 1e-4).item() < 1e-4  # just inside, β KL(T‖S) ≈ 0 against .549 at the end
    assert jsd(T, S, 1 - 1e-4).item() < 1e-4
    for other in (S, EVEN):
        assert scaled_jsd(T, other, 1e-4).item() == pytest.approx(forward_kl(T, other).item(), abs=1e-3)
        assert scaled_jsd(T, other, 1 - 1e-4).item() == pytest.approx(reverse_kl(T, other).item(), abs=1e-3)
        assert scaled_jsd(T, other, 0.0).item() == forward_kl(T, other).item()
        assert scaled_jsd(T, other, 1.0).item() == reverse_kl(T, other).item()
    assert scaled_jsd(T, S, 0.5).item() == pytest.approx(4 * 0.13081, abs=1e-4)


def test_skew_kl_by_hand():
    # M = .5 T + .5 EVEN = (.625, .375): .75 log(.75/.625) + .25 log(.25/.375) = .136741 − .101366
    assert skew_kl(T, EVEN, 0.5).item() == pytest.approx(0.035375, abs=1e-5)
    assert skew_kl(T, EVEN, 0.0).item() == pytest.approx(forward_kl(T, EVEN).item())


def test_skew_kl_is_bounded_and_of_no_use_at_one():
    logp, logq = logs(1.0, 0.0), logs(0.0, 1.0)  # log 0 = −inf: apart entirely
    assert skew_kl(logp, logq, 0.1).item() == pytest.approx(log(10))  # −log α
    logq = EVEN.clone().requires_grad_()
    skew_kl(T, logq, 1.0).sum().backward()
    assert skew_kl(T, EVEN, 1.0).item() == 0
    assert logq.grad.tolist() == [[0, 0]]


def test_tvd_by_hand():
    assert tvd(T, S).item() == pytest.approx(0.5)  # ½ (|.75−.25| + |.25−.75|)
    assert tvd(logs(0.5, 0.3), logs(0.1, 0.2)).item() == pytest.approx(0.25)  # sub-distributions: ½ (.4 + .1)


def test_apart_entirely():
    logp, logq = logs(1.0, 0.0), logs(0.0, 1.0)
    assert forward_kl(logp, logq).item() == inf
    assert skew_kl(logp, logq, 0.0).item() == inf
    assert jsd(logp, logq, 0.5).item() == pytest.approx(log(2))
    assert tvd(logp, logq).item() == 1


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_an_absent_bucket_adds_nothing_to_value_or_gradient(name, weight):
    def value_and_gradient(logp, scores, absent):
        scores = scores.clone().requires_grad_()
        logq = scores.log_softmax(-1)
        if absent:
            logq = torch.cat([logq, torch.full_like(logq[:, :1], -inf)], -1)
        loss = divergence_between(logp, logq, name, weight, weight)
        return loss, torch.autograd.grad(loss.sum(), scores)[0]

    scores = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    loss, gradient = value_and_gradient(T, scores, absent=False)
    padded_loss, padded_gradient = value_and_gradient(torch.cat([T, logs(0.0)], -1), scores, absent=True)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_gradient_at_an_absent_bucket_is_zero(name, weight):
    logq = logs(0.5, 0.5, 0.0).requires_grad_()
    divergence_between(logs(0.75, 0.25, 0.0), logq, name, weight, weight).sum().backward()
    assert logq.grad.isfinite().all()
    assert logq.grad[0, 2] == 0


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "scaled_jsd", "skew_kl", "tvd"])
def test_a_bucket_without_teacher_mass_keeps_a_finite_gradient(name):
    scores = torch.tensor([[0.3, -1.2, 0.5]], dtype=torch.float64, requires_grad=True)
    loss = divergence_between(logs(0.75, 0.25, 0.0), scores.log_softmax(-1), name, 0.5, 0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 2] > 0  # descent lowers the logit that the teacher gives nothing


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    scores = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    logp = logs(0.6, 0.3, 0.1)
    assert torch.autograd.gradcheck(lambda x: divergence_between(logp, x.log_softmax(-1), name, 0.3, 0.2), scores)
