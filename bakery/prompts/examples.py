"""Rows -> examples: rendered, keyed by content, checked against the teacher's context before the first question."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from bakery.config import SamplingConfig
from bakery.errors import DataError
from bakery.prompts.chat import Messages, Renderer
from bakery.prompts.reading import Row
from bakery.records import Example, TeacherInfo, content_id


@dataclass(frozen=True)
class Asked:
    """All that a teacher will be asked: each example once, in the order of the rows."""

    examples: list[Example]
    places: dict[str, str]  # by example id, the file and line of its row
    conversations: dict[str, Messages | None]  # by example id, for teachers that render messages themselves
    unprompted: set[str]  # ids of examples of which the student reads nothing before the response

    def split_of(self, example: Example, validation_fraction: float) -> str:
        """By a hash of what the student reads: all answers to a prompt fall on one side, and stay there for ever.

        Where that says nothing of the row, as before text that is scored, its response decides too.
        """
        told = [example.student_context, *([example.response] if example.id in self.unprompted else [])]
        share = int(content_id("split", *told)[:8], 16) / 2**32
        return "validation" if share < validation_fraction else "train"


def build_examples(
    rows: Iterable[Row],
    renderer: Renderer,
    sampling: SamplingConfig | None,
    teacher: TeacherInfo,
    max_length: int | None,
) -> Asked:
    """`sampling.n` examples for a prompt that the teacher answers, one for a row that holds its response.

    The id is a hash of the token ids, of how the response is sampled, of its index and of the teacher: the same
    question to the same teacher has the same id in every cache. Raises DataError naming the row.
    """
    room = sampling.max_new_tokens if sampling else 0
    how = sampling.model_dump_json(exclude={"n"}) if sampling else "given"
    examples: dict[str, Example] = {}
    places: dict[str, str] = {}
    conversations: dict[str, Messages | None] = {}
    unprompted: set[str] = set()
    asked = unmatched = 0
    for row in rows:
        parts = renderer.render(row)
        if parts is None:
            unmatched += 1
            continue
        context = max(len(parts.student_context), len(parts.teacher_context))
        response = len(parts.response) + room
        if max_length is not None and context + response > max_length:
            raise DataError(
                f"{row.where}: {context} tokens of context and {response} of response, the teacher takes "
                f"{max_length} together; shorten the row or drop it"
            )
        fields = (parts.student_context, parts.teacher_context, parts.response, parts.is_target)
        for index in range(sampling.n if sampling else 1):
            asked += 1
            key = content_id(teacher.fingerprint, teacher.dtype, how, index, *fields)
            examples.setdefault(key, Example(key, *fields))
            places.setdefault(key, row.where)
            if parts.unprompted:
                unprompted.add(key)
            if sampling:
                conversations.setdefault(key, parts.conversation)
    if unmatched and not examples:
        raise DataError(f"prompts.target_content_pattern is found in no turn of {unmatched} rows")
    if unmatched:
        logging.getLogger("bakery").warning("%d rows hold no turn that matches the pattern and are left out", unmatched)
    if repeats := asked - len(examples):
        logging.getLogger("bakery").warning("%d rows repeat another row and are asked for once", repeats)
    return Asked(list(examples.values()), places, conversations, unprompted)
