"""The text of a recipe: YAML in, a tree of plain values out, and `section.key=value` set into it.

A recipe may be somebody else's, so it is bounded: in bytes, in depth, in the digits of a number, and without aliases,
of which a few lines unfold to gigabytes.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from bakery.errors import RecipeError, first_line

MOST_BYTES = 1 << 18
DEEPEST = 16
LONGEST_NUMBER = 64


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-4 as a number (YAML 1.1 makes it a string) and refuses a key given twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("an alias; write the value out", event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refused(f"nested more than {DEEPEST} deep", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise _refused("a key is a word", key_node)
            if key_node.value in seen:
                raise _refused(f"the key `{key_node.value:.60}` stands twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """JSON writes a character outside of the basic plane as two halves; YAML leaves them so."""
        return str(self.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16")

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > LONGEST_NUMBER:
            raise _refused(f"a number of {len(node.value)} characters", node)
        is_float = node.tag.endswith(":float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


def _refused(what: str, where: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, where.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.construct_number)


def read_recipe(path: Path) -> str:
    """Raises RecipeError for a file that is missing, no text, or longer than a recipe can be."""
    try:
        text = bounded_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    if text is None:
        raise RecipeError(f"the recipe {path} has more than {MOST_BYTES:,} bytes; a long prefix goes into a file")
    return text


def bounded_text(path: Path, most: int) -> str | None:
    """None for a file of more than `most` bytes, of which no more is read. Raises OSError, UnicodeDecodeError."""
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    return data.decode("utf-8") if len(data) <= most else None


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value` to the tree, making the mappings on the way."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: expected section.key=value")
    *parents, last = key.strip().split(".")
    if len(parents) > DEEPEST:
        raise RecipeError(f"--set {key[:60]}…: nested more than {DEEPEST} deep")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = parse_yaml(value, f"--set {key}")
