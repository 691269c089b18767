"""What `import bakery` costs: in a process of its own, since this one has loaded everything."""

import subprocess
import sys

import pytest


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


HEAVY = "torch transformers peft accelerate datasets pyarrow matplotlib pandas"


@pytest.mark.parametrize("module", ["bakery", "bakery.cli", "bakery.records"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in '{HEAVY}'.split() if m in sys.modules])"
    assert python(code) == ""


def test_public_names_are_their_homes_even_where_modules_were_imported_first():
    """A submodule never hides a function of its own name: the flow is bakery.distillation, the function distill."""
    code = """
import bakery, bakery.cache, bakery.config, bakery.distillation, bakery.errors, bakery.losses, bakery.shards.reader
homes = {
    "BakeryError": bakery.errors, "CacheReader": bakery.shards.reader, "Recipe": bakery.config,
    "cache_teacher": bakery.cache, "distill": bakery.distillation, "load_recipe": bakery.config,
}
assert all(getattr(bakery, name) is getattr(home, name) for name, home in homes.items())
print(sorted(bakery.__all__) == sorted([*homes, "losses"]), callable(bakery.distill), callable(bakery.cache_teacher))
try:
    bakery.no_such_name
except AttributeError as error:
    print(error)
"""
    assert python(code).split("\n") == [
        "True True True",
        "module 'bakery' has no attribute 'no_such_name'",
    ]
