"""Passages of Python's documentation, scored by SmolLM2-135M into a cache: what the benchmarks train and measure on."""

import json
from collections.abc import Sequence
from pathlib import Path

import bakery
from bakery.config import Recipe
from bakery.shards.reader import CacheReader

MODEL = Path(__file__).parents[1] / "models/smollm2-135m-instruct"


def write_prompts(path: Path, rows: int, characters: int) -> Path:
    """`rows` passages, 60 characters of each the prompt of the rest."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    pieces = [text[i * characters : (i + 1) * characters] for i in range(rows)]
    path.write_text("".join(json.dumps({"prompt": p[:60], "response": p[60:]}) + "\n" for p in pieces))
    return path


def make_cache(prompts: Path, teacher: dict, reuse: Sequence[Path] = (), **cache) -> CacheReader:
    """By the teacher on a CPU in float32, unless told otherwise."""
    tree = {
        "teacher": {"model_name_or_path": str(MODEL), "dtype": "float32", "device": "cpu", **teacher},
        "prompts": {"path": str(prompts)},
        "cache": cache,
    }
    return CacheReader(bakery.cache_teacher(Recipe.model_validate(tree), reuse=reuse))
