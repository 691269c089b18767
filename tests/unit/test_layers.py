"""Imports run one way. Read from the source, so that an import inside a function counts too."""

import ast
import re

import pytest
from conftest import ROOT

# Each module may import its own layer and those above it in this list.
LAYERS = [
    {"errors", "recipe_files", "recipe_secrets", "files", "stopping", "trees", "losses"},
    {
        "records",
        "config",
        "sections",
        "prompt_sections",
        "old_names",
        "migration",
        "models",
        "heads",
        "generation",
        "devices",
        "batching",
        "progress",
    },
    {"prompts", "teachers", "shards"},
    {"student"},
    {"reports"},
    {"cache", "distillation", "estimate", "evaluation"},
    {"commands"},
    {"cli"},
]
STRANGERS = [("cache", "distillation"), ("teachers", "shards")]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted((ROOT / "bakery").rglob("*.py"))
LONGEST = 250


def room(path):
    """bakery/losses/supports.py -> losses"""
    return path.relative_to(ROOT / "bakery").parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a module imports from anywhere in it, and the lines."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        found |= {(name.split(".")[1], node.lineno) for name in names if name.startswith("bakery.")}
    return found


INNER = [path for path in MODULES if path.name != "__init__.py" or path.parent.name != "bakery"]


def test_every_room_has_its_layer():
    assert {room(path) for path in INNER} == set(DEPTH)


@pytest.mark.parametrize("path", INNER, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    up = [(other, line) for other, line in imported(path) if other in DEPTH and DEPTH[other] > DEPTH[room(path)]]
    assert not up, f"{path}: {up}"


@pytest.mark.parametrize("pair", STRANGERS)
def test_strangers_stay_strangers(pair):
    """The cache directory is the only contract between the stages, and a teacher knows no disk."""
    for one, other in (pair, pair[::-1]):
        met = [(str(path), line) for path in INNER if room(path) == one for to, line in imported(path) if to == other]
        assert not met


def test_the_reader_of_imports_finds_them():
    """The tests above cannot pass by finding nothing."""
    distillation = {other for other, _ in imported(ROOT / "bakery/distillation.py")}
    assert {"config", "errors", "shards", "student", "reports"} <= distillation
    assert "cache" in {other for other, _ in imported(ROOT / "bakery/commands/caching.py")}  # inside a function


def test_chat_templates_are_applied_in_one_place():
    users = [str(p.relative_to(ROOT)) for p in MODULES if "apply_chat_template" in p.read_text(encoding="utf-8")]
    assert users == ["bakery/prompts/chat.py"]


def test_the_shift_by_one_is_in_one_place():
    """Whoever turns targets into positions asks records.predicting_positions."""
    shifts = [p.name for p in MODULES if re.search(r"flatnonzero\([^)]*\)+ - 1", p.read_text(encoding="utf-8"))]
    assert shifts == ["records.py"]
    users = {room(p) for p in MODULES if "predicting_positions" in p.read_text(encoding="utf-8")}
    assert {"records", "teachers", "student"} <= users


def test_heavy_libraries_stay_out_of_the_light_rooms():
    heavy = {"torch", "transformers", "peft", "accelerate"}
    light = {"errors", "recipe_files", "recipe_secrets", "records", "batching", "progress", "commands", "cli"}
    for path in (path for path in INNER if room(path) in light):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & heavy, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
