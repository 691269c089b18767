"""What a model's own `generate` samples from, step by step."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bakery.teachers.distributions import Keep, Rows


class Capture(LogitsProcessor):
    """Sees the raw logits of every step before temperature and top-p, and keeps a little of them."""

    def __init__(self, keep: Keep, vocab_size: int) -> None:
        self.keep, self.vocab_size = keep, vocab_size
        self.steps: list[Rows] = []
        self.pending: Tensor | None = None  # logits whose sampled token is known only at the next step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finish(input_ids)
        self.pending = scores
        if scores.shape[1] == self.vocab_size:
            return scores
        padding = torch.arange(scores.shape[1], device=scores.device) >= self.vocab_size
        return scores.masked_fill(padding, float("-inf"))  # an id that is no token is never sampled

    def finish(self, input_ids: Tensor) -> list[Any]:
        if self.pending is not None:  # sampled from by now, so that it may be overwritten
            self.steps.append(self.keep(self.pending, input_ids[:, -1], range(len(input_ids))))
        self.pending = None
        return self.steps
