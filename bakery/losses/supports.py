"""Supports: a sparse teacher p and a dense student q as log-probabilities over the same few buckets.

N targets, K support, V vocabulary, B buckets: K, or K + 1. Natural log; row n belongs to target n. Ids are distinct.
A bucket at −inf on both sides does not exist: padding, or the tail of a row whose support is the whole vocabulary.
"""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from bakery.errors import RecipeError

LOG_TAIL_FLOOR = -100.0  # nats: a teacher with nothing outside its support still leaves this, for a finite KL(q‖p)
MASKED = -1e30  # a logit that is nothing; finite, so that a row of nothing else has a gradient of zero and not NaN


def teacher_at(
    temperature: float,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    log_norm_N: Tensor | None,
    support: str,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """(logp_NK, tail_N) at the temperature: logprob / T − log Σ_V exp(logprob / T), and the log of the mass outside K.

    A tail that is not given, or given at another temperature, is log(1 − Σ_K p) in float64, floored at the resolution
    of the log-probabilities. A tail of −inf comes out for whole rows (support = vocabulary) and for no other.
    """
    whole_N = (logprobs_NK > -inf).sum(-1) == vocab_size
    logp_NK = logprobs_NK
    if support == "sampled":
        return logp_NK, _mean_log(logp_NK) if tail_N is None else tail_N  # without it: the KL from the shares
    if temperature != 1:
        logp_NK, tail_N = logprobs_NK.double() / temperature, None
        if log_norm_N is None:
            if support != "renormalized" and not whole_N.all():
                raise RecipeError(
                    f"loss.temperature {temperature} with support {support} needs the teacher's norm over its whole "
                    f"vocabulary there, and got none; re-run cache-teacher with {temperature} listed under "
                    "cache.temperatures, or choose support renormalized"
                )
            log_norm_N = logp_NK.logsumexp(-1)
        logp_NK = logp_NK - log_norm_N.double().unsqueeze(-1)
    if tail_N is None:
        rest_N = 1 - logp_NK.double().exp().sum(-1)
        tail_N = rest_N.clamp_min(torch.finfo(logprobs_NK.dtype).eps).log()
    return logp_NK, tail_N.clamp_min(LOG_TAIL_FLOOR).masked_fill(whole_N, -inf)


def renormalized(
    logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, labels_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p / Σ_K p against q / Σ_K q: blind to all that the student puts outside K."""
    real_NK, ids_NK = _real(ids_NK, logp_NK)
    return logp_NK.log_softmax(-1), logits_NV.gather(-1, ids_NK).masked_fill(~real_NK, -inf).log_softmax(-1)


def tail_bucket(
    logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, labels_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """K buckets and one for all the rest, on both sides: distributions, so every divergence is a lower bound.

    log q(rest) is the log-sum-exp of the logits outside K less that of all of them, which is log(e^head + e^rest): one
    pass over V. log1p(−Σ_K q) would be the same number with a gradient that explodes where the rest is small.
    """
    real_NK, ids_NK = _real(ids_NK, logp_NK)
    logits_NK = logits_NV.gather(-1, ids_NK).masked_fill(~real_NK, -inf)
    rest_N = logits_NV.scatter(-1, ids_NK, MASKED).logsumexp(-1)
    lse_N = torch.logaddexp(logits_NK.logsumexp(-1), rest_N)
    logq_rest_N = (rest_N - lse_N).masked_fill(tail_N == -inf, -inf)
    return _join(logp_NK, tail_N), _join(logits_NK - lse_N.unsqueeze(-1), logq_rest_N)


def truncated(
    logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, labels_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p over K, its tail dropped, against the student's full softmax at K: both sum to less than one."""
    real_NK, ids_NK = _real(ids_NK, logp_NK)
    logq_NK = logits_NV.gather(-1, ids_NK) - logits_NV.logsumexp(-1, keepdim=True)
    return logp_NK, logq_NK.masked_fill(~real_NK, -inf)


def residual_to_label(
    logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, labels_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The teacher's tail goes to the actual token: onto its place in K, else into a bucket against q(label)."""
    if labels_N is None:
        raise RecipeError("loss.support residual_to_label needs the actual tokens, got none; pass labels_N")
    real_NK, ids_NK = _real(ids_NK, logp_NK)
    is_label_NK = real_NK & (ids_NK == labels_N.unsqueeze(-1))
    in_support_N = is_label_NK.any(-1)
    logp_NK = torch.where(is_label_NK, torch.logaddexp(logp_NK, tail_N.unsqueeze(-1)), logp_NK)
    logq_NB = logits_NV.gather(-1, _join(ids_NK, labels_N)) - logits_NV.logsumexp(-1, keepdim=True)
    absent_NB = ~_join(real_NK, ~in_support_N)
    return _join(logp_NK, tail_N.masked_fill(in_support_N, -inf)), logq_NB.masked_fill(absent_NB, -inf)


def sampled(
    logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, labels_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shares p̂ of draws from p, against the student's full softmax; tail_N is Σ p̂ log p, the draws' mean log-prob.

    E p̂ = p, and the forward KL's gradient is linear in p̂: on average it is that of the full distributions. So is its
    value: q is scaled by a constant of each row, which turns Σ p̂ log p̂, far above Σ p log p on average, into Σ p̂ log p.
    """
    logp_NK, logq_NK = truncated(logits_NV, ids_NK, logp_NK, tail_N, labels_N)
    return logp_NK, logq_NK + (_mean_log(logp_NK) - tail_N).unsqueeze(-1)


def _mean_log(logp_NK: Tensor) -> Tensor:
    """Σ p log p"""
    return (logp_NK.exp() * logp_NK.masked_fill(logp_NK == -inf, 0)).sum(-1)


def _real(ids_NK: Tensor, logp_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(which entries are real, ids with padding pointing at the row's first, so that it takes no id from the tail)."""
    real_NK = logp_NK > -inf
    return real_NK, torch.where(real_NK, ids_NK, ids_NK[:, :1])


def _join(x_NK: Tensor, last_N: Tensor) -> Tensor:
    return torch.cat([x_NK, last_N.unsqueeze(-1)], dim=-1)


Support = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
SUPPORTS: dict[str, Support] = {
    "renormalized": renormalized,
    "tail_bucket": tail_bucket,
    "truncated": truncated,
    "residual_to_label": residual_to_label,
    "sampled": sampled,
}
