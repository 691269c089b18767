"""The versions of the cache format, and how a manifest of an older one reads in the terms of today's.

A version is read for ever once released. docs/cache-format.md says what each changed.
"""

from typing import Any

FORMAT_VERSION = 2
VERSIONS = (1, 2)


def in_todays_terms(tree: dict[str, Any]) -> dict[str, Any]:
    """A manifest's content with the keys of FORMAT_VERSION; its own version stays in it. Raises ValueError."""
    if tree.get("format_version") != 1 or "logprob_step" not in tree:
        return tree
    if "logprob_step_max" in tree:
        raise ValueError("a logprob_step_max, which version 1 has not")
    return {**tree, "logprob_step_max": tree["logprob_step"]}  # one step everywhere
