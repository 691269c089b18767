"""STAGE ONE: prompts -> teacher -> cache directory. Read top to bottom."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from bakery.batching import plan_batches
from bakery.config import Recipe, TeacherConfig
from bakery.errors import RecipeError, TeacherError
from bakery.progress import TeacherProgress
from bakery.prompts.chat import Renderer
from bakery.prompts.examples import build_examples, split_of
from bakery.prompts.reading import prompts_sha, read_prompts
from bakery.prompts.tokenizers import load_tokenizer, template_sha, tokenizer_fingerprint
from bakery.records import Example, Origin, Record, TopK, content_id
from bakery.shards.manifest import Identity
from bakery.shards.reader import CacheReader
from bakery.shards.reuse import reusable
from bakery.shards.writer import CacheWriter
from bakery.teachers.asking import Answer, ask_all
from bakery.teachers.opening import open_teacher
from bakery.teachers.protocol import Generator, Scorer, Teacher

log = logging.getLogger("bakery")


def cache_teacher(recipe: Recipe, *, extend: bool = False, reuse: Sequence[Path] = ()) -> Path:
    """Fill `recipe.cache.out` with the teacher's answers, going on where an earlier run stopped. Returns the directory.

    A complete cache of the same recipe is left as it is and the teacher is asked for nothing. `extend` adds the prompts
    that are new; what another cache in `reuse` already answers is taken over. Raises BakeryError before any teacher
    time is spent where that can be known.
    """
    config, prompts, cache = (recipe.section(name) for name in ("teacher", "prompts", "cache"))
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    teacher = open_teacher(config, tokenizer, cache.temperatures)
    prefix = prompts.prefix.as_messages() if prompts.prefix else []
    rows = read_prompts(prompts.path, prompts.split)
    identity = Identity(
        k=config.top_k,
        top_mass=config.top_mass,
        vocab_size=teacher.vocab_size,
        logprob_step=cache.logprob_step,
        temperatures=cache.temperatures,
        teacher=teacher.info,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_sha=template_sha(tokenizer),
        prefix_sha=sha256(json.dumps(prefix).encode()).hexdigest(),
        prompts_sha=prompts_sha(rows),
        sampling=recipe.sampling,
        validation_fraction=prompts.validation_fraction,
        rows_per_shard=cache.rows_per_shard,
    )
    renderer = Renderer(tokenizer, prefix, generate=recipe.sampling is not None)
    examples = build_examples(rows, renderer, recipe.sampling, teacher.info, teacher.max_length)
    given = recipe.model_dump(mode="json", include={"teacher", "prompts", "sampling", "cache"})
    with CacheWriter.open_or_resume(cache.out, identity, given, extend) as writer:
        if writer.complete:
            log.info("%s is complete: %d rows, nothing to ask for", cache.out, writer.manifest.total("rows"))
            return cache.out
        for path in reuse:
            _take_over(writer, CacheReader(path), identity, examples)
        if lost := _fill(writer, examples, teacher, recipe):
            first = next(iter(lost.values()))
            raise TeacherError(
                f"{len(lost)} of {len(examples)} examples are unanswered (the first: {first}); what was answered is "
                f"kept in {cache.out}, run the same command again to ask for the rest"
            )
        writer.finish()
    log.info("%s: %d rows, %d targets", cache.out, writer.manifest.total("rows"), writer.manifest.total("targets"))
    return cache.out


def _take_over(writer: CacheWriter, other: CacheReader, identity: Identity, examples: list[Example]) -> None:
    wanted = {example.id for window in writer.windows(examples) for example in writer.missing(window.examples)}
    taken = list(reusable(other, identity, wanted))
    if taken:
        writer.add(taken)
    log.info("%d rows taken over from %s", len(taken), other.path)


def _fill(writer: CacheWriter, examples: list[Example], teacher: Teacher, recipe: Recipe) -> dict[str, TeacherError]:
    """Ask for all that no shard and no journal holds; returns the ids that stayed unanswered, with the reason."""
    windows = writer.windows(examples)
    todo = sum(len(writer.missing(window.examples)) for window in windows)
    if todo:
        teacher = teacher.open()
        _check_capability(teacher, recipe)
    log.info("%s: %d examples, %d to ask %s for", writer.out, len(examples), todo, teacher.info.name)
    lost: dict[str, TeacherError] = {}
    ask = partial(_answers, teacher, recipe=recipe)
    with TeacherProgress(todo) as progress:
        for window in windows:
            batches = [writer.missing(batch) for batch in _batches(window.examples, teacher, recipe)]
            for answers in ask_all(ask, filter(None, batches), teacher.calls_in_flight):
                records = [answer for _, answer in answers if isinstance(answer, Record)]
                for example, answer in answers:
                    if isinstance(answer, TeacherError):
                        lost[example.id] = answer
                        log.warning("unanswered: example %s: %s", example.id, answer)
                if records:
                    size = writer.add(records)
                    progress.answered(len(records), sum(len(record.topk) for record in records), size)
            if not writer.missing(window.examples):
                fraction = writer.manifest.validation_fraction
                writer.publish(window, [split_of(example, fraction) for example in window.examples])
    return lost


def _batches(window: list[Example], teacher: Teacher, recipe: Recipe) -> list[list[Example]]:
    """Planned over the whole window, answered rows too, so that a resumed run forms the batches of an unbroken one."""
    room = recipe.sampling.max_new_tokens if recipe.sampling else 0
    lengths = [len(example.teacher_context) + len(example.response) + room for example in window]
    rows = teacher.rows_per_call("score" if recipe.sampling is None else "generate")
    return [[window[i] for i in batch] for batch in plan_batches(lengths, teacher.tokens_per_batch, rows)]


def _answers(teacher: Any, batch: list[Example], recipe: Recipe) -> list[Answer]:
    """Written where the recipe has a `sampling:` section, scored where the data holds the responses."""
    config, sampling = recipe.section("teacher"), recipe.sampling
    contexts, k = [example.teacher_context for example in batch], config.top_k
    pairs: Iterable[tuple[Example, TopK]]
    if sampling is None:
        topks = teacher.score(contexts, [e.response for e in batch], [e.is_target for e in batch], k)
        pairs = zip(batch, topks, strict=True)
    else:
        seeds = [int(content_id(sampling.seed, example.id)[:15], 16) for example in batch]
        written = zip(batch, teacher.generate(contexts, sampling, k, seeds), strict=True)
        pairs = [(example.answered(response), topk) for example, (response, topk) in written]
    origin: Origin = "dataset" if sampling is None else "teacher"
    return [_checked(example, topk, origin, teacher.vocab_size, config) for example, topk in pairs]


def _checked(example: Example, topk: TopK, origin: Origin, vocab_size: int, config: TeacherConfig) -> Answer:
    try:
        record = Record(example, topk, origin).check(vocab_size, config.top_k)
    except TeacherError as error:
        return error
    return record if config.top_mass is None else replace(record, topk=record.topk.keep_mass(config.top_mass))


def _check_capability(teacher: Teacher, recipe: Recipe) -> None:
    who = f"the teacher {teacher.info.name} ({teacher.info.backend})"
    if recipe.sampling is not None and not isinstance(teacher, Generator):
        raise RecipeError(f"{who} cannot write responses; give them in the data and leave out `sampling:`")
    if recipe.sampling is None and not isinstance(teacher, Scorer):
        raise RecipeError(f"{who} cannot score given responses; let it write its own with a `sampling:` section")
