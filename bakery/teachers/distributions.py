"""Logits over the full vocabulary -> the little that is stored of them.

Legend: N targets, K support, V vocabulary, T temperatures, D draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from bakery.records import TopK
from bakery.teachers.draws import Streams, sample_of

BLOCK = 64  # columns
WORTH_BLOCKS = 500  # columns for each entry of the top-k; with fewer, torch.topk over all of them is as fast


@dataclass(frozen=True)
class Rows:
    """What becomes rows of a TopK, as tensors that are still on the teacher's device."""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    @staticmethod
    def joined(parts: "list[Rows]") -> "Rows":
        return type(parts[0])(*map(torch.cat, zip(*(part.tensors() for part in parts), strict=True)))

    def rows(self, select: Any) -> Self:
        return type(self)(*(tensor[select] for tensor in self.tensors()))

    def copy_begun(self) -> "Callable[[], Rows]":
        """Begins the way to the CPU; called, the result waits for that alone, while a GPU goes on with what follows."""
        first, *_ = self.tensors()
        copy = type(self)(*(tensor.to("cpu", non_blocking=first.is_cuda) for tensor in self.tensors()))
        arrived = torch.cuda.current_stream(first.device).record_event() if first.is_cuda else None

        def wait() -> Rows:
            if arrived is not None:
                arrived.synchronize()
            return copy

        return wait

    def to_topk(self) -> TopK:
        raise NotImplementedError


@dataclass(frozen=True)
class Summary(Rows):
    """The most likely tokens."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    token_N: Tensor
    log_norm_NT: Tensor

    def to_topk(self) -> TopK:
        return TopK.from_rows(*(tensor.numpy() for tensor in self.tensors()))


@dataclass(frozen=True)
class Sample(Rows):
    """Draws, their mean log-prob and that of the actual token."""

    draws_ND: Tensor
    mean_N: Tensor
    token_N: Tensor

    def to_topk(self) -> TopK:
        return sample_of(*(tensor.numpy() for tensor in self.tensors()))


# (logits_NV, labels_N, which row of the call each is of) -> what is kept of them; a row's targets come in order.
Keep = Callable[[Tensor, Tensor, Any], Rows]


def top(k: int, vocab_size: int, temperatures: tuple[float, ...]) -> Keep:
    return lambda logits_NV, labels_N, rows: summarize(logits_NV, labels_N, k, vocab_size, temperatures)


def sample(streams: Streams, vocab_size: int) -> Keep:
    return lambda logits_NV, labels_N, rows: draw(logits_NV, labels_N, streams.next(rows), vocab_size)


def summarize(logits_NV: Tensor, labels_N: Tensor, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> Summary:
    """Top-k of the log-softmax at temperature 1, the exact log of the rest, the label's log-prob, and for each
    temperature log Σ exp(logprob / T) over the full vocabulary. Nats. Float32 logits are overwritten.

    `vocab_size` keeps a padded output's rows (ids that are no tokens) out of the support; they count in the tail.
    """
    logits_NV = logits_NV.float()
    values_NK, ids_NK = largest(logits_NV[:, :vocab_size], k)
    label_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
    sums = [_log_sum_exp(logits_NV / t) for t in temperatures]
    rest_N = _log_sum_exp(logits_NV.scatter_(1, ids_NK, float("-inf")))
    lse_N = torch.logaddexp(values_NK.logsumexp(-1), rest_N)
    norms = [sum_N - lse_N / t for sum_N, t in zip(sums, temperatures, strict=True)]
    return Summary(
        ids_NK,
        (values_NK - lse_N[:, None]).clamp_(max=0),
        (rest_N - lse_N).clamp_(max=0),
        (label_N - lse_N).clamp_(max=0),
        torch.stack(norms, 1) if norms else logits_NV.new_zeros((len(logits_NV), 0)),
    )


def _log_sum_exp(x_NV: Tensor) -> Tensor:
    """In place: at this size a fresh tensor costs more than the exponentials. -inf where all of a row is."""
    peak_N1 = x_NV.amax(1, keepdim=True).clamp_(min=torch.finfo(x_NV.dtype).min)
    return x_NV.sub_(peak_N1).exp_().sum(-1).log_().add_(peak_N1[:, 0])


def largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids [N,K] of torch.topk; among equal values the ids may be others.

    An entry of the k largest lies in one of the k blocks with the largest maxima: were its block left out, k blocks
    would each hold an entry at least as large. So the maxima are searched, then those k blocks.
    """
    blocks = x_NV.shape[1] // BLOCK
    if x_NV.shape[1] < k * WORTH_BLOCKS:
        return x_NV.topk(k)
    x_NMB = x_NV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best_NK = x_NMB.amax(-1).topk(k, sorted=False).indices
    inside_NKB = x_NMB.gather(1, best_NK[..., None].expand(-1, -1, BLOCK))
    # The last columns, too few for a block, are searched in any case.
    values, at = torch.cat([inside_NKB.flatten(1), x_NV[:, blocks * BLOCK :]], 1).topk(k)
    block = torch.cat([best_NK, best_NK.new_full((len(best_NK), 1), blocks)], 1).gather(1, at // BLOCK)
    return values, block * BLOCK + at % BLOCK


def draw(logits_NV: Tensor, labels_N: Tensor, uniform_N2D: Any, vocab_size: int) -> Sample:
    """Draws with replacement from the softmax at temperature 1, by inverse CDF in two steps: a block, a token in it.

    Each step is small, so its sums are float64 and a token of 1e-12 has its chance; and as each has a number of its
    own, the noise of a log-prob moves few draws. Ids that pad the output (from `vocab_size` on) are never drawn: the
    sample and its mean log-prob are those of the distribution over tokens.
    """
    logits_NV, blocks = logits_NV.float(), -(-vocab_size // BLOCK)
    weights_NV = logits_NV.new_zeros((len(logits_NV), blocks * BLOCK))
    peak_N1 = logits_NV[:, :vocab_size].amax(1, keepdim=True)
    torch.sub(logits_NV[:, :vocab_size], peak_N1, out=weights_NV[:, :vocab_size]).exp_()
    weights_NMB = weights_NV.unflatten(1, (blocks, BLOCK))
    in_blocks_ND, in_block_ND = torch.as_tensor(uniform_N2D, device=logits_NV.device).unbind(1)
    block_ND = _first_above(weights_NMB.sum(-1), in_blocks_ND)
    inside_NDB = weights_NMB.gather(1, block_ND[..., None].expand(-1, -1, BLOCK))
    draws_ND = block_ND * BLOCK + _first_above(inside_NDB, in_block_ND[..., None])[..., 0]
    mean_N = logits_NV.gather(1, draws_ND).mean(-1) - logits_NV[:, :vocab_size].logsumexp(-1)
    token_N = logits_NV.gather(1, labels_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
    return Sample(draws_ND.int(), mean_N.clamp_(max=0), token_N.clamp_(max=0))


def _first_above(weights: Tensor, uniform: Tensor) -> Tensor:
    """Along the last dimension, the first whose cumulated weight is above that share of all; its own is never 0."""
    sums = weights.double().cumsum(-1)
    whole = sums[..., -1:]
    below = torch.minimum(uniform * whole, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(sums, below, right=True)
