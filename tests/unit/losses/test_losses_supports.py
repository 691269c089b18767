"""Supports: which buckets there are, and how much each side puts into them. Vocabularies small enough to do by hand."""

from math import inf, log, sqrt

import pytest
import torch

from bakery.errors import RecipeError
from bakery.losses.supports import (
    LOG_TAIL_FLOOR,
    SUPPORTS,
    renormalized,
    residual_to_label,
    tail_bucket,
    teacher_at,
    truncated,
)


def logs(*p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


LOGITS = logs(0.1, 0.2, 0.3, 0.4)  # the student
IDS = torch.tensor([[2, 0]])
LOGP = logs(0.5, 0.3)  # the teacher at tokens 2 and 0
TAIL = logs(0.2)[0]


def masses(buckets):
    logp_NB, logq_NB = buckets
    return logp_NB.exp().tolist()[0], logq_NB.exp().tolist()[0]


def test_renormalized_by_hand():
    p, q = masses(renormalized(LOGITS, IDS, LOGP, TAIL, None))
    assert p == pytest.approx([0.5 / 0.8, 0.3 / 0.8])
    assert q == pytest.approx([0.3 / 0.4, 0.1 / 0.4])


def test_tail_bucket_by_hand():
    p, q = masses(tail_bucket(LOGITS, IDS, LOGP, TAIL, None))
    assert p == pytest.approx([0.5, 0.3, 0.2])
    assert q == pytest.approx([0.3, 0.1, 0.6])  # the rest is .2 + .4


def test_truncated_by_hand():
    p, q = masses(truncated(LOGITS, IDS, LOGP, TAIL, None))
    assert p == pytest.approx([0.5, 0.3])
    assert q == pytest.approx([0.3, 0.1])


def test_residual_to_a_label_in_the_support_lands_on_its_place():
    p, q = masses(residual_to_label(LOGITS, IDS, LOGP, TAIL, torch.tensor([0])))
    assert p == pytest.approx([0.5, 0.3 + 0.2, 0])
    assert q == pytest.approx([0.3, 0.1, 0])


def test_residual_to_a_label_outside_the_support_gets_a_bucket():
    p, q = masses(residual_to_label(LOGITS, IDS, LOGP, TAIL, torch.tensor([3])))
    assert p == pytest.approx([0.5, 0.3, 0.2])
    assert q == pytest.approx([0.3, 0.1, 0.4])


def test_residual_is_not_taken_by_padding_that_carries_the_labels_id():
    ids, logp = torch.tensor([[2, 0, 3]]), logs(0.5, 0.3, 0.0)
    p, q = masses(residual_to_label(LOGITS, ids, logp, TAIL, torch.tensor([3])))
    assert p == pytest.approx([0.5, 0.3, 0, 0.2])
    assert q == pytest.approx([0.3, 0.1, 0, 0.4])


def test_residual_to_label_needs_labels():
    with pytest.raises(RecipeError, match="residual_to_label needs the actual tokens, got none; pass labels_N"):
        residual_to_label(LOGITS, IDS, LOGP, TAIL, None)


@pytest.mark.parametrize("padding_id", [-1, 0, 3, 10**6])
@pytest.mark.parametrize("name", SUPPORTS)
def test_padding_is_an_empty_bucket_and_takes_no_id_from_the_tail(name, padding_id):
    labels = torch.tensor([1])
    ids, logp = torch.tensor([[2, padding_id, 0, padding_id]]), logs(0.5, 0.0, 0.3, 0.0)
    p, q = masses(SUPPORTS[name](LOGITS, IDS, LOGP, TAIL, labels))
    padded_p, padded_q = masses(SUPPORTS[name](LOGITS, ids, logp, TAIL, labels))
    assert padded_p == pytest.approx([p[0], 0, p[1], 0, *p[2:]])
    assert padded_q == pytest.approx([q[0], 0, q[1], 0, *q[2:]])


def test_the_students_tail_keeps_its_log_where_its_mass_is_lost():
    # 1 − Σ_K q is 0 in float32; log q(rest) = log(e^−200 + e^−300) − log(1 + …) = −200
    logits = torch.tensor([[0.0, -200.0, -300.0]], requires_grad=True)
    ids, logp, tail = torch.tensor([[0]]), torch.tensor([[-0.5]]), torch.tensor([-0.93])
    _, logq = tail_bucket(logits, ids, logp, tail, None)
    assert logq[0, 1].item() == pytest.approx(-200)
    logq[0, 1].backward()  # ∂ log q(rest) / ∂ logits = softmax over the rest − softmax
    assert logits.grad.tolist() == [[pytest.approx(-1), pytest.approx(1), pytest.approx(0)]]


def test_a_whole_row_has_no_tail_on_either_side_even_beside_a_padded_row():
    logits = torch.cat([LOGITS, LOGITS]).requires_grad_()
    ids = torch.tensor([[3, 2, 1, 0], [3, 2, 1, 1]])
    logprobs = torch.cat([logs(0.4, 0.3, 0.2, 0.1), logs(0.4, 0.3, 0.2, 0.0)])
    logp, tail = teacher_at(1.0, logprobs, None, None, "tail_bucket", 4)
    logp_NB, logq_NB = tail_bucket(logits, ids, logp, tail, None)
    assert logp_NB.exp()[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    assert logq_NB.exp()[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    assert logp_NB.exp()[1].tolist() == pytest.approx([0.4, 0.3, 0.2, 0, 0.1])
    assert logq_NB.exp()[1].tolist() == pytest.approx([0.4, 0.3, 0.2, 0, 0.1])
    logq_NB.masked_fill(logq_NB == -inf, 0).sum().backward()
    # ∂ Σ_B log q / ∂ logit_v = (buckets holding v: 1, or its share of the tail) − B q_v, and B = 4 in both rows
    torch.testing.assert_close(logits.grad, 1 - 4 * LOGITS.exp().expand(2, 4))


@pytest.mark.parametrize("tail", [None, torch.tensor([-inf]), torch.tensor([-3.0])])
def test_whatever_tail_a_whole_row_is_given_is_dropped(tail):
    _, tail_N = teacher_at(1.0, logs(0.4, 0.3, 0.2, 0.1), tail, None, "tail_bucket", 4)
    assert tail_N.tolist() == [-inf]


def test_a_missing_tail_is_derived_and_floored_at_the_resolution():
    assert teacher_at(1.0, LOGP, None, None, "tail_bucket", 4)[1].item() == pytest.approx(log(0.2))
    over_one = torch.tensor([[log(0.75), log(0.26)]])  # as a rounded cache may hold
    assert teacher_at(1.0, over_one, None, None, "tail_bucket", 4)[1].item() == pytest.approx(log(2**-23))
    assert teacher_at(1.0, over_one.double(), None, None, "tail_bucket", 4)[1].item() == pytest.approx(log(2**-52))


def test_an_empty_teacher_tail_is_floored_where_the_student_has_mass():
    assert teacher_at(1.0, LOGP, torch.tensor([-inf]), None, "tail_bucket", 4)[1].item() == LOG_TAIL_FLOOR
    assert teacher_at(1.0, LOGP, torch.tensor([-60.0]), None, "tail_bucket", 4)[1].item() == -60  # exact: kept


def test_teacher_at_a_temperature_with_its_norm_by_hand():
    # p = (.64, .25, .11); √p = (.8, .5, .3317), their sum 1.6317
    norm = torch.tensor([log(0.8 + 0.5 + sqrt(0.11))])
    logp, tail = teacher_at(2.0, logs(0.64, 0.25), logs(0.11)[0], norm, "tail_bucket", 3)
    assert logp.exp()[0].tolist() == pytest.approx([0.8 / 1.63166, 0.5 / 1.63166], abs=1e-5)
    assert tail.exp().item() == pytest.approx(0.33166 / 1.63166, abs=1e-5)  # the tail at T = 1, .11, is not used


def test_a_whole_row_is_its_own_norm():
    logp, tail = teacher_at(0.5, logs(0.75, 0.25), None, None, "truncated", 2)  # p² = (.5625, .0625) / .625
    assert logp.exp()[0].tolist() == pytest.approx([0.9, 0.1])
    assert tail.item() == -inf


@pytest.mark.parametrize("name", ["tail_bucket", "truncated", "residual_to_label"])
def test_a_temperature_without_its_norm_is_refused(name):
    logprobs = torch.cat([logs(0.5, 0.3, 0.2), logs(0.5, 0.3, 0.0)])  # the second row is not whole
    with pytest.raises(RecipeError, match=f"temperature 2.0 with support {name}.*cache.temperatures.*renormalized"):
        teacher_at(2.0, logprobs, None, None, name, 3)
