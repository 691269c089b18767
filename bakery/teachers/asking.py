"""Examples to a teacher, records back: a batch at a time, as many calls at a time as it takes, failures beside them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import RecipeError, TeacherError
from bakery.records import Example, Origin, Record, TopK, content_id
from bakery.teachers.protocol import ChatGenerator, Generator, Scorer, Teacher

Answer = Record | TeacherError


def ask_all(
    ask: Callable[[list[Example]], list[Answer]], batches: Iterable[list[Example]], calls_in_flight: int
) -> Iterator[list[tuple[Example, Answer]]]:
    """Each example with its record, or with the TeacherError that lost it, a batch at a time in order of completion.

    `ask` raises a TeacherError when a whole call failed, and gives one in place of a record that is no answer; either
    way the examples concerned are asked for once more, each by itself. Any other error ends the flow. While answers
    are written down the next calls are under way.
    """
    waiting = deque(batches)
    again: set[str] = set()
    running: dict[Future[list[Answer]], list[Example]] = {}
    with ThreadPoolExecutor(calls_in_flight, thread_name_prefix="teacher") as pool:
        try:
            while waiting or running:
                while waiting and len(running) <= calls_in_flight:
                    batch = waiting.popleft()
                    running[pool.submit(ask, batch)] = batch
                # What has been answered is handed on before an error that ends the flow.
                for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=_ends_the_flow):
                    batch = running.pop(future)
                    pairs = list(zip(batch, _outcome(future, len(batch)), strict=True))
                    retried = [e for e, answer in pairs if isinstance(answer, TeacherError) and e.id not in again]
                    again.update(example.id for example in retried)
                    waiting.extend([example] for example in retried)
                    yield [(example, answer) for example, answer in pairs if example.id not in {e.id for e in retried}]
        finally:
            pool.shutdown(cancel_futures=True)


def _ends_the_flow(future: Future[list[Answer]]) -> bool:
    error = future.exception()
    return error is not None and not isinstance(error, TeacherError)


def _outcome(future: Future[list[Answer]], size: int) -> list[Answer]:
    try:
        return future.result()
    except TeacherError as error:
        return [error] * size


def answer_batch(
    teacher: Any,
    batch: list[Example],
    config: TeacherConfig,
    sampling: SamplingConfig | None,
    conversations: Mapping[str, Any] = MappingProxyType({}),
) -> list[Answer]:
    """Written with `sampling`, scored without; checked, and cut to the recipe's top-mass. `conversations` by example id
    are for a teacher that renders them itself."""
    contexts, k = [example.teacher_context for example in batch], config.top_k
    pairs: Iterable[tuple[Example, TopK]]
    if sampling is None:
        topks = teacher.score(contexts, [e.response for e in batch], [e.is_target for e in batch], k)
        pairs = zip(batch, topks, strict=True)
    else:
        seeds = [int(content_id(sampling.seed, example.id)[:15], 16) for example in batch]
        if isinstance(teacher, ChatGenerator):
            messages = [conversations[example.id] for example in batch]
            if None in messages:
                raise TeacherError("plain text cannot be asked of a chat endpoint; give `prompt` or `messages`")
            written = teacher.generate_chat(messages, contexts, sampling, k, seeds)
        else:
            written = teacher.generate(contexts, sampling, k, seeds)
        pairs = [(e.answered(response), topk) for e, (response, topk) in zip(batch, written, strict=True)]
    origin: Origin = "dataset" if sampling is None else "teacher"
    return [_checked(example, topk, origin, teacher.vocab_size, config) for example, topk in pairs]


def _checked(example: Example, topk: TopK, origin: Origin, vocab_size: int, config: TeacherConfig) -> Answer:
    try:
        record = Record(example, topk, origin).check(vocab_size, config.top_k)
    except TeacherError as error:
        return error
    return record if config.top_mass is None else replace(record, topk=record.topk.keep_mass(config.top_mass))


def check_capability(teacher: Teacher, sampling: SamplingConfig | None) -> None:
    """Raises RecipeError when an opened teacher cannot do what the recipe asks, before anything is asked."""
    who = f"the teacher {teacher.info.name} ({teacher.info.backend})"
    if sampling is not None and not isinstance(teacher, Generator | ChatGenerator):
        raise RecipeError(f"{who} cannot write responses; give them in the data and leave out `sampling:`")
    if sampling is None and not isinstance(teacher, Scorer):
        raise RecipeError(f"{who} cannot score given responses; let it write its own with a `sampling:` section")
