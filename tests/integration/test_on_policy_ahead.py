"""What on-policy steps ask for while others train, and with which history and prefix."""

from itertools import count
from threading import Event

import numpy as np
from test_on_policy_run import K, run
from test_stage_two import make_cache, prompts, write_jsonl

from bakery.shards.reader import CacheReader
from bakery.student.on_policy_cache import DIRECTORY
from bakery.student.trainer import DistillTrainer
from bakery.teachers.hf import HFTeacher

STEPS = 3


def test_the_teacher_answers_while_the_student_trains(home, student, tiny_model, monkeypatch):
    """The answer to each step but the first is held back until the step before it trains: with a lag of 1 nobody
    waits for anybody; a run that did not go on meanwhile would wait in vain."""
    cache = make_cache(home / "cache", tiny_model, prompts(home / "rows.jsonl"), K)
    trains, calls, in_vain = [Event() for _ in range(STEPS)], count(), []
    score, training_step = HFTeacher.score, DistillTrainer.training_step

    def held_back(teacher, *args):
        step = next(calls)
        if step and not trains[step - 1].wait(30):
            in_vain.append(step)
        return score(teacher, *args)

    def told(trainer, *args, **kwargs):
        trains[trainer.state.global_step].set()
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(HFTeacher, "score", held_back)
    monkeypatch.setattr(DistillTrainer, "training_step", told)
    run(cache, student, home / "ahead", tiny_model, 1.0, lag=1, max_steps=STEPS)
    assert in_vain == []
    assert next(calls) == STEPS


def test_conversations_with_prefixes_of_their_own(home, student, tiny_model):
    rows = []
    for n in range(12):
        turns = [f"q{n}?", f"a{n}.", f"more {n}?", "yes."]
        roles = ["user", "assistant"] * 2
        row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}
        own = {"prefix_messages": [{"role": "system", "content": f"Own {n}."}]} if n % 2 else {}
        rows.append(row | own)
    cache = make_cache(home / "chats", tiny_model, write_jsonl(home / "chats.jsonl", rows), K)
    out = run(cache, student, home / "turns", tiny_model, 1.0, max_steps=4)
    asked = {tuple(r.example.student_context): r.example for r in CacheReader(cache).records()}
    starts, own = set(), set()
    for record in CacheReader(out / DIRECTORY).records():
        student_context, teacher_context = record.example.student_context, record.example.teacher_context
        source = next(e for context, e in asked.items() if tuple(student_context[: len(context)]) == context)
        start = len(student_context) - len(source.student_context)
        np.testing.assert_array_equal(student_context[len(source.student_context) :], source.response[:start])
        np.testing.assert_array_equal(
            teacher_context, np.concatenate([source.teacher_context, source.response[:start]])
        )
        assert not start or (source.is_target[start] and not source.is_target[start - 1])  # a turn begins there
        starts.add(start)
        own.add(len(source.teacher_context) - len(source.student_context))
    assert len(starts) >= 2  # with history and without
    assert len(own) >= 2  # with a prefix of its own and without
