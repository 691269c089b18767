"""Keys in a recipe: it is copied into every cache and run that it makes, so a key belongs into the environment."""

import re
from typing import Any

from bakery.errors import RecipeError

SECRET_NAME = re.compile(r"(^|[_-])(key|api-?key|token|secret|passwo?r?d|credentials?|authorization)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"(Bearer\s+\S{8,}|(sk|pk|rk|nvapi|xox[a-z])-[\w.-]{12,}|(hf|gsk|gh[a-z]|github_pat|r8)_\w{12,}|AKIA\w{12,}|AIza[\w-]{20,})"
)
# Bounded, so that a long text costs a time that grows with its length alone.
SECRET_IN_URL = re.compile(
    r"://([^/\s]{0,200}:[^/\s]{0,200}@|\S{0,500}[?&]([\w-]{0,50}(key|token)|sig|signature|password)=[^&\s]{8})",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def refuse_secrets(tree: Any, name: str = "") -> None:
    """Raises RecipeError for a text that is a key, by its name or by its looks; the message never holds it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            refuse_secrets(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            refuse_secrets(value, name)
    elif isinstance(tree, str) and tree.strip():
        last = name.rpartition(".")[2]
        if last == "key_env":
            if not VARIABLE.fullmatch(tree) or SECRET_VALUE.fullmatch(tree):
                raise RecipeError(f"`{name}` is the name of an environment variable, never the key itself; {_CURE}")
        elif SECRET_NAME.search(last) or SECRET_VALUE.fullmatch(tree.strip()) or SECRET_IN_URL.search(tree):
            raise RecipeError(f"`{name}` holds a key, and recipes are copied into caches and runs; {_CURE}")


_CURE = "put it into the environment (teacher.api.key_env names the variable, the hub's is HF_TOKEN)"
