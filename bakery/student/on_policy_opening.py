"""recipe.on_policy -> the teacher beside the student and the cache of its answers, checked before anything trains."""

import json
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from bakery.config import Recipe, SamplingConfig
from bakery.errors import CacheError, DataError
from bakery.generation import end_ids
from bakery.models import context_length
from bakery.prompts.tokenizers import load_tokenizer, template_sha, tokenizer_fingerprint
from bakery.records import content_id
from bakery.shards.manifest import Identity
from bakery.shards.reader import CacheReader
from bakery.student.compatibility import check_support
from bakery.student.model import bare
from bakery.student.on_policy import OnPolicy
from bakery.student.on_policy_cache import OnPolicyCache
from bakery.teachers.asking import check_capability
from bakery.teachers.opening import open_beside
from bakery.teachers.protocol import Scorer


def open_on_policy(
    recipe: Recipe,
    readers: list[CacheReader],
    model: Any,
    tokenizer: Any,
    args: Any,
    run: dict[str, Any],
    held: ExitStack,
) -> OnPolicy:
    """`args` are the TrainingArguments, `run` is the identity of the run; the teacher is closed with `held`. Nothing is
    written yet.

    Raises RecipeError for a teacher that cannot score, or not in the way that the loss reads, CacheError for one of
    another tokenizer than the caches', DataError for rows too long to be answered.
    """
    config, wanted, cache = recipe.section("teacher"), recipe.on_policy, recipe.cache
    check_support("the teacher of on_policy", config.draws, recipe.loss.support)
    known = readers[0].manifest
    steps = cache.logprob_steps if cache else (known.logprob_step, known.logprob_step_max)
    teacher_tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    _check_tokenizer(readers, tokenizer_fingerprint(teacher_tokenizer), config.model_name_or_path)
    temperatures = () if recipe.loss.temperature == 1 else (recipe.loss.temperature,)
    teacher, in_background = open_beside(config, teacher_tokenizer, temperatures, model)
    held.callback(teacher.close)
    check_capability(teacher, None)
    assert isinstance(teacher, Scorer)
    limits = {"student": context_length(model.config), "teacher": teacher.max_length}
    _check_lengths(readers, limits, wanted.max_new_tokens)
    sampling = SamplingConfig(
        temperature=wanted.temperature, top_p=wanted.top_p, max_new_tokens=wanted.max_new_tokens, seed=args.seed
    )
    identity = Identity.of(
        config,
        steps,
        vocab_size=teacher.vocab_size,
        temperatures=temperatures,
        teacher=teacher.info,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_sha=template_sha(tokenizer),
        **{name: _of_all(readers, name) for name in ("prefix_sha", "prompts_sha", "turns_sha")},
        sampling=sampling,
        validation_fraction=0.0,
        rows_per_shard=known.rows_per_shard,
    )
    given = recipe.model_dump(mode="json", include={"teacher", "student", "on_policy"})
    return OnPolicy(
        teacher,
        config,
        sampling,
        partial(OnPolicyCache, Path(args.output_dir), identity, given),
        end_ids=end_ids(bare(model), tokenizer.eos_token_id),
        limit=min((limit for limit in limits.values() if limit is not None), default=None),
        key=content_id("on-policy", json.dumps(run, sort_keys=True)),
        rows_per_step=args.train_batch_size * args.gradient_accumulation_steps,
        in_background=in_background,
    )


def _check_tokenizer(readers: list[CacheReader], fingerprint: str, teacher: str) -> None:
    for reader in readers:
        if fingerprint != (theirs := reader.manifest.tokenizer_fingerprint):
            raise CacheError(
                f"cache {reader.path} was made with tokenizer {theirs[:12]}…, the teacher {teacher} has "
                f"{fingerprint[:12]}…; name a teacher with the same tokenizer, or set on_policy.fraction=0"
            )


def _check_lengths(readers: list[CacheReader], limits: dict[str, int | None], room: int) -> None:
    for reader in readers:
        for who, limit in limits.items():
            longest = int(reader.lengths("train", f"{who}_context").max()) if "train" in reader.splits else 0
            if limit is not None and longest + room > limit:
                raise DataError(
                    f"cache {reader.path}: a context of {longest} tokens and on_policy.max_new_tokens of {room}, the "
                    f"{who} takes {limit} together; lower max_new_tokens or leave such rows out"
                )


def _of_all(readers: list[CacheReader], name: str) -> str | None:
    """One source's own; of several, a hash of theirs, unless none has any."""
    values = [getattr(reader.manifest, name) for reader in readers]
    if len(values) == 1 or not any(values):
        return values[0]
    return sha256("".join(value or "-" for value in values).encode()).hexdigest()
