"""Do this cache, this student and this loss belong together? Asked before anything trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bakery.config import LossConfig, Recipe
from bakery.errors import CacheError, DataError, RecipeError
from bakery.models import context_length, load_config
from bakery.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint
from bakery.shards.reader import CacheReader
from bakery.teachers.opening import open_teacher


@dataclass(frozen=True)
class Contents:
    """What a cache holds, or will hold once the recipe's teacher has filled it."""

    path: Path
    tokenizer_fingerprint: str
    vocab_size: int
    k: int
    draws: int | None
    top_mass: float | None
    temperatures: tuple[float, ...]
    prompts_alone: bool

    @classmethod
    def of(cls, reader: CacheReader) -> Self:
        known = reader.manifest
        same = (known.tokenizer_fingerprint, known.vocab_size, known.k, known.draws, known.top_mass, known.temperatures)
        return cls(reader.path, *same, known.sampling is not None and known.sampling.prompts_alone)

    @classmethod
    def to_come(cls, recipe: Recipe) -> Self:
        """Of the recipe's own stage one; no weights are loaded, no server is asked. Raises RecipeError."""
        teacher, cache, sampling = recipe.section("teacher"), recipe.section("cache"), recipe.sampling
        tokenizer = load_tokenizer(teacher.model_name_or_path, teacher.revision, teacher.trust_remote_code)
        vocab_size = open_teacher(teacher, tokenizer, cache.temperatures).vocab_size
        kind = (vocab_size, teacher.entries, teacher.draws, teacher.top_mass, cache.temperatures)
        return cls(cache.out, tokenizer_fingerprint(tokenizer), *kind, sampling is not None and sampling.prompts_alone)


def check_student(recipe: Recipe, readers: list[CacheReader]) -> None:
    """All that can be told before weights are loaded. Raises CacheError, DataError or RecipeError."""
    limit = context_length(check_contents(recipe, [Contents.of(reader) for reader in readers]))
    for reader in readers:
        for split in reader.splits:
            longest = int(reader.lengths(split).max())
            if limit is not None and longest > limit:
                raise DataError(
                    f"cache {reader.path}: a row of {split} has {longest} tokens, the student "
                    f"{recipe.section('student').model_name_or_path} takes {limit}; leave such rows out of the prompts"
                )


def check_contents(recipe: Recipe, caches: list[Contents]) -> Any:
    """The student's config, if it and the loss go with all of these. Raises CacheError or RecipeError."""
    config, fraction = recipe.section("student"), recipe.on_policy.fraction
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    model_config = load_config(config.model_name_or_path, config.revision, config.trust_remote_code)
    fingerprint, rows = tokenizer_fingerprint(tokenizer), model_config.get_text_config().vocab_size
    for cache in caches:
        check_vocabulary(cache, fingerprint, rows, config.model_name_or_path)
        if not cache.prompts_alone:  # they fit any loss
            check_loss(cache, recipe.loss, rows)
        elif fraction < 1:
            raise RecipeError(
                f"cache {cache.path} holds prompts without responses, and on_policy.fraction is {fraction}; set it to "
                f"1, or fill a cache with sampling.max_new_tokens above 0"
            )
    return model_config


def check_vocabulary(cache: Contents, fingerprint: str, rows: int, student: str) -> None:
    """`rows` are those of the student's output. Raises CacheError with both values and the cure."""
    if fingerprint != cache.tokenizer_fingerprint:
        raise CacheError(
            f"cache {cache.path} is made with tokenizer {cache.tokenizer_fingerprint[:12]}…, the student {student} has "
            f"{fingerprint[:12]}…; pass --student with the same tokenizer or re-run cache-teacher"
        )
    if rows < cache.vocab_size:
        raise CacheError(
            f"cache {cache.path} holds ids up to {cache.vocab_size - 1}, the student {student} has an output of "
            f"{rows} rows; pass --student with the whole vocabulary"
        )


def check_loss(cache: Contents, loss: LossConfig, rows: int) -> None:
    """Raises RecipeError where the loss wants of the teacher what such a cache does not hold."""
    check_support(f"cache {cache.path}", cache.draws, loss.support)
    whole = not cache.draws and cache.top_mass is None and cache.k == rows
    exact = whole or loss.support == "renormalized" or loss.temperature == 1
    if not exact and loss.temperature not in cache.temperatures:
        raise RecipeError(
            f"loss.temperature is {loss.temperature}, cache {cache.path} lists "
            f"{list(cache.temperatures) or 'none'} beside 1; list it under cache.temperatures "
            f"and re-run cache-teacher, or use loss.support renormalized"
        )


def check_support(who: str, draws: int | None, support: str) -> None:
    """Raises RecipeError where draws meet a loss for top-k, or the other way round; `draws` is None of a top-k."""
    if draws and support != "sampled":
        raise RecipeError(f"{who} gives samples of {draws} draws, loss.support is {support}; set loss.support=sampled")
    if not draws and support == "sampled":
        raise RecipeError(
            f"{who} gives the most likely tokens, loss.support is sampled, which wants draws; choose another "
            "loss.support, or fill a cache with teacher.support=sampled"
        )
