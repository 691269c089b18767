"""Losses: cached teacher log-probabilities and student logits -> nats per target.

N targets, K support, V vocabulary, B buckets. A support decides which buckets there are, a divergence how far apart
the two sides are there. Nothing is reduced: the caller sums over targets and divides by their global number.
"""

from difflib import get_close_matches
from math import inf

from torch import Tensor, float64

from bakery.errors import RecipeError
from bakery.losses.divergences import DIVERGENCES, divergence_between
from bakery.losses.supports import SUPPORTS, teacher_at

__all__ = ["DIVERGENCES", "SUPPORTS", "check_loss_options", "sparse_loss"]


def sparse_loss(
    student_logits_NV: Tensor,
    topk_ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    labels_N: Tensor | None = None,
    *,
    tail_logprob_N: Tensor | None = None,
    log_norm_N: Tensor | None = None,
    support: str = "tail_bucket",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """loss_N: divergence(teacher, student) over the support's buckets, nats per target. docs/losses.md.

    Row n holds both sides' predictions of target n: the student's logits, and the teacher's log-probabilities at
    temperature 1, normalised over the full vocabulary. An entry at −inf is padding, whatever its id; the first entry
    of a row is real, and ids do not repeat. Computed in float32 (float64 logits stay float64).

    tail_logprob_N  log of the teacher's mass outside the support, at temperature 1. None derives log(1 − Σ exp), which
                    is only as good as the log-probabilities are exact, and is floored at their dtype's resolution.
    labels_N        the actual tokens; only `residual_to_label` reads them.
    temperature     divides both sides' logits; there is no T² factor.
    log_norm_N      log Σ_V exp(logprob / T), read at T ≠ 1 only: the tail there is 1 − Σ_K exp(logprob / T − log_norm),
                    so rounded log-probabilities want the norm taken after rounding. `renormalized`, and a batch whose
                    rows all hold the whole vocabulary, do without.
    """
    check_loss_options(support, divergence, beta, alpha, temperature)
    logits_NV = student_logits_NV if student_logits_NV.dtype == float64 else student_logits_NV.float()
    logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
    teacher = teacher_at(temperature, topk_logprobs_NK, tail_logprob_N, log_norm_N, support, logits_NV.shape[-1])
    logp_NK, tail_N = (logp.to(logits_NV.dtype) for logp in teacher)
    logp_NB, logq_NB = SUPPORTS[support](logits_NV, topk_ids_NK, logp_NK, tail_N, labels_N)
    return divergence_between(logp_NB, logq_NB, divergence, beta, alpha)


def check_loss_options(support: str, divergence: str, beta: float, alpha: float, temperature: float) -> None:
    """Refuse what no loss can mean, before any data is read: RecipeError, with the option, its value and the cure."""
    for option, name, known in (("support", support, SUPPORTS), ("divergence", divergence, DIVERGENCES)):
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"loss.{option} {name!r} is unknown; did you mean {nearest!r}? ({', '.join(known)})")
    for option, value in (("beta", beta), ("alpha", alpha)):
        if not 0 <= value <= 1:
            raise RecipeError(f"loss.{option} is {value}; choose a number from 0 to 1")
    if not 0 < temperature < inf:
        raise RecipeError(f"loss.temperature is {temperature}; choose a finite number above 0")
    if support == "sampled" and (divergence, temperature) != ("forward_kl", 1):
        raise RecipeError(
            f"loss.support sampled takes draws at temperature 1, unbiased for forward_kl alone; got {divergence} at "
            f"{temperature}; choose forward_kl at 1, or a cache and a support of another kind"
        )
