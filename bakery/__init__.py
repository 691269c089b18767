"""bakery: distil large language models into small ones, and bake prompts into weights, from cached teacher log-probs.

The public names load on first use, so that `import bakery` costs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bakery import losses
    from bakery.cache import cache_teacher
    from bakery.config import Recipe, load_recipe
    from bakery.distillation import distill
    from bakery.errors import BakeryError
    from bakery.shards.reader import CacheReader

__version__ = "0.1.0"
__all__ = ["BakeryError", "CacheReader", "Recipe", "cache_teacher", "distill", "load_recipe", "losses"]

_HOMES = {
    "BakeryError": "bakery.errors",
    "CacheReader": "bakery.shards.reader",
    "Recipe": "bakery.config",
    "cache_teacher": "bakery.cache",
    "distill": "bakery.distillation",
    "load_recipe": "bakery.config",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("bakery.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'bakery' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
