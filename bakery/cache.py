"""STAGE ONE: prompts -> teacher -> cache directory. Read top to bottom."""

import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

from bakery.batching import plan_batches
from bakery.config import Recipe
from bakery.errors import DataError, RecipeError
from bakery.progress import TeacherProgress
from bakery.prompts.chat import Renderer
from bakery.prompts.reading import Row, prompts_sha, read_prompts
from bakery.prompts.tokenizers import load_tokenizer, template_sha, tokenizer_fingerprint
from bakery.records import Example, Record, content_id
from bakery.shards.manifest import Identity
from bakery.shards.writer import CacheWriter
from bakery.teachers.opening import open_teacher
from bakery.teachers.protocol import Generator, Scorer, Teacher

log = logging.getLogger("bakery")


def cache_teacher(recipe: Recipe, *, extend: bool = False) -> Path:
    """Fill `recipe.cache.out` with the teacher's answers, going on where an earlier run stopped. Returns the directory.

    A complete cache of the same recipe is left as it is and the teacher is asked for nothing; `extend` adds the
    prompts that are new. Raises BakeryError before any teacher time is spent where that can be known.
    """
    config, prompts, cache = (recipe.section(name) for name in ("teacher", "prompts", "cache"))
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    teacher = open_teacher(config, tokenizer, cache.temperatures)
    _check_capability(teacher, recipe)
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
    examples = _examples(rows, Renderer(tokenizer, prefix, generate=recipe.sampling is not None), recipe, teacher)
    given = recipe.model_dump(mode="json", include={"teacher", "prompts", "sampling", "cache"})
    with CacheWriter.open_or_resume(cache.out, identity, given, extend) as writer:
        if writer.complete:
            log.info(
                "%s is complete: %d rows, nothing to ask the teacher for", cache.out, writer.manifest.total("rows")
            )
            return cache.out
        windows = writer.windows(examples)
        todo = sum(len(writer.missing(window.examples)) for window in windows)
        log.info("%s: %d examples, %d to ask %s for", cache.out, len(examples), todo, teacher.info.name)
        with TeacherProgress(todo) as progress:
            for window in windows:
                for batch in _batches(window.examples, teacher, recipe):
                    if asked := writer.missing(batch):
                        records = [_trimmed(r, config.top_mass) for r in _answers(teacher, asked, recipe)]
                        size = writer.add(records)
                        progress.answered(len(records), sum(len(r.topk) for r in records), size)
                writer.publish(window, [_split(example, prompts.validation_fraction) for example in window.examples])
        writer.finish()
    log.info("%s: %d rows, %d targets", cache.out, writer.manifest.total("rows"), writer.manifest.total("targets"))
    return cache.out


def _examples(rows: list[Row], renderer: Renderer, recipe: Recipe, teacher: Teacher) -> list[Example]:
    """Every example to be asked for, once each, all checked before the first question."""
    sampling = recipe.sampling
    room = sampling.max_new_tokens if sampling else 0
    examples: dict[str, Example] = {}
    for row in rows:
        parts = renderer.render(row)
        context = max(len(parts.student_context), len(parts.teacher_context))
        length = context + len(parts.response) + room
        if teacher.max_length is not None and length > teacher.max_length:
            raise DataError(
                f"{row.where}: {context} tokens of context and {len(parts.response) + room} of response, the teacher "
                f"takes {teacher.max_length} together; shorten the row or drop it"
            )
        fields = (parts.student_context, parts.teacher_context, parts.response, parts.is_target)
        for index in range(sampling.n if sampling else 1):
            asked = sampling.model_dump_json(exclude={"n"}) if sampling else "given"
            key = content_id(teacher.info.fingerprint, teacher.info.dtype, asked, index, *fields)
            examples.setdefault(key, Example(key, *fields))
    if repeats := len(rows) * (sampling.n if sampling else 1) - len(examples):
        log.warning("%d rows repeat another row and are asked for once", repeats)
    return list(examples.values())


def _split(example: Example, validation_fraction: float) -> str:
    """By a hash of what the student reads: all answers to a prompt fall on one side, and stay there for ever.

    A context of one token (plain text that is scored) says nothing of the row, so there the text decides.
    """
    prompt = example.student_context
    share = int(content_id("split", prompt, *([example.response] if len(prompt) == 1 else []))[:8], 16) / 2**32
    return "validation" if share < validation_fraction else "train"


def _batches(window: list[Example], teacher: Teacher, recipe: Recipe) -> list[list[Example]]:
    """Planned over the whole window, answered rows too, so that a resumed run forms the batches of an unbroken one."""
    room = recipe.sampling.max_new_tokens if recipe.sampling else 0
    lengths = [len(example.teacher_context) + len(example.response) + room for example in window]
    return [[window[i] for i in batch] for batch in plan_batches(lengths, teacher.tokens_per_batch)]


def _answers(teacher: Any, batch: list[Example], recipe: Recipe) -> list[Record]:
    """Written where the recipe has a `sampling:` section, scored where the data holds the responses."""
    contexts, k = [example.teacher_context for example in batch], recipe.section("teacher").top_k
    if recipe.sampling is None:
        topks = teacher.score(contexts, [e.response for e in batch], [e.is_target for e in batch], k)
        records = [Record(example, topk, "dataset") for example, topk in zip(batch, topks, strict=True)]
    else:
        seed = int(content_id(recipe.sampling.seed, batch[0].id)[:15], 16)
        written = teacher.generate(contexts, recipe.sampling, k, seed)
        records = [
            Record(e.answered(response), topk, "teacher") for e, (response, topk) in zip(batch, written, strict=True)
        ]
    return [record.check(teacher.vocab_size, k) for record in records]


def _check_capability(teacher: Teacher, recipe: Recipe) -> None:
    who = f"the teacher {teacher.info.name} ({teacher.info.backend})"
    if recipe.sampling is not None and not isinstance(teacher, Generator):
        raise RecipeError(f"{who} cannot write responses; give them in the data and leave out `sampling:`")
    if recipe.sampling is None and not isinstance(teacher, Scorer):
        raise RecipeError(f"{who} cannot score given responses; let it write its own with a `sampling:` section")


def _trimmed(record: Record, top_mass: float | None) -> Record:
    return record if top_mass is None else Record(record.example, record.topk.keep_mass(top_mass), record.origin)
