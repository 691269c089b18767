"""Which steps are on-policy, and what is asked there."""

import pytest
from builders import random_record
from hypothesis import given
from hypothesis import strategies as st

from bakery.student.on_policy import is_on_policy, prompt_of


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0, []), (1, [0, 1, 2, 3, 4, 5, 6, 7]), (0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.1, [])]
)
def test_steps_by_hand(fraction, steps):
    assert [step for step in range(8) if is_on_policy(step, fraction)] == steps


@given(st.integers(0, 100), st.integers(1, 1000))
def test_the_share_is_exact_at_any_time(percent, steps):
    assert sum(is_on_policy(step, percent / 100) for step in range(steps)) == steps * percent // 100


def test_a_single_turn_is_asked_with_its_own_contexts():
    row = random_record("r", context=4, response=6, teacher_context=[9, 8, 7, 6, 5, 4])
    for seed in range(4):
        asked = prompt_of(row, "key", seed, room=10, limit=None)
        assert asked.id == "key"
        assert asked.student_context.tolist() == row.example.student_context.tolist()
        assert asked.teacher_context.tolist() == [9, 8, 7, 6, 5, 4]
        assert len(asked.response) == 0


def conversation():
    """Turns at 0, 4 and 8 of the response; between them what the user says."""
    mask = [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    return random_record("r", context=3, response=10, is_target=mask, teacher_context=[50, 51, 52, 53])


def test_of_several_turns_each_is_drawn_with_all_that_stands_before_it():
    row, seen = conversation(), set()
    for seed in range(64):
        asked = prompt_of(row, "key", seed, room=10, limit=None)
        start = len(asked.student_context) - 3
        seen.add(start)
        history = row.example.response[:start].tolist()
        assert asked.student_context.tolist() == row.example.student_context.tolist() + history
        assert asked.teacher_context.tolist() == [50, 51, 52, 53, *history]
    assert seen == {0, 4, 8}


def test_turns_that_leave_no_room_are_not_drawn():
    """4 tokens of teacher context, 4 of history, 10 of room: 18 fit in 18, and the turn at 8 does not."""
    starts = {len(prompt_of(conversation(), "key", seed, room=10, limit=18).student_context) - 3 for seed in range(64)}
    assert starts == {0, 4}
