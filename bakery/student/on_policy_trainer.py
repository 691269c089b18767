"""The Trainer with on-policy steps among those from the cache, prepared up to `lag` steps ahead."""

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from bakery.config import OnPolicyConfig
from bakery.errors import TeacherError
from bakery.records import Record
from bakery.stopping import stopping
from bakery.student.collate import Batch, collate
from bakery.student.on_policy import Asked, OnPolicy, is_on_policy
from bakery.student.trainer import DistillTrainer


@dataclass
class _Step:
    micro_batches: list[list[Record]]  # as the cache holds them
    asked: Asked | None  # None: they are what is trained on


class OnPolicyTrainer(DistillTrainer):
    """A step is on-policy as a whole: all of its prompts are answered by the student. What is ahead never crosses the
    end of an epoch."""

    def __init__(self, *args: Any, on_policy: OnPolicy, config: OnPolicyConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_policy, self.config = on_policy, config
        self._source: Iterator | None = None
        self._ahead: deque[_Step] = deque()
        self._kind = "off_policy"
        self._loss_sums: dict[str, torch.Tensor | float] = {}
        self._targets: Counter[str] = Counter()
        self._logged: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader:
        """Of records: whether a step is trained on as it stands is not known to the loader."""
        kept, self.data_collator = self.data_collator, cast(Any, list)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = kept

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of the next optimizer step and the number of their targets, counted when they are final.

        A teacher that is gone ends the run at a checkpoint: TeacherError.
        """
        try:
            batches = self._next_batches(epoch_iterator)
        except TeacherError as error:
            step = self.state.global_step
            if step:
                self._save_checkpoint(self.model, trial=None)
            where = "the run stands at a checkpoint" if step else "no step was made yet"
            raise TeacherError(
                f"on-policy step {step} stays unanswered ({error}); {where}, go on with --resume"
            ) from error
        return batches, self._get_num_items_in_batch(batches, device)

    def _next_batches(self, epoch_iterator: Iterator) -> list[Batch]:
        if epoch_iterator is not self._source:
            self._source, self._ahead = epoch_iterator, deque()
        step = self.state.global_step
        while len(self._ahead) <= self.config.lag and step + len(self._ahead) < self.state.max_steps:
            rows = list(islice(epoch_iterator, self.args.gradient_accumulation_steps))
            if not rows:
                break
            self._ahead.append(self._begin(step + len(self._ahead), rows))
        if not self._ahead:
            return []
        ready = self._ahead.popleft()
        self._kind = "on_policy" if ready.asked else "off_policy"
        if ready.asked is None:
            return [collate(rows) for rows in ready.micro_batches]
        answers = iter(self.on_policy.result(ready.asked))
        return [collate(list(islice(answers, len(rows)))) for rows in ready.micro_batches]

    def _begin(self, step: int, micro_batches: list[list[Record]]) -> _Step:
        if not is_on_policy(step, self.config.fraction):
            return _Step(micro_batches, None)
        with self.compute_loss_context_manager():
            rows = [row for rows in micro_batches for row in rows]
            return _Step(micro_batches, self.on_policy.begin(step, rows, self.model))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            mean = (found[0] if return_outputs else found).detach()
            targets = len(inputs["labels"])
            total = mean * (targets if num_items_in_batch is None else num_items_in_batch)
            self._loss_sums[self._kind] = self._loss_sums.get(self._kind, 0.0) + total
            self._targets[self._kind] += targets
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.on_policy:
            trained = super().train(*args, **kwargs)
            if not stopping():  # what was sampled ahead is still to be trained on
                self.on_policy.finish(self.state.global_step)
        return trained

    def summary(self) -> dict[str, float]:
        return {**super().summary(), **self.on_policy.measures({})}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss of all steps: that of each kind, and what the student wrote since the last time."""
        if "loss" in logs:
            logs |= {f"{kind}/loss": float(total) / self._targets[kind] for kind, total in self._loss_sums.items()}
            logs |= self.on_policy.measures(self._logged)
            self._loss_sums, self._targets, self._logged = {}, Counter(), dict(self.on_policy.totals)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint holds no sample that is under way, so its answer is on disk before; what has been trained on
        becomes a shard behind it."""
        wait([step.asked.answers for step in self._ahead if step.asked])
        super()._save_checkpoint(model, trial)
        self.on_policy.publish(self.state.global_step)
