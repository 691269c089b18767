"""A thin transformers.Trainer: the loss over cached distributions, and nothing else."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from bakery.config import LossConfig
from bakery.errors import RecipeError
from bakery.losses import sparse_loss
from bakery.models import logits_at
from bakery.progress import Progress
from bakery.student.collate import Batch, collate
from bakery.student.model import bare


def target_losses(model: Any, batch: Batch, loss: LossConfig, head_of: Any = None) -> Tensor:
    """Nats per target [N]: the recipe's divergence plus `cross_entropy_weight` times the label's cross-entropy."""
    logits_NV = logits_at(model, batch["input_ids"], batch["attention_mask"], batch["target_index"], head_of)
    loss_N = sparse_loss(
        logits_NV,
        batch["topk_ids"],
        batch["topk_logprobs"],
        batch["labels"],
        tail_logprob_N=batch["tail_logprob"],
        log_norm_N=batch.get("log_norm"),
        support=loss.support,
        divergence=loss.divergence,
        beta=loss.beta,
        alpha=loss.alpha,
        temperature=loss.temperature,
    )
    if loss.cross_entropy_weight:
        loss_N = loss_N + loss.cross_entropy_weight * cross_entropy(
            logits_NV.float(), batch["labels"], reduction="none"
        )
    return loss_N


class DistillTrainer(Trainer):
    """Sums the loss over targets and divides by the number of targets of the whole optimizer step, on all devices:
    how a batch is split into micro-batches or over devices never changes a gradient."""

    # 5.24 on: what compute_loss gives is divided by the step's targets already.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: LossConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        # Ask the Trainer to count labels over the accumulated step, all of them: ours are targets, not shifted rows.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss_N = target_losses(model, inputs, self.loss, head_of=bare(self.accelerator.unwrap_model(model)))
        total = len(loss_N) if num_items_in_batch is None else num_items_in_batch
        loss = loss_N.sum() / total
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices
        return (loss, {"loss_N": loss_N}) if return_outputs else loss

    def last_losses(self) -> dict[str, float]:
        """The mean loss of the run and of its last logging step, nats a target."""
        history = self.state.log_history
        means = [entry["train_loss"] for entry in history if "train_loss" in entry]
        steps = [entry["loss"] for entry in history if "loss" in entry]
        return {**({"loss": means[-1]} if means else {}), **({"last_loss": steps[-1]} if steps else {})}


class TrainingProgress(TrainerCallback):
    """Steps on stderr, in bakery's own manner."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note = ""
        self.progress = Progress("student", state.max_steps - state.global_step, "steps")
        self.progress.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(1, self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.__exit__(None, None, None)


def new_trainer(model: Any, args: Any, train: Any, heldout: Any, loss: LossConfig) -> DistillTrainer:
    """Raises RecipeError where transformers refuses the arguments once it sees the data."""
    try:
        trainer = DistillTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=heldout if len(heldout) else None,
            data_collator=collate,
            loss=loss,
            callbacks=[TrainingProgress()],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {(str(error).splitlines() or [''])[0]}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # TrainingProgress speaks instead
    return trainer
