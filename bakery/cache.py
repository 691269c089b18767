"""STAGE ONE: prompts -> teacher -> cache directory. Read top to bottom."""

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

from bakery.config import Recipe
from bakery.devices import device_errors
from bakery.errors import RecipeError, TeacherError
from bakery.progress import TeacherProgress
from bakery.prompts.chat import Renderer
from bakery.prompts.examples import Asked, build_examples
from bakery.prompts.reading import prompts_sha, read_prompts
from bakery.prompts.tokenizers import load_tokenizer, template_sha, tokenizer_fingerprint
from bakery.records import Record
from bakery.shards.manifest import Identity
from bakery.shards.reader import CacheReader
from bakery.shards.reuse import reusable
from bakery.shards.writer import CacheWriter
from bakery.teachers.asking import Ask, answer_batch, ask_all, check_capability, plan_calls, prompts_alone
from bakery.teachers.opening import open_teacher
from bakery.teachers.protocol import Teacher

log = logging.getLogger("bakery")
Part = tuple[int, int]  # index, of how many
ROWS_AT_A_TIME = 256  # that are taken over from another cache: a journal's batch is in memory as a whole


@dataclass(frozen=True)
class Stage:
    """All that is known before the teacher is opened: who it is, what it will be asked, what the cache will be."""

    teacher: Teacher
    asked: Asked
    identity: Identity


def prepare(recipe: Recipe, part: Part | None = None) -> Stage:
    """Read and check everything that costs nothing. Raises BakeryError."""
    config, prompts, cache = (recipe.section(name) for name in ("teacher", "prompts", "cache"))
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    teacher = open_teacher(config, tokenizer, cache.temperatures)
    prefix = prompts.prefix.as_messages() if prompts.prefix else []
    rows = read_prompts(prompts.path, prompts.split)
    renderer = Renderer(
        tokenizer,
        prefix,
        generate=recipe.sampling is not None,
        retained=prompts.student_retained_turns,
        roles=prompts.target_roles,
        pattern=prompts.target_content_pattern,
    )
    asked = build_examples(rows, renderer, recipe.sampling, teacher.info, teacher.max_length)
    identity = Identity.of(
        config,
        cache.logprob_steps,
        vocab_size=teacher.vocab_size,
        temperatures=cache.temperatures,
        teacher=teacher.info,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_sha=template_sha(tokenizer),
        prefix_sha=sha256(json.dumps(prefix).encode()).hexdigest(),
        prompts_sha=prompts_sha(rows),
        turns_sha=renderer.turns_sha,
        sampling=recipe.sampling,
        validation_fraction=prompts.validation_fraction,
        rows_per_shard=cache.rows_per_shard,
        part=part,
    )
    return Stage(teacher, asked, identity)


@device_errors("take a larger device, or a smaller teacher.dtype")
def cache_teacher(
    recipe: Recipe, *, extend: bool = False, reuse: Sequence[Path] = (), part: Part | None = None
) -> Path:
    """Fill `recipe.cache.out` with the teacher's answers, going on where an earlier run stopped. Returns the directory.

    A complete cache of the same recipe is left as it is and the teacher is asked for nothing. `extend` adds the prompts
    that are new; what another cache in `reuse` already answers is taken over. `part` (i, n) fills every n-th window,
    in the directory `<out>-<i>-of-<n>`; bakery.shards.merge joins the parts. Raises BakeryError before any teacher time
    is spent where that can be known.
    """
    out = recipe.section("cache").out
    if part is not None and out.name in ("", ".."):
        raise RecipeError(f"cache.out is {out}, which gives its parts no name; name a directory")
    stage = prepare(recipe, part)
    if part is not None:
        _check_part(part, stage, extend)
        out = out.with_name(f"{out.name}-{part[0]}-of-{part[1]}")
    given = recipe.model_dump(mode="json", include={"teacher", "prompts", "sampling", "cache"})
    with CacheWriter.open_or_resume(out, stage.identity, given, extend) as writer:
        if writer.complete:
            log.info("%s is complete: %d rows, nothing to ask for", out, writer.manifest.total("rows"))
            return out
        for path in reuse:
            _take_over(writer, CacheReader(path), stage)
        if lost := _fill(writer, stage, recipe):
            first = next(iter(lost.values()))
            raise TeacherError(
                f"{len(lost)} of {len(stage.asked.examples)} examples are unanswered (the first: {first}); what was "
                f"answered is kept in {out}, run the same command again to ask for the rest"
            )
        writer.finish()
    log.info("%s: %d rows, %d targets", out, writer.manifest.total("rows"), writer.manifest.total("targets"))
    return out


def _check_part(part: Part, stage: Stage, extend: bool) -> None:
    if extend:
        raise RecipeError("--extend is for a whole cache: merge the parts, then extend what they give")
    windows = -(-len(stage.asked.examples) // stage.identity.rows_per_shard)
    if part[1] > windows:
        raise RecipeError(
            f"{part[1]} parts of {windows} windows ({len(stage.asked.examples)} examples, cache.rows_per_shard "
            f"{stage.identity.rows_per_shard}): lower --num-shards or rows_per_shard"
        )


def _take_over(writer: CacheWriter, other: CacheReader, stage: Stage) -> None:
    wanted = {e.id for window in writer.windows(stage.asked.examples) for e in writer.missing(window.examples)}
    known = stage.identity
    found, taken = reusable(other, known, wanted), 0
    while records := list(islice(found, ROWS_AT_A_TIME)):
        writer.add([record.check(known.vocab_size, draws=known.draws) for record in records])
        taken += len(records)
    log.info("%d rows taken over from %s", taken, other.path)


def _fill(writer: CacheWriter, stage: Stage, recipe: Recipe) -> dict[str, TeacherError]:
    """Ask for all that no shard and no journal holds; returns the ids that stayed unanswered, with the reason."""
    teacher, windows = stage.teacher, writer.windows(stage.asked.examples)
    todo = sum(len(writer.missing(window.examples)) for window in windows)
    log.info("%s: %d examples, %d to ask %s for", writer.out, len(stage.asked.examples), todo, teacher.info.name)
    lost: dict[str, TeacherError] = {}
    config, conversations = recipe.section("teacher"), stage.asked.conversations
    ask: Ask = prompts_alone
    to_open = todo > 0 and not (recipe.sampling and recipe.sampling.prompts_alone)
    with closing(teacher.open() if to_open else teacher) as teacher, TeacherProgress(todo) as progress:
        if to_open:
            check_capability(teacher, recipe.sampling)
            ask = partial(answer_batch, teacher, config=config, sampling=recipe.sampling, conversations=conversations)
        for window in windows:
            # Planned over the whole window, answered rows too: a resumed run forms the batches of an unbroken one.
            calls = plan_calls(teacher, window.examples, recipe.sampling)
            batches = [writer.missing(call) for call in calls]
            for answers in ask_all(ask, filter(None, batches), teacher.calls_in_flight):
                records = [answer for _, answer in answers if isinstance(answer, Record)]
                for example, answer in answers:
                    if isinstance(answer, TeacherError):
                        lost[example.id] = TeacherError(
                            f"{stage.asked.places[example.id]} (example {example.id}): {answer}"
                        )
                        log.warning("unanswered: %s", lost[example.id])
                if records:
                    size = writer.add(records)
                    progress.answered(len(records), sum(len(record.topk) for record in records), size)
            if not writer.missing(window.examples):
                fraction = writer.manifest.validation_fraction
                writer.publish(window, [stage.asked.split_of(example, fraction) for example in window.examples])
    return lost
