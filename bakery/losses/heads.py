"""An LM head read at a few columns, a chunk of targets at a time, and the gradients that go back into it.

N targets, n those of one chunk, V vocabulary, H hidden, C columns: the token ids that a target's loss reads one by one.
All tokens outside its columns are merged into one, the **rest**, whose logit is the log-sum-exp of theirs; a gradient
of that logit spreads over them by softmax. `raw` is W h + b, before scale, soft-cap and temperature.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bakery.losses.supports import MASKED

FLOATS_IN_CACHE = 2**18  # 1 MB: what a CPU core's second-level cache holds


class LMHead(NamedTuple):
    """logits = scale · (W h + b), and then softcap · tanh(logits / softcap) where there is a soft-cap."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0  # Cohere; Granite: one over its divisor
    softcap: float | None = None  # Gemma 2


class Gradients:
    """Sums over chunks for hidden states, weight and bias; None where nobody needs it.

    In float32 at least: a sum of many bfloat16 numbers that is kept in bfloat16 stops growing.
    """

    def __init__(self, needed: tuple[bool, bool, bool], hidden_NH: Tensor, weight_VH: Tensor, bias_V: Any) -> None:
        self.hidden_NH, self.weight_VH, self.bias_V = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need else None
            for need, x in zip(needed, (hidden_NH, weight_VH, bias_V), strict=True)
        )


class AllRows:
    """A chunk of targets against the whole vocabulary, in one tensor [n,V]: raw, then shares, then gradient."""

    def __init__(self, hidden_nH: Tensor, head: LMHead, columns_nC: Tensor) -> None:
        self.hidden_nH, self.head, self.columns_nC = hidden_nH, head, columns_nC
        self.x_nV = linear(hidden_nH, head.weight_VH, head.bias_V)

    def read(self, temperature: float) -> tuple[Tensor, Tensor]:
        """raw at the columns, and rest_n1: log Σ exp(logit / temperature) over all other tokens."""
        at_nC = self.x_nV.gather(-1, self.columns_nC)
        self.x_nV.scatter_(-1, self.columns_nC, MASKED)
        return at_nC, merge_rows(self.x_nV, self.head.scale, self.head.softcap, temperature)

    def give(self, to: Gradients, rows: slice, grad_at_nC: Tensor, grad_rest_n1: Tensor) -> None:
        """Add this chunk's part, given the gradients of what was read."""
        grad_nV, parts = self.x_nV, in_cache(self.x_nV)
        for part, grad_rest in zip(parts, grad_rest_n1.split(len(parts[0])), strict=True):
            part.mul_(grad_rest)
        grad_nV.scatter_add_(-1, self.columns_nC, grad_at_nC.to(grad_nV.dtype))  # they had no share in the rest
        if to.hidden_NH is not None:
            to.hidden_NH[rows] += grad_nV @ self.head.weight_VH
        if to.weight_VH is not None and to.weight_VH.dtype == grad_nV.dtype:
            to.weight_VH.addmm_(grad_nV.T, self.hidden_nH)  # no second [V,H]
        elif to.weight_VH is not None:
            sums = in_cache(to.weight_VH)
            for part, grad in zip(sums, grad_nV.split(len(sums[0]), 1), strict=True):
                part += grad.T @ self.hidden_nH
        if to.bias_V is not None:
            to.bias_V += grad_nV.sum(0, dtype=to.bias_V.dtype)


class GatheredRows:
    """A chunk of targets against the head's rows at its columns, for a loss that reads nothing else."""

    def __init__(self, hidden_nH: Tensor, head: LMHead, columns_nC: Tensor) -> None:
        self.hidden_nH, self.columns_nC = hidden_nH, columns_nC
        self.weight_nCH = head.weight_VH[columns_nC]
        self.bias_nC = None if head.bias_V is None else head.bias_V[columns_nC]

    def read(self, temperature: float) -> tuple[Tensor]:
        at_nC = (self.weight_nCH @ self.hidden_nH.unsqueeze(-1)).squeeze(-1)
        return (at_nC if self.bias_nC is None else at_nC + self.bias_nC,)

    def give(self, to: Gradients, rows: slice, grad_at_nC: Tensor) -> None:
        grad_nC = grad_at_nC.to(self.hidden_nH.dtype)
        if to.hidden_NH is not None:
            to.hidden_NH[rows] += (grad_nC.unsqueeze(1) @ self.weight_nCH).squeeze(1)
        if to.weight_VH is not None:
            grad_nCH = grad_nC.unsqueeze(-1) * self.hidden_nH.unsqueeze(1)
            to.weight_VH.index_add_(0, self.columns_nC.flatten(), grad_nCH.flatten(0, 1).to(to.weight_VH.dtype))
        if to.bias_V is not None:
            to.bias_V.index_add_(0, self.columns_nC.flatten(), grad_at_nC.flatten().to(to.bias_V.dtype))


def shaped(raw: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """raw -> logits / temperature, float32 at least. `MASKED` stays far below every logit."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    if softcap:
        logits = torch.where(raw > MASKED / 2, softcap * (logits / softcap).tanh(), MASKED)
    return logits if temperature == 1 else logits / temperature


def merge(raw_nV: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """rest_n1, the logit of all tokens of a row merged into one; raw_nV becomes its gradient, ∂ rest / ∂ raw.

    That is the softmax times the slope of `shaped`. The largest entry of a softmax is exp(largest logit − rest), which
    gives the rest without another pass over exponentials. An entry at `MASKED` has no share, unless all are there; then
    the rest is no token, and has no gradient to share.
    """
    logits_nV = shaped(raw_nV, scale, softcap, temperature)
    share_nV = logits_nV.softmax(-1)
    rest_n1 = logits_nV.amax(-1, keepdim=True) - share_nV.amax(-1, keepdim=True).log()
    if softcap:
        share_nV = share_nV * (1 - (logits_nV * (temperature / softcap)).clamp_min(-1) ** 2)
    raw_nV.copy_(share_nV * (scale / temperature))
    return rest_n1


@cache
def compiled_merge() -> Callable[..., Tensor]:
    return torch.compile(merge, dynamic=True)


def merge_rows(raw_nV: Tensor, *given: Any) -> Tensor:
    """`merge`, on a GPU compiled to one kernel, on a CPU a few rows at a time, which stay in its cache."""
    if raw_nV.is_cuda and find_spec("triton"):
        return compiled_merge()(raw_nV, *given)
    rest_n1 = raw_nV.new_empty(len(raw_nV), 1, dtype=torch.promote_types(raw_nV.dtype, torch.float32))
    parts = in_cache(raw_nV)
    for part, rest in zip(parts, rest_n1.split(len(parts[0])), strict=True):
        rest.copy_(merge(part, *given))  # results kept one by one would lie between rows that have been freed
    return rest_n1


def in_cache(x: Tensor) -> tuple[Tensor, ...]:
    """A few rows at a time on a CPU, where what is made of them on the way, such as a float32 copy, stays in its cache;
    all on a GPU."""
    return x.split(len(x) if x.is_cuda else max(1, FLOATS_IN_CACHE // x.shape[-1]))
