"""What differs between two trees of plain values, to tell a user what changed."""

from typing import Any

Changes = dict[str, tuple[Any, Any]]  # dotted name -> (value there, value here)


def changes(here: dict[str, Any], there: dict[str, Any]) -> Changes:
    mine, theirs = _flat(here), _flat(there)
    names = dict.fromkeys([*mine, *theirs])
    return {name: (theirs.get(name), mine.get(name)) for name in names if mine.get(name) != theirs.get(name)}


def told(changed: Changes) -> str:
    return "; ".join(f"{name}: {there!r} there, {here!r} here" for name, (there, here) in changed.items())


def _flat(tree: dict[str, Any], ahead: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{ahead}{key}.") if isinstance(value, dict) else {f"{ahead}{key}": value}
    return flat
