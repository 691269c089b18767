"""STAGE TWO: cache directories -> a trained student with its report. Read top to bottom."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from bakery.config import Recipe
from bakery.devices import device_errors
from bakery.errors import CacheError
from bakery.files import disk_errors
from bakery.models import weights_fingerprint
from bakery.prompts.tokenizers import load_tokenizer
from bakery.reports.artifacts import write_artifacts
from bakery.reports.evaluate import evaluate
from bakery.reports.model_card import model_card, run_facts
from bakery.reports.samples import answer_length, chosen, side_by_side
from bakery.shards.reader import CacheReader
from bakery.stopping import finishing
from bakery.student.arguments import training_arguments
from bakery.student.compatibility import Contents, check_contents, check_student
from bakery.student.dataset import CacheDataset, held_out
from bakery.student.model import load_student
from bakery.student.on_policy_opening import open_on_policy
from bakery.student.on_policy_trainer import OnPolicyTrainer
from bakery.student.run_directory import (
    begin_run,
    check_finished,
    check_run,
    checkpoint_errors,
    finish_run,
    is_finished,
    last_checkpoint,
    run_identity,
)
from bakery.student.sampling import write_answers
from bakery.student.trainer import DistillTrainer, new_trainer

log = logging.getLogger("bakery")


@device_errors(
    "lower training.per_device_train_batch_size and raise training.gradient_accumulation_steps as much, which changes "
    "no gradient, and start again with --overwrite"
)
def distill(recipe: Recipe, *, device: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train `recipe.student` on the recipe's caches; returns `training.output_dir`.

    `device` is "cuda", "cpu" or None for the best there is. `resume` goes on from the last checkpoint, to the weights
    that an unbroken run reaches; `overwrite` replaces the run that is there. Raises BakeryError before training where
    caches, student and loss do not belong together.
    """
    with disk_errors(recipe.training.get("output_dir")), ExitStack() as held:
        return _distill(recipe, device, resume, overwrite, held)


def _distill(recipe: Recipe, device: str | None, resume: bool, overwrite: bool, held: ExitStack) -> Path:
    """`held` keeps until the end what is to be given back then: the run's directory, the teacher beside the student."""
    clock = _Clock()
    config = recipe.section("student")
    out = check_run(recipe, resume, overwrite)
    if is_finished(out) and not overwrite:
        check_finished(out, recipe)
        log.info("%s is a finished run, nothing to do", out)
        return out
    caches = open_caches(recipe)
    args = training_arguments(recipe.training, out, device)
    check_student(recipe, [reader for reader, _ in caches])
    train = CacheDataset(caches, "train", recipe.loss.temperature, args.seed)
    heldout = held_out([reader for reader, _ in caches], recipe.loss.temperature)
    if not len(train):
        raise CacheError(
            f"no rows to train on in {', '.join(str(r.path) for r, _ in caches)}; lower validation_fraction"
        )
    checksums = {str(reader.path): reader.verify() for reader, _ in caches}
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    set_seed(args.seed)  # LoRA's first weights are drawn before the Trainer seeds anything
    model = load_student(config, args.device.type)
    identity = run_identity(recipe, weights_fingerprint(config.model_name_or_path, config.revision), checksums)
    kind: Callable[..., DistillTrainer] = DistillTrainer
    if recipe.on_policy.fraction:
        on_policy = open_on_policy(recipe, [reader for reader, _ in caches], model, tokenizer, args, identity, held)
        kind = partial(OnPolicyTrainer, on_policy=on_policy, config=recipe.on_policy)
    trainer = new_trainer(model, args, train, heldout, recipe.loss, kind)
    held.enter_context(begin_run(out, identity, overwrite))
    log.info("training on %d rows, %d held out", len(train), len(heldout))
    clock.lap("load")

    shown = chosen(heldout)
    room = answer_length(shown, recipe.on_policy.max_new_tokens)

    def judged(when: str) -> tuple[Any, list[str]]:
        measures = evaluate(model, heldout, args.bf16) if heldout.targets else None
        written = write_answers(model, tokenizer, [record.example.student_context for record in shown], room)
        clock.lap(when)
        return measures, written

    before, first_answers = judged("before")
    checkpoint = last_checkpoint(out) if resume else None
    with finishing(), checkpoint_errors(checkpoint):  # a signal lets the step end, and a checkpoint of it
        trainer.train(resume_from_checkpoint=checkpoint)
    clock.lap("train")
    after, last_answers = judged("after")

    metrics = {
        "heldout": {"before": before, "after": after, "rows": len(heldout), "targets": heldout.targets}
        if before
        else {},
        "train": {"steps": trainer.state.global_step, "rows": len(train), **trainer.summary()},
        "seconds": clock.laps,
    }
    trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    facts = run_facts(recipe, caches)
    write_artifacts(
        out,
        card=model_card(recipe, facts, metrics),
        facts=facts,
        metrics=metrics,
        samples=side_by_side(shown, first_answers, last_answers, tokenizer),
        log=trainer.state.log_history,
        loss=recipe.loss.divergence,
    )
    finish_run(out, metrics)
    return out


def check_before_teacher(recipe: Recipe, device: str | None, resume: bool, overwrite: bool) -> None:
    """What stage two would refuse whatever the prompts are, so that a teacher's time is not spent for it."""
    training_arguments(recipe.training, check_run(recipe, resume, overwrite), device)
    check_contents(recipe, [] if recipe.caches else [Contents.to_come(recipe)])


def open_caches(recipe: Recipe) -> list[tuple[CacheReader, float]]:
    """The caches the recipe lists, or the one that its stage one fills."""
    if recipe.caches:
        return [(CacheReader(source.path), source.weight) for source in recipe.caches]
    return [(CacheReader(recipe.section("cache").out), 1.0)]


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now
