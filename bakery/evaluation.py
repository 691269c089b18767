"""Every checkpoint of a run against the held-out rows: a strength of baking to choose, between nothing and all."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from bakery.config import Recipe
from bakery.devices import device_errors
from bakery.distillation import open_caches
from bakery.errors import CacheError, DataError, OutputError
from bakery.reports.evaluate import Measures, evaluate
from bakery.student.arguments import training_arguments
from bakery.student.compatibility import check_student
from bakery.student.dataset import held_out
from bakery.student.model import load_student, load_trained
from bakery.student.run_directory import checkpoints, output_directory

log = logging.getLogger("bakery")


@dataclass(frozen=True)
class Judged:
    path: str  # "" for the student before any training
    step: int
    measures: Measures
    baked: float | None  # 1 - KL / KL before: 0 is the student as it was, 1 is the teacher; None if it was the teacher

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@device_errors("take a larger device, or --device cpu")
def evaluate_run(recipe: Recipe, device: str | None = None) -> list[Judged]:
    """The student before training, then each checkpoint of `training.output_dir`, then the finished model.

    One that is damaged is passed over with a warning. Raises OutputError where none is left, CacheError without
    held-out rows.
    """
    config = recipe.section("student")
    out = output_directory(recipe)
    found = checkpoints(out)
    if not found:
        raise OutputError(f"{out} holds no checkpoint and no finished model; train it with a save_strategy")
    readers = [reader for reader, _ in open_caches(recipe)]
    check_student(recipe, readers)
    heldout = held_out(readers, recipe.loss.temperature)
    if not heldout.targets:
        raise CacheError("no held-out rows with responses; set prompts.validation_fraction and fill the cache again")
    args = training_arguments(recipe.training, out, device)
    model = load_student(config, args.device.type)
    judged = [Judged("", 0, evaluate(model, heldout, args.bf16), 0.0)]
    for step, path in found:
        try:
            model = load_trained(model, config, path)
        except DataError as error:
            log.warning("%s; it is passed over", error)
            continue
        measures = evaluate(model, heldout, args.bf16)
        before = judged[0].measures["kl"]
        judged.append(Judged(str(path), step, measures, 1 - measures["kl"] / before if before else None))
    if len(judged) == 1:
        raise OutputError(f"{out} holds no checkpoint that loads; train it again with --overwrite")
    return judged
