"""A few held-out answers side by side: the teacher's, and the student's before and after."""

from dataclasses import dataclass
from typing import Any

from bakery.prompts.tokenizers import special_ids
from bakery.records import Record
from bakery.student.dataset import CacheDataset

COUNT = 3
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Sample:
    prompt: str
    teacher: str
    before: str
    after: str


def chosen(rows: CacheDataset) -> list[Record]:
    """The first few rows, one a prompt."""
    picked: dict[bytes, Record] = {}
    for index in range(len(rows)):
        record = rows[index]
        picked.setdefault(record.example.student_context.tobytes(), record)
        if len(picked) == COUNT:
            break
    return list(picked.values())


def answer_length(records: list[Record], otherwise: int) -> int:
    """Enough room for the student to say as much as the teacher did; where that was nothing, `otherwise`."""
    longest = max((len(record.example.response) for record in records), default=0)
    return min(MAX_NEW_TOKENS, longest + 8 if longest else otherwise)


def side_by_side(records: list[Record], before: list[str], after: list[str], tokenizer: Any) -> list[Sample]:
    return [
        Sample(
            prompt_text(tokenizer, record),
            tokenizer.decode(record.example.response.tolist(), skip_special_tokens=True).strip(),
            old,
            new,
        )
        for record, old, new in zip(records, before, after, strict=True)
    ]


def prompt_text(tokenizer: Any, record: Record) -> str:
    """What the user last said, read back from the ids for a person to see: the last stretch between special tokens
    that is not the generation prompt."""
    special = special_ids(tokenizer)
    stretches: list[list[int]] = [[]]
    for token in record.example.student_context.tolist():
        if token in special:
            stretches.append([])
        else:
            stretches[-1].append(token)
    texts = [text for text in (tokenizer.decode(s).strip() for s in stretches) if text]
    text = texts[-2] if len(texts) > 1 else "".join(texts)
    return text.removeprefix("user\n").strip()
