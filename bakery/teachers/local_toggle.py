"""The student's own base as teacher: the model that trains, with its adapters off, reads the prefix.

Filling a cache it is that base, loaded like any Hugging Face model. Beside a student that trains it is the student's
own weights, so there is no second copy of them in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bakery.config import TeacherConfig
from bakery.models import eval_mode
from bakery.records import Ids, Mask, TopK
from bakery.teachers.hf import HFTeacher


class LocalToggleTeacher(HFTeacher):
    backend = "local_toggle"
    calls_in_flight = 1  # a call switches the adapters off and on again

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        super().__init__(config, tokenizer, temperatures)
        self.student: Any = None

    def share(self, student: Any) -> None:
        """Answer with these weights, a PeftModel's; never while they are being trained."""
        self.student = student
        self.__dict__["model"] = student.get_base_model()
        dtype = str(student.get_input_embeddings().weight.dtype).removeprefix("torch.")
        self.info = self.info.model_copy(update={"dtype": dtype})

    def close(self) -> None:
        super().close()
        self.student = None

    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        with self._adapters_off():
            return super().score(contexts, responses, targets, k)

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        if self.student is None:
            yield
            return
        with eval_mode(self.student), self.student.disable_adapter():
            yield
