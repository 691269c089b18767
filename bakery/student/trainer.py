"""A thin transformers.Trainer: the loss over cached distributions, and nothing else."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from bakery.config import LossConfig
from bakery.errors import RecipeError, first_line
from bakery.progress import Progress
from bakery.stopping import stopping
from bakery.student.batch_loss import BatchLoss
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.model import bare
from bakery.student.order import WindowedOrder
from bakery.student.run_directory import is_whole
from bakery.student.run_loss import RunLoss


class DistillTrainer(Trainer):
    """Sums the loss over targets and divides by the number of targets of the whole optimizer step: how a batch is split
    into micro-batches never changes a gradient."""

    # 5.24 on: what compute_loss gives is divided by the step's targets already.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: LossConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_loss = BatchLoss(loss)
        # Ask the Trainer to count labels over the accumulated step, all of them: ours are targets, not shifted rows.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._judged = [0.0, 0.0]  # in an evaluation: nats, and the targets that they are of
        self.add_callback(RunLoss())
        self.progress = TrainingProgress()
        self.add_callback(self.progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.progress.shown:  # transformers tells callbacks of no end that is an error
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inner = bare(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        loss, loss_N = self.batch_loss(model, inputs, head_of=inner)
        if not model.training:
            self._judged[0] += float(loss)
            self._judged[1] += len(loss_N)
        loss = loss / (len(loss_N) if num_items_in_batch is None else num_items_in_batch)
        if model.training:
            self._run_loss.add(loss)
        return (loss, {"loss_N": loss_N}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows of a cache in windows; by length inside them where `train_sampling_strategy` is group_by_length."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(rows, CacheDataset) or strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return WindowedOrder(rows, seed, self._train_batch_size if strategy == "group_by_length" else None)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is the mean over targets; transformers' own is a mean over rows of their batch's mean."""
        self._judged = [0.0, 0.0]
        output: Any = super().evaluation_loop(*args, **kwargs)
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = self._judged[0] / self._judged[1]
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """One that is whole is not written again: a kill would leave a mixture under a state that is there already."""
        there = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not is_whole(there):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads; what is published holds none.
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    @property
    def _run_loss(self) -> RunLoss:
        """Looked for each time, as transformers may put another in its place when it goes on from a checkpoint."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RunLoss))

    def summary(self) -> dict[str, float]:
        """The mean loss of all steps of the run, and of those that were logged last, nats a target."""
        mean = self._run_loss.mean(self.state.global_step)
        logged = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return {**({} if mean is None else {"loss": mean}), **({"last_loss": logged[-1]} if logged else {})}


class TrainingProgress(TrainerCallback):
    """Steps on stderr, in bakery's own manner, until `shown` ends."""

    def __init__(self) -> None:
        self.shown = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note = ""
        self.progress = self.shown.enter_context(Progress("student", state.max_steps - state.global_step, "steps"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(1, self.note)


class StopWhenTold(TrainerCallback):
    """After a signal: this step is the last, and a checkpoint of it is kept."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stopping():
            control.should_save = control.should_training_stop = True


def new_trainer(
    model: Any,
    args: Any,
    train: Any,
    heldout: Any,
    loss: LossConfig,
    kind: Callable[..., DistillTrainer] = DistillTrainer,
) -> DistillTrainer:
    """`kind` is the class of it. Raises RecipeError where transformers refuses the arguments once it sees the data."""
    try:
        trainer = kind(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=heldout if heldout.targets else None,
            data_collator=collate,
            loss=loss,
            callbacks=[StopWhenTold()],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {first_line(error)}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # TrainingProgress speaks instead
    return trainer
