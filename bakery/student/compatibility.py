"""Do this cache, this student and this loss belong together? Asked before anything trains."""

from typing import Any

from bakery.config import LossConfig, Recipe
from bakery.errors import CacheError, DataError, RecipeError
from bakery.models import context_length, load_config
from bakery.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint
from bakery.shards.reader import CacheReader


def check_student(recipe: Recipe, readers: list[CacheReader]) -> None:
    """All that can be told before weights are loaded. Raises CacheError, DataError or RecipeError."""
    config = recipe.section("student")
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    model_config = load_config(config.model_name_or_path, config.revision, config.trust_remote_code)
    for reader in readers:
        check_compatible(reader, tokenizer, model_config, recipe.loss, config.model_name_or_path)
        sampling, fraction = reader.manifest.sampling, recipe.on_policy.fraction
        if sampling and sampling.prompts_alone and fraction < 1:
            raise RecipeError(
                f"cache {reader.path} holds prompts without responses, and on_policy.fraction is {fraction}; set it to "
                f"1, or fill a cache with sampling.max_new_tokens above 0"
            )


def check_compatible(reader: CacheReader, tokenizer: Any, model_config: Any, loss: LossConfig, student: str) -> None:
    """Raises CacheError, DataError or RecipeError with both values and the cure."""
    manifest = reader.manifest
    if manifest.total("targets"):  # prompts alone fit any loss
        check_support(f"cache {reader.path}", manifest.draws, loss.support)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != manifest.tokenizer_fingerprint:
        raise CacheError(
            f"cache {reader.path} was made with tokenizer {manifest.tokenizer_fingerprint[:12]}…, the student "
            f"{student} has {fingerprint[:12]}…; pass --student with the same tokenizer or re-run cache-teacher"
        )
    rows = model_config.get_text_config().vocab_size
    if rows < manifest.vocab_size:
        raise CacheError(
            f"cache {reader.path} holds ids up to {manifest.vocab_size - 1}, the student {student} has an output of "
            f"{rows} rows; pass --student with the whole vocabulary"
        )
    whole = not manifest.draws and manifest.top_mass is None and manifest.k == rows
    exact = whole or loss.support == "renormalized" or loss.temperature == 1
    if not exact and loss.temperature not in manifest.temperatures:
        raise RecipeError(
            f"loss.temperature is {loss.temperature}, cache {reader.path} lists "
            f"{list(manifest.temperatures) or 'none'} beside 1; list it under cache.temperatures "
            f"and re-run cache-teacher, or use loss.support renormalized"
        )
    limit = context_length(model_config)
    for split in reader.splits:
        longest = int(reader.lengths(split).max())
        if limit is not None and longest > limit:
            raise DataError(
                f"cache {reader.path}: a row of {split} has {longest} tokens, the student {student} takes {limit}; "
                f"leave such rows out of the prompts"
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
