"""sparse_loss against dense formulas written again in plain probabilities, and the defects that never come back."""

from math import exp, inf, log, sqrt

import pytest
import torch
from dense_losses import SUPPORTS, dense, rowwise

from bakery.errors import RecipeError
from bakery.losses import DIVERGENCES, check_loss_options, sparse_loss
from bakery.losses.supports import teacher_at

BETA, ALPHA = 0.3, 0.2


def teacher_and_student(n=6, v=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, n, v, generator=generator, dtype=torch.float64) * 2
    return teacher.log_softmax(-1), student.requires_grad_()


def gradient(loss_N, logits):
    return torch.autograd.grad(loss_N.sum(), logits)[0]


def options(**kw):
    return {"beta": BETA, "alpha": ALPHA} | kw


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_at_k_equal_to_v_every_support_is_the_dense_loss(support, divergence, temperature):
    teacher, logits = teacher_and_student()
    logprobs, ids = teacher.topk(7)
    given = options(support=support, divergence=divergence, temperature=temperature)
    loss = sparse_loss(logits, ids, logprobs, torch.arange(6), **given)
    want = dense(divergence, (teacher / temperature).softmax(-1), (logits / temperature).softmax(-1), BETA, ALPHA)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss, logits), gradient(want, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_at_k_below_v_every_support_is_its_definition(support, divergence, temperature):
    teacher, logits = teacher_and_student()
    logprobs, ids = teacher.topk(3)
    labels = torch.tensor([*ids[:3, 1].tolist(), 0, 1, 2])  # three in the support for certain
    tail = teacher.scatter(-1, ids, -inf).logsumexp(-1)
    norm = (teacher / temperature).logsumexp(-1)
    given = options(support=support, divergence=divergence, temperature=temperature)

    def loss_of(logits):
        return sparse_loss(logits, ids, logprobs, labels, tail_logprob_N=tail, log_norm_N=norm, **given)

    p, q = (teacher / temperature).softmax(-1), (logits / temperature).softmax(-1)
    want = rowwise(support, divergence, p, q, ids, labels, BETA, ALPHA)
    torch.testing.assert_close(loss_of(logits), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss_of(logits), logits), gradient(want, logits), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(loss_of, logits)


def test_the_default_is_the_forward_kl_of_tail_buckets_by_hand():
    # p = (.5, .3 | .2), q = (.3, .1 | .6): .5 log(5/3) + .3 log 3 + .2 log(1/3) = .25541 + .32958 − .21972
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    loss = sparse_loss(logits, torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]).log())
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(0.36527, abs=1e-5)


def test_the_forward_gradient_of_a_tail_bucket_by_hand():
    # ∂/∂ logit_v = q_v − p_v in the support; outside, q_v − p(rest) q_v / q(rest) = q_v (1 − .2/.6)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().requires_grad_()
    sparse_loss(logits, torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]).log()).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.1 - 0.3, 0.2 * 2 / 3, 0.3 - 0.5, 0.4 * 2 / 3], abs=1e-6)


def test_defect_2_mass_outside_k_is_seen():
    # The teacher holds .715 in K, split 70 : 30; the student .00071 there, split alike.
    p = torch.tensor([0.5005, 0.2145, 0.285, 0.0], dtype=torch.float64)
    outside = 0.99929  # of which the student gives .53 % to the token that has all of the teacher's tail
    q = torch.tensor([0.000497, 0.000213, outside * 0.0053, outside * 0.9947], dtype=torch.float64)
    ids, logits = torch.tensor([[0, 1]]), q.log()[None].requires_grad_()

    blind = sparse_loss(logits, ids, p[None, :2].log(), support="renormalized")
    assert blind.item() == pytest.approx(0, abs=1e-12)
    assert gradient(blind, logits).abs().max() < 1e-12

    # .715 log(.715 / .00071) + .285 log(.285 / .99929) = 4.94408 − .35757 = 4.5865
    seen = sparse_loss(logits, ids, p[None, :2].log(), tail_logprob_N=p[2:3].log(), support="tail_bucket")
    assert seen.item() == pytest.approx(4.5865, abs=1e-4)
    assert gradient(seen, logits)[0, :2].sum().item() == pytest.approx(0.00071 - 0.715, abs=1e-6)  # q(K) − p(K)

    # + .285 log(1 / .0053) = 1.4934 within the tail
    full = sparse_loss(logits, torch.arange(4)[None], p[None].log())
    assert full.item() == pytest.approx(6.0799, abs=1e-4)


def test_defect_3_temperature_on_both_sides():
    # At T = 2 the teacher (.75, .25) is (√3, 1) / (1 + √3) = (.634, .366): the same student is then at zero …
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    ids = torch.tensor([[0, 1]])
    same = teacher.clone().requires_grad_()
    for support in SUPPORTS:
        loss = sparse_loss(same, ids, teacher, torch.tensor([0]), support=support, temperature=2.0)
        assert loss.item() == pytest.approx(0, abs=1e-15)
        assert gradient(loss, same).abs().max() < 1e-15
    # … where the student alone at T = 2 would give .75 log(.75/.634) + .25 log(.25/.366) = .0307.
    p = sqrt(3) / (1 + sqrt(3))
    assert 0.75 * log(0.75 / p) + 0.25 * log(0.25 / (1 - p)) == pytest.approx(0.0307, abs=1e-4)
    # Against an even student: p log 2p + (1−p) log 2(1−p), and a gradient of (q − p) / T, without a T² factor.
    even = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = sparse_loss(even, ids, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(p * log(2 * p) + (1 - p) * log(2 - 2 * p))
    assert gradient(loss, even)[0].tolist() == pytest.approx([(0.5 - p) / 2, (p - 0.5) / 2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_ragged_rows_are_their_own_loss(support, divergence):
    """Rows of 1, 3 and V entries in one batch: each as if it were alone."""
    teacher, logits = teacher_and_student(n=3, v=5)
    logprobs, ids = teacher.topk(5)
    tail = torch.stack([logprobs[n, size:].logsumexp(-1) for n, size in enumerate((1, 3, 5))])
    padded = logprobs.clone()
    padded[0, 1:] = padded[1, 3:] = -inf
    labels = torch.tensor([4, 0, 2])
    given = options(support=support, divergence=divergence)
    together = sparse_loss(logits, ids, padded, labels, tail_logprob_N=tail, **given)
    alone = torch.cat(
        [
            sparse_loss(
                logits[n : n + 1], ids[n : n + 1, :size], logprobs[n : n + 1, :size], labels[n : n + 1], **given
            )
            for n, size in enumerate((1, 3, 5))
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(together, logits), gradient(alone, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_sure_teacher_and_a_sure_student_stay_finite(support, divergence):
    """float32, an empty teacher tail, and logits far apart: the student agrees in row 0 and disagrees in row 1."""
    logits = torch.tensor([[80.0, -40, -60], [-40.0, 80, -60]], requires_grad=True)
    ids, logprobs = torch.tensor([[0], [0]]), torch.zeros(2, 1)
    given = options(support=support, divergence=divergence, tail_logprob_N=torch.full((2,), -inf))
    loss = sparse_loss(logits, ids, logprobs, torch.tensor([0, 1]), **given)
    assert loss.isfinite().all()
    assert gradient(loss, logits).isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_student_masked_outside_a_complete_teacher_is_at_zero(support, divergence):
    """Padded vocabularies: the teacher's three tokens are all there are; the student's other rows are at −inf."""
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]]).log().requires_grad_()
    given = options(support=support, divergence=divergence, tail_logprob_N=torch.tensor([-inf]))
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    loss = sparse_loss(logits, torch.tensor([[0, 1, 2]]), logprobs, torch.tensor([1]), **given)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient(loss, logits).isfinite().all()


def test_reverse_kl_against_an_empty_tail_costs_the_floor():
    # q = (.9, .1), p = (1, e^−100): .9 log .9 + .1 (log .1 + 100) = 9.6749
    logits = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    tail = torch.tensor([-inf])
    loss = sparse_loss(logits, torch.tensor([[0]]), torch.zeros(1, 1), tail_logprob_N=tail, divergence="reverse_kl")
    assert loss.item() == pytest.approx(9.6749, abs=1e-4)


def test_a_truncated_kl_is_lowest_where_the_student_is_wrong():
    """p = (.5, .3 | .2) without its .2: forward at q = p / .8, reverse at q = p / e; both stationary, below zero."""
    ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]], dtype=torch.float64).log()
    for divergence, scale, lowest in (
        ("forward_kl", 1 / 0.8, 0.8 * log(0.8)),
        ("reverse_kl", 1 / exp(1), -0.8 / exp(1)),
    ):
        logits = torch.tensor([[0.5 * scale, 0.3 * scale, 1 - 0.8 * scale]], dtype=torch.float64).log().requires_grad_()
        loss = sparse_loss(logits, ids, logprobs, support="truncated", divergence=divergence)
        assert loss.item() == pytest.approx(lowest)
        assert gradient(loss, logits).abs().max() < 1e-12


def test_a_rounded_teacher_does_not_stop_the_student_at_a_wrong_place():
    """A support that sums to 1.01 after rounding: the gradient is zero where q ∝ p."""
    p = torch.tensor([[0.75, 0.26]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    loss = sparse_loss(logits, torch.tensor([[0, 1]]), p.log())
    assert gradient(loss, logits).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_and_the_gradient_has_the_logits_dtype(dtype):
    logits = torch.tensor([[1.0, 2, 3, 4]], dtype=dtype, requires_grad=True)
    given = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.3]]).log()
    loss = sparse_loss(logits, *given)
    assert loss.dtype == torch.float32
    assert loss.item() == sparse_loss(logits.float(), *given).item()
    assert gradient(loss, logits).dtype == dtype


def test_float64_logits_stay_float64():
    logits = torch.zeros(1, 4, dtype=torch.float64)
    for support in SUPPORTS:
        loss = sparse_loss(logits, torch.tensor([[3, 1]]), torch.zeros(1, 2) - 1, torch.tensor([0]), support=support)
        assert loss.dtype == torch.float64


def test_no_targets_no_losses():
    loss = sparse_loss(torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert loss.tolist() == []


def test_at_temperature_one_the_norm_is_ignored():
    logits, ids, logprobs = torch.zeros(1, 4), torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.3]]).log()
    given = {"log_norm_N": torch.tensor([99.0])}
    assert sparse_loss(logits, ids, logprobs, **given).item() == sparse_loss(logits, ids, logprobs).item()


def test_a_temperature_without_its_norm_is_refused_except_where_it_is_exact():
    logits, ids, logprobs = torch.zeros(1, 4), torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.2]]).log()
    with pytest.raises(RecipeError, match=r"temperature 2.0 with support tail_bucket.*re-run cache-teacher with 2.0"):
        sparse_loss(logits, ids, logprobs, temperature=2.0)
    # renormalized: √.6 : √.2 = √3 : 1 = (.634, .366) against (.5, .5)
    loss = sparse_loss(logits, ids, logprobs, support="renormalized", temperature=2.0)
    p = sqrt(3) / (1 + sqrt(3))
    assert loss.item() == pytest.approx(p * log(2 * p) + (1 - p) * log(2 - 2 * p), abs=1e-6)
    # its own norm over the vocabulary changes nothing there
    norm = torch.tensor([0.7])
    again = sparse_loss(logits, ids, logprobs, log_norm_N=norm, support="renormalized", temperature=2.0)
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)


def test_the_tail_at_a_temperature_by_hand():
    # p = (.64, .25, .11) at T = 2: (.8, .5, .33166) / 1.63166; K = 1 against an even student (1/3 | 2/3)
    norm = torch.tensor([log(1.63166)])
    given = {"log_norm_N": norm, "temperature": 2.0, "tail_logprob_N": torch.tensor([log(0.36)])}
    loss = sparse_loss(torch.zeros(1, 3), torch.tensor([[0]]), torch.tensor([[log(0.64)]]), **given)
    p = 0.8 / 1.63166
    assert loss.item() == pytest.approx(p * log(3 * p) + (1 - p) * log(1.5 * (1 - p)), abs=1e-6)


def test_the_norm_of_rounded_logprobs_is_taken_after_rounding():
    """A sure teacher in steps of 1/64 nat, at T = 2: 1 − Σ of rounded values over an exact norm is no tail."""
    exact = torch.tensor([[0.9966, 0.003, 0.0003, 0.0001]], dtype=torch.float64).log()
    tail = (exact / 2).log_softmax(-1)[:, 2:].logsumexp(-1)  # (√.0003 + √.0001) / Σ √p = .0273 / 1.0804 = .0253
    assert tail.exp().item() == pytest.approx(0.0253, abs=1e-4)
    rounded = (exact[:, :2] * 64).round() / 64
    before = (exact / 2).logsumexp(-1)
    after = (rounded / 2).logsumexp(-1) - torch.log1p(-tail.exp())
    assert abs(teacher_at(2.0, rounded, None, after, "tail_bucket", 4)[1] - tail).item() < 1e-12
    assert abs(teacher_at(2.0, rounded, None, before, "tail_bucket", 4)[1] - tail).item() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": "tailbucket"}, "loss.support 'tailbucket' is unknown; did you mean 'tail_bucket'?"),
        ({"divergence": "topk_jsd"}, "loss.divergence 'topk_jsd' is unknown; did you mean 'jsd'?"),
        ({"beta": 1.5}, "loss.beta is 1.5; choose a number from 0 to 1"),
        ({"beta": float("nan")}, "loss.beta is nan; choose a number from 0 to 1"),
        ({"alpha": -0.1}, "loss.alpha is -0.1; choose a number from 0 to 1"),
        ({"temperature": 0.0}, "loss.temperature is 0.0; choose a finite number above 0"),
        ({"temperature": inf}, "loss.temperature is inf; choose a finite number above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(change, message):
    good = {"support": "tail_bucket", "divergence": "jsd", "beta": 0.0, "alpha": 1.0, "temperature": exp(1)}
    check_loss_options(**good)
    with pytest.raises(RecipeError) as error:
        check_loss_options(**good | change)
    assert str(error.value).startswith(message)
    with pytest.raises(RecipeError):
        sparse_loss(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), **good | change)
