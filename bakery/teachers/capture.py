"""What a model's own `generate` samples from, step by step."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bakery.teachers.distributions import Summary, summarize


class Capture(LogitsProcessor):
    """Sees the raw logits of every step before temperature and top-p, and keeps a summary of them."""

    def __init__(self, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> None:
        self.settings = (k, vocab_size, temperatures)
        self.steps: list[Summary] = []
        self.pending: Tensor | None = None  # logits whose sampled token is known only at the next step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finish(input_ids)
        self.pending = scores
        vocab_size = self.settings[1]
        if scores.shape[1] == vocab_size:
            return scores
        padding = torch.arange(scores.shape[1], device=scores.device) >= vocab_size
        return scores.masked_fill(padding, float("-inf"))  # an id that is no token is never sampled

    def finish(self, input_ids: Tensor) -> list[Summary]:
        if self.pending is not None:  # sampled from by now, so that it may be overwritten
            self.steps.append(summarize(self.pending, input_ids[:, -1], *self.settings))
        self.pending = None
        return self.steps
