"""Messages quote what strangers wrote: keys of recipes, names in manifests, a server's words."""

import pickle

import pytest

from bakery.errors import CacheError, RecipeError, first_line
from bakery.shards.validate import Problem


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred\r", r"\x1b[31mred\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("plain, größer, 雪, \\n", "plain, größer, 雪, \\n"),
    ],
)
def test_a_message_is_one_printable_line(quoted, said):
    assert str(RecipeError(f"unknown key `{quoted}`")) == f"unknown key `{said}`"
    assert str(Problem(quoted, 3, "gone")) == f"{said}, row 3: gone"


def test_an_error_passes_between_processes_unchanged():
    error = pickle.loads(pickle.dumps(CacheError("a\nb")))
    assert type(error) is CacheError
    assert str(error) == r"a\nb"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  what\nand why"), "what"),
        (ValueError("\n\nwhat"), "what"),
        (ValueError(), "ValueError"),
        (OSError("   "), "OSError"),
    ],
)
def test_the_first_line_of_a_library(error, line):
    assert first_line(error) == line
