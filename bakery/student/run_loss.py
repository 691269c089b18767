"""The mean loss of a whole run: transformers' own begins anew where a run goes on, so the sum is in each checkpoint."""

from math import isfinite
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class RunLoss(TrainerCallback, ExportableState):
    """The Trainer adds what each micro-batch gives to the loss of its optimizer step."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float | None = 0.0  # on the loss's device, so that adding waits for nothing

    def add(self, loss: torch.Tensor) -> None:
        if self.total is not None:
            self.total = self.total + loss.detach().to(torch.float32 if loss.device.type == "mps" else torch.float64)

    def mean(self, steps: int) -> float | None:
        """Nats a target, over optimizer steps; None where there were none, one of them was no number, or the first of
        them are not known."""
        total = float("nan") if self.total is None else float(self.total)
        return total / steps if steps and isfinite(total) else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.total = kept.get("total", None if state.global_step else 0.0)  # None: of a checkpoint that has no sum
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the Trainer's next save looks for it

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": None if self.total is None else float(self.total)}}
