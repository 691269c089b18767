"""Divergences of a student from a teacher, nats per target: (logp_NB, logq_NB) -> loss_N.

N targets, B buckets; p = teacher T, q = student S, natural log. Sub-distributions are allowed. A bucket at −inf holds
nothing: it contributes 0, and no NaN to a gradient. Sources and limits: docs/losses.md.
"""

from collections.abc import Callable
from math import inf, log

import torch
from torch import Tensor


def forward_kl(logp_NB: Tensor, logq_NB: Tensor) -> Tensor:
    """Σ p (log p − log q), nats. Hinton 2015."""
    live_NB = logp_NB > -inf
    logratio_NB = logp_NB.masked_fill(~live_NB, 0) - logq_NB.masked_fill(~live_NB, 0)
    return (logp_NB.exp() * logratio_NB).sum(-1)


def reverse_kl(logp_NB: Tensor, logq_NB: Tensor) -> Tensor:
    """Σ q (log q − log p), nats. Gu 2023 (MiniLLM)."""
    return forward_kl(logq_NB, logp_NB)


def mixed_kl(logp_NB: Tensor, logq_NB: Tensor, beta: float) -> Tensor:
    """(1−β) KL(T‖S) + β KL(S‖T), nats: a mixture of divergences, where `jsd` has one of distributions."""
    match beta:  # the ends are told apart because 0 · ∞ is no number
        case 0:
            return forward_kl(logp_NB, logq_NB)
        case 1:
            return reverse_kl(logp_NB, logq_NB)
    return (1 - beta) * forward_kl(logp_NB, logq_NB) + beta * reverse_kl(logp_NB, logq_NB)


def jsd(logp_NB: Tensor, logq_NB: Tensor, beta: float) -> Tensor:
    """β KL(T‖M) + (1−β) KL(S‖M), M = βT + (1−β)S, nats. Agarwal 2023 (GKD), whose ends are the KLs: it jumps there."""
    match beta:
        case 0:
            return forward_kl(logp_NB, logq_NB)
        case 1:
            return reverse_kl(logp_NB, logq_NB)
    logm_NB = _log_mixture(logp_NB, logq_NB, beta)
    return beta * forward_kl(logp_NB, logm_NB) + (1 - beta) * forward_kl(logq_NB, logm_NB)


def scaled_jsd(logp_NB: Tensor, logq_NB: Tensor, beta: float) -> Tensor:
    """jsd / (β (1−β)), nats: the same minimum, and on distributions no jump at the ends."""
    return jsd(logp_NB, logq_NB, beta) / (beta * (1 - beta) or 1)


def skew_kl(logp_NB: Tensor, logq_NB: Tensor, alpha: float) -> Tensor:
    """KL(T ‖ αT + (1−α)S), nats; at most −log α on a distribution. Ko 2024 (DistiLLM)."""
    return forward_kl(logp_NB, _log_mixture(logp_NB, logq_NB, alpha))


def tvd(logp_NB: Tensor, logq_NB: Tensor) -> Tensor:
    """½ Σ |p − q|, from 0 to 1. Wen 2023 (f-DISTILL)."""
    return (logp_NB.exp() - logq_NB.exp()).abs().sum(-1) / 2


def _log_mixture(logp_NB: Tensor, logq_NB: Tensor, weight: float) -> Tensor:
    """log(w p + (1−w) q); −inf, with a gradient of zero and not NaN, where both parts are."""
    part_p_NB = logp_NB + (log(weight) if weight > 0 else -inf)
    part_q_NB = logq_NB + (log(1 - weight) if weight < 1 else -inf)
    empty_NB = torch.maximum(part_p_NB, part_q_NB) == -inf
    return torch.logaddexp(part_p_NB.masked_fill(empty_NB, 0), part_q_NB).masked_fill(empty_NB, -inf)


def divergence_between(logp_NB: Tensor, logq_NB: Tensor, name: str, beta: float, alpha: float) -> Tensor:
    """loss_N of the divergence of that name, given the one parameter it has, if any."""
    match name:
        case "mixed_kl" | "jsd" | "scaled_jsd":
            return DIVERGENCES[name](logp_NB, logq_NB, beta)
        case "skew_kl":
            return DIVERGENCES[name](logp_NB, logq_NB, alpha)
    return DIVERGENCES[name](logp_NB, logq_NB)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "mixed_kl": mixed_kl,
    "jsd": jsd,
    "scaled_jsd": scaled_jsd,
    "skew_kl": skew_kl,
    "tvd": tvd,
}
