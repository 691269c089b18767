"""Logits over the full vocabulary -> the little that is stored of them.

Legend: N targets, K support, V vocabulary, T temperatures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bakery.records import TopK

BLOCK = 64  # columns
WORTH_BLOCKS = 500  # columns for each entry of the top-k; with fewer, torch.topk over all of them is as fast


@dataclass(frozen=True)
class Summary:
    """Rows of a TopK as tensors, still on the teacher's device."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    token_N: Tensor
    log_norm_NT: Tensor

    @staticmethod
    def joined(parts: "list[Summary]") -> "Summary":
        return Summary(*(torch.cat([getattr(p, f) for p in parts]) for f in Summary.__dataclass_fields__))

    def rows(self, select: Any) -> "Summary":
        return Summary(*(getattr(self, f)[select] for f in Summary.__dataclass_fields__))

    def copy_begun(self) -> "Callable[[], Summary]":
        """Begins the way to the CPU; called, the result waits for that alone, while a GPU goes on with what follows."""
        on_gpu = self.tail_N.is_cuda
        copy = Summary(*(getattr(self, f).to("cpu", non_blocking=on_gpu) for f in Summary.__dataclass_fields__))
        arrived = torch.cuda.current_stream(self.tail_N.device).record_event() if on_gpu else None

        def wait() -> Summary:
            if arrived is not None:
                arrived.synchronize()
            return copy

        return wait

    def to_topk(self) -> TopK:
        return TopK.from_rows(*(getattr(self, f).numpy() for f in Summary.__dataclass_fields__))


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
