"""On-policy steps: the student answers the prompts of a step, the teacher is asked about the student's own tokens.

A step's samples are drawn from the student as it is when they are asked for; the teacher answers in a thread of its
own, while the student trains on other steps. Gu 2024 (MiniLLM), Agarwal 2024 (GKD).
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import TeacherError
from bakery.records import Example, Record, content_id
from bakery.student.on_policy_cache import OnPolicyCache
from bakery.student.sampling import sample_responses
from bakery.teachers.asking import answer_batch, ask_all, plan_calls
from bakery.teachers.protocol import Scorer

TOTALS = ("rows", "tokens", "truncated", "sampling_seconds", "teacher_seconds", "teacher_calls", "waited_seconds")


def is_on_policy(step: int, fraction: float) -> bool:
    """Steps spread evenly: among the first n, ⌊n · fraction⌋ are on-policy."""
    return int((step + 1) * fraction + 1e-9) > int(step * fraction + 1e-9)


def prompt_of(record: Record, key: str, seed: int, room: int, limit: int | None) -> Example:
    """A row's prompt without an answer: of its target turns one, drawn by `seed`, with all that stands before it.

    Turns too late for `room` tokens of response within `limit` are not drawn.
    """
    example = record.example
    first = example.is_target & ~np.concatenate([[False], example.is_target[:-1]])
    longest = max(len(example.student_context), len(example.teacher_context))
    turns = [at for at in np.flatnonzero(first) if limit is None or longest + at + room <= limit]
    start = int(turns[seed % len(turns)]) if turns else 0
    history = example.response[:start]
    student, teacher = (np.concatenate([c, history]) for c in (example.student_context, example.teacher_context))
    return Example(key, student, teacher, example.response[:0], example.is_target[:0])


@dataclass
class Asked:
    """A step that is under way: its rows' ids, and the records to come."""

    keys: list[str]
    answers: Future[list[Record]]


class OnPolicy:
    """The teacher, who must be open, and once entered the cache of its answers. `key` tells this run from others,
    `limit` is the tokens that both models take, `rows_per_step` the most rows of a step."""

    def __init__(
        self,
        teacher: Scorer,
        config: TeacherConfig,
        sampling: SamplingConfig,
        open_cache: Callable[[], OnPolicyCache],
        *,
        end_ids: list[int],
        limit: int | None,
        key: str,
        rows_per_step: int,
        in_background: bool,
    ) -> None:
        self.teacher, self.config, self.sampling = teacher, config, sampling
        self.open_cache = open_cache
        self.end_ids, self.limit, self.key = end_ids, limit, key
        self.rows_per_step = rows_per_step
        self.in_background = in_background  # not where the teacher's weights are the student's own
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="on-policy")
        # All there from the start: the teacher's thread adds to them while others go through them.
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.published_steps = 0

    def begin(self, step: int, rows: list[Record], model: Any) -> Asked:
        """Sample what is not on record yet, now; the teacher is asked in the background."""
        keys = [content_id(self.key, step, place) for place in range(len(rows))]
        room = self.sampling.max_new_tokens
        # By place alone, so that runs that differ in their teacher or loss sample alike.
        seeds = {key: int(content_id(self.sampling.seed, step, i)[:15], 16) for i, key in enumerate(keys)}
        asked = [prompt_of(row, key, seeds[key], room, self.limit) for row, key in zip(rows, keys, strict=True)]
        # All or none: what is drawn for a row depends on its batch, and a run may have been broken off amid a step.
        new = [] if all(key in self.cache for key in keys) else asked
        start = time.perf_counter()
        responses = sample_responses(
            model,
            [example.student_context for example in new],
            self.sampling,
            self.end_ids,
            self.cache.vocab_size,
            [seeds[example.id] for example in new],
        )
        answered = [example.answered(response) for example, response in zip(new, responses, strict=True)]
        self.totals["rows"] += len(new)
        self.totals["tokens"] += sum(map(len, responses))
        self.totals["truncated"] += sum(int(response[-1]) not in self.end_ids for response in responses)
        self.totals["sampling_seconds"] += time.perf_counter() - start
        job = self.pool.submit(self._score, answered, keys)
        if not self.in_background:
            wait([job])
        return Asked(keys, job)

    def result(self, asked: Asked) -> list[Record]:
        """The records of a step, once the teacher has answered. Raises TeacherError when it did not."""
        start = time.perf_counter()
        records = asked.answers.result()
        self.totals["waited_seconds"] += time.perf_counter() - start
        return records

    def measures(self, since: dict[str, float]) -> dict[str, float]:
        """What was sampled and scored since the totals stood at `since`, for the log."""
        new = {name: value - since.get(name, 0.0) for name, value in self.totals.items()}
        if not new["rows"]:
            return {}
        return {
            "on_policy/response_tokens": new["tokens"] / new["rows"],
            "on_policy/truncated": new["truncated"] / new["rows"],
            "on_policy/student_tokens_per_second": new["tokens"] / new["sampling_seconds"],
            "on_policy/teacher_seconds": new["teacher_seconds"] / max(new["teacher_calls"], 1),
            "on_policy/waited_seconds": new["waited_seconds"],
        }

    def _score(self, examples: list[Example], keys: list[str]) -> list[Record]:
        """All of a step, as the cache gives them back. Raises TeacherError when one stays without an answer, once the
        others are written down."""
        start, lost = time.perf_counter(), []
        ask = partial(answer_batch, self.teacher, config=self.config, sampling=None)
        # Planned over the whole step, answered rows too, as an unbroken run would.
        plan = plan_calls(self.teacher, examples, sampling=None)
        calls = [[example for example in call if example.id not in self.cache] for call in plan]
        for answers in ask_all(ask, filter(None, calls), self.teacher.calls_in_flight):
            records = [replace(answer, origin="student") for _, answer in answers if isinstance(answer, Record)]
            if records:
                self.cache.add(records)
            lost += [answer for _, answer in answers if isinstance(answer, TeacherError)]
        if lost:
            raise lost[0]
        self.totals["teacher_seconds"] += time.perf_counter() - start
        self.totals["teacher_calls"] += bool(examples)
        return [record for key in keys if (record := self.cache.find(key))]

    def publish(self, steps: int) -> None:
        """What the first `steps` steps were trained on becomes a shard."""
        numbers = range(self.published_steps, steps)
        keys = [content_id(self.key, step, place) for step in numbers for place in range(self.rows_per_step)]
        self.cache.publish(keys)
        self.published_steps = steps

    def finish(self, steps: int) -> None:
        """The cache of all `steps` steps is complete."""
        self.publish(steps)
        self.cache.finish()

    def __enter__(self) -> Self:
        self.cache = self.open_cache()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.teacher.close()
        self.cache.__exit__(kind, error, trace)
