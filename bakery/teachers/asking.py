"""Batches of questions to a teacher, as many at a time as it takes; answers as they come, failures beside them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bakery.errors import TeacherError
from bakery.records import Example, Record

Answered = tuple[list[Example], list[Record] | TeacherError]


def ask_all(
    ask: Callable[[list[Example]], list[Record]], batches: Iterable[list[Example]], calls_in_flight: int
) -> Iterator[Answered]:
    """Each batch with its records, or with the TeacherError that lost it, in order of completion.

    While an answer is being written down the next calls are under way. Any other error ends the flow.
    """
    waiting = deque(batches)
    running: dict[Future[list[Record]], list[Example]] = {}
    with ThreadPoolExecutor(calls_in_flight, thread_name_prefix="teacher") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < calls_in_flight + 1:
                    batch = waiting.popleft()
                    running[pool.submit(ask, batch)] = batch
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    try:
                        yield batch, future.result()
                    except TeacherError as error:
                        yield batch, error
        finally:
            pool.shutdown(cancel_futures=True)
