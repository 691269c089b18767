"""A batch that does not fit into memory is asked for in halves, and the answers are those of an untroubled teacher."""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from builders import random_record

from bakery.errors import TeacherError
from bakery.records import Record
from bakery.teachers.asking import ask_all, in_memory

TOO_MUCH = 10**15
FULL = {
    # The first is what CUDA's allocator raises; the others really are refused by this machine's.
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total …"),
    "torch": lambda: torch.empty(TOO_MUCH),
    "numpy": lambda: np.zeros(TOO_MUCH),
}
RECORDS = {f"r{n}": random_record(f"r{n}", seed=n, context=2 + n) for n in range(11)}
EXAMPLES = [record.example for record in RECORDS.values()]


@pytest.fixture(autouse=True)
def _a_small_heap_to_collect():
    """Each halving collects garbage, and the objects of a whole test session take a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def teacher(room, kind="torch", calls=None):
    """`ask` with memory for `room` tokens of context and response."""

    def ask(batch):
        if calls is not None:
            calls.append(len(batch))
        if sum(len(e.teacher_context) + len(e.response) for e in batch) > room:
            error = FULL[kind]()
            raise error
        return [RECORDS[e.id] for e in batch]

    return ask


@pytest.mark.parametrize("kind", FULL)
def test_halves_until_it_fits(kind):
    calls = []
    # row n takes 2 + n + 6 tokens: 143 in all, 8 to 12 in the first five, 13 to 18 in the last six
    answers = in_memory(teacher(40, kind, calls), EXAMPLES)
    assert answers == list(RECORDS.values())
    assert calls == [11, 5, 2, 3, 6, 3, 1, 2, 3, 1, 2]


def test_a_row_that_never_fits_is_an_error_in_its_place(caplog):
    answers = in_memory(teacher(16), EXAMPLES)
    assert [isinstance(answer, Record) for answer in answers] == [True] * 9 + [False] * 2
    assert isinstance(answers[10], TeacherError)
    assert str(answers[10]).startswith("18 tokens do not fit into memory ([enforce fail at alloc_cpu.cpp")
    with caplog.at_level(logging.WARNING, "bakery"):
        flow = [pair for answered in ask_all(teacher(16), [EXAMPLES[:5], EXAMPLES[5:]], 1) for pair in answered]
    assert {example.id for example, answer in flow if isinstance(answer, TeacherError)} == {"r9", "r10"}
    assert {example.id: answer for example, answer in flow if isinstance(answer, Record)} == {
        key: RECORDS[key] for key in list(RECORDS)[:9]
    }
    assert "5 rows at a time do not fit into memory" in caplog.text


def test_the_tensors_of_the_failed_call_are_gone_before_the_next():
    held = []

    def ask(batch):
        gc.collect()
        assert not [ref for ref in held if ref() is not None]
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if len(batch) > 1:
            torch.empty(TOO_MUCH)
        return [RECORDS[e.id] for e in batch]

    assert in_memory(ask, EXAMPLES[:4]) == list(RECORDS.values())[:4]
    assert len(held) == 1 + 2 + 4


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_what_less_work_does_not_cure_is_not_halved(error):
    calls = []

    def ask(batch):
        calls.append(batch)
        raise error

    with pytest.raises(type(error), match=str(error)):
        in_memory(ask, EXAMPLES)
    assert len(calls) == 1
