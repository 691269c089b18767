"""The section of a recipe that says what is read: rows, and the prefix before them."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from bakery.errors import RecipeError
from bakery.recipe_files import bounded_text, parse_yaml
from bakery.sections import Section

LONGEST_PREFIX = 1 << 24  # bytes of a file


def _role_and_content(message: dict[str, str]) -> dict[str, str]:
    if message.keys() != {"role", "content"}:
        raise ValueError(f"a message holds role and content, this one {', '.join(message) or 'nothing'}")
    return message


Message = Annotated[dict[str, str], AfterValidator(_role_and_content)]


class PrefixConfig(Section):
    """What only the teacher reads: exactly one of a text, a file, or chat messages. A .json or .yaml file holds
    messages, any other one a text."""

    text: str | None = None
    file: Path | None = None
    messages: tuple[Message, ...] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(x is not None for x in (self.text, self.file, self.messages)) != 1:
            raise ValueError("give exactly one of text, file, messages")
        return self

    def as_messages(self) -> list[Message]:
        """Raises RecipeError for a file that cannot be read or holds something else, and for a prefix without text."""
        if self.messages is not None:
            found = list(self.messages)
        elif self.file is not None:
            found = _messages_in(self.file)
        else:
            found = [{"role": "system", "content": self.text or ""}]
        if not any(message["content"].strip() for message in found):
            raise RecipeError(f"prompts.prefix{f'.file: {self.file}' if self.file else ''} holds no text; leave it out")
        return found


def _messages_in(file: Path) -> list[Message]:
    try:
        text = bounded_text(file, LONGEST_PREFIX)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"prompts.prefix.file: cannot read {file}: {error}") from error
    if text is None:
        raise RecipeError(f"prompts.prefix.file: {file} has more than {LONGEST_PREFIX:,} bytes; no model reads it")
    text = text.strip()
    if file.suffix not in (".json", ".yaml", ".yml"):
        return [{"role": "system", "content": text}]
    try:
        return TypeAdapter(list[Message]).validate_python(parse_yaml(text, str(file)))
    except ValidationError as error:
        raise RecipeError(f"prompts.prefix.file: {file} is no list of {{role, content}}") from error


class PromptsConfig(Section):
    """Rows, what the teacher reads before them, and which of their turns are targets."""

    path: str
    split: str = "train"
    prefix: PrefixConfig | None = None
    student_retained_turns: int = Field(0, ge=0)
    target_roles: tuple[str, ...] = Field(("assistant",), min_length=1)
    target_content_pattern: str | None = None
    validation_fraction: float = Field(0.0, ge=0, lt=1)

    @field_validator("target_content_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return pattern
