"""Batches of questions to a teacher, as many at a time as it takes; answers as they come, failures beside them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bakery.errors import TeacherError
from bakery.records import Example, Record

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
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    pairs = list(zip(batch, _outcome(future, len(batch)), strict=True))
                    retried = [e for e, answer in pairs if isinstance(answer, TeacherError) and e.id not in again]
                    again.update(example.id for example in retried)
                    waiting.extend([example] for example in retried)
                    yield [(example, answer) for example, answer in pairs if example not in retried]
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(future: Future[list[Answer]], size: int) -> list[Answer]:
    try:
        return future.result()
    except TeacherError as error:
        return [error] * size
