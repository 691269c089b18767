"""Logits over the full vocabulary -> the little that is stored of them.

Legend: N targets, K support, V vocabulary, T temperatures.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bakery.records import TopK


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

    def on_cpu(self) -> "Summary":
        return Summary(*(getattr(self, f).cpu() for f in Summary.__dataclass_fields__))

    def to_topk(self) -> TopK:
        return TopK.from_rows(*(getattr(self, f).numpy() for f in Summary.__dataclass_fields__))


def summarize(logits_NV: Tensor, labels_N: Tensor, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> Summary:
    """Top-k of the log-softmax at temperature 1, the exact log of the rest, the label's log-prob, and for each
    temperature log Σ exp(logprob / T) over the full vocabulary. Nats.

    `vocab_size` keeps a padded output's rows (ids that are no tokens) out of the support; they count in the tail.
    """
    logits_NV = logits_NV.float()
    lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
    top = logits_NV[:, :vocab_size].topk(k)
    norms = [logits_NV.div(t).logsumexp(-1) - lse_N1[:, 0] / t for t in temperatures]
    token_N = logits_NV.gather(1, labels_N[:, None]) - lse_N1
    rest_N = logits_NV.scatter(1, top.indices, float("-inf")).logsumexp(-1)
    return Summary(
        top.indices,
        (top.values - lse_N1).clamp_(max=0),
        (rest_N - lse_N1[:, 0]).clamp_(max=0),
        token_N[:, 0].clamp_(max=0),
        torch.stack(norms, 1) if norms else logits_NV.new_zeros((len(logits_NV), 0)),
    )
