"""Examples to a teacher, records back: a batch at a time, as many calls at a time as it takes, failures beside them."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from bakery.config import SamplingConfig, TeacherConfig
from bakery.devices import free_memory, is_full
from bakery.errors import RecipeError, TeacherError, first_line
from bakery.records import Example, Origin, Record, TopK, content_id
from bakery.stopping import stopping
from bakery.teachers.protocol import ChatGenerator, Generator, Scorer, Teacher

log = logging.getLogger("bakery")
Answer = Record | TeacherError
Ask = Callable[[list[Example]], list[Answer]]


def ask_all(ask: Ask, batches: Iterable[list[Example]], calls_in_flight: int) -> Iterator[list[tuple[Example, Answer]]]:
    """Each example with its record, or with the TeacherError that lost it, a batch at a time in order of completion.

    `ask` raises a TeacherError when a whole call failed, and gives one in place of a record that is no answer; either
    way the examples concerned are asked for once more, each by itself. Any other error ends the flow. While answers
    are written down the next calls are under way.
    """
    waiting = deque(batches)
    again: set[str] = set()
    running: dict[Future[list[Answer]], list[Example]] = {}
    pool = ThreadPoolExecutor(calls_in_flight, thread_name_prefix="teacher")
    try:
        while waiting or running:
            while waiting and len(running) <= calls_in_flight:
                batch = waiting.popleft()
                running[pool.submit(in_memory, ask, batch)] = batch
            # What has been answered is handed on before an error that ends the flow.
            for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=_ends_the_flow):
                batch = running.pop(future)
                pairs = list(zip(batch, _outcome(future, len(batch)), strict=True))
                retried = [e for e, answer in pairs if isinstance(answer, TeacherError) and e.id not in again]
                again.update(example.id for example in retried)
                waiting.extend([example] for example in retried)
                yield [(example, answer) for example, answer in pairs if example.id not in {e.id for e in retried}]
    finally:
        # Calls under way may take minutes, which a process that has been told to stop has not.
        pool.shutdown(wait=not stopping(), cancel_futures=True)


def in_memory(ask: Ask, batch: list[Example]) -> list[Answer]:
    """`ask`, in halves as long as the device has too little memory for the batch; one example that is too large by
    itself is a TeacherError in its place."""
    try:
        return ask(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        why = first_line(error)
    free_memory()  # only here has the exception let go of the call's tensors
    if len(batch) == 1:
        size = len(batch[0].teacher_context) + len(batch[0].response)
        return [TeacherError(f"{size} tokens do not fit into memory ({why}); shorten the row or take a larger device")]
    log.warning("%d rows at a time do not fit into memory: in halves; lower teacher.tokens_per_batch", len(batch))
    middle = len(batch) // 2
    return in_memory(ask, batch[:middle]) + in_memory(ask, batch[middle:])


def _ends_the_flow(future: Future[list[Answer]]) -> bool:
    error = future.exception()
    return error is not None and not isinstance(error, TeacherError)


def _outcome(future: Future[list[Answer]], size: int) -> list[Answer]:
    try:
        return future.result()
    except TeacherError as error:
        return [error] * size


def plan_calls(teacher: Teacher, examples: list[Example], sampling: SamplingConfig | None) -> list[list[Example]]:
    """The examples as the teacher is best asked for them."""
    room = sampling.max_new_tokens if sampling else 0
    contexts = [example.teacher_context for example in examples]
    lengths = [len(example.teacher_context) + len(example.response) + room for example in examples]
    calls = teacher.plan(contexts, lengths, "score" if sampling is None else "generate")
    return [[examples[i] for i in call] for call in calls]


def answer_batch(
    teacher: Any,
    batch: list[Example],
    config: TeacherConfig,
    sampling: SamplingConfig | None,
    conversations: Mapping[str, Any] = MappingProxyType({}),
) -> list[Answer]:
    """Written with `sampling`, scored without; checked, and cut to the recipe's top-mass. `conversations` by example id
    are for a teacher that renders them itself."""
    contexts, k = [example.teacher_context for example in batch], config.entries
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
        if (longest := max(len(e.response) for e, _ in pairs)) > sampling.max_new_tokens:
            raise TeacherError(f"a response of {longest} tokens where {sampling.max_new_tokens} were asked for at most")
    origin: Origin = "dataset" if sampling is None else "teacher"
    return [_checked(example, topk, origin, teacher.vocab_size, config) for example, topk in pairs]


def prompts_alone(batch: list[Example]) -> list[Answer]:
    """The examples without a response, of which no teacher is asked."""
    return [Record(example, TopK.empty(), "dataset") for example in batch]


def _checked(example: Example, topk: TopK, origin: Origin, vocab_size: int, config: TeacherConfig) -> Answer:
    try:
        k = None if config.draws else config.top_k
        record = Record(example, topk, origin).check(vocab_size, k, config.draws)
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
