"""A recipe: one frozen, strict description that serves both stages; each stage reads its own sections."""

import difflib
import reprlib
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from bakery.errors import RecipeError
from bakery.old_names import with_new_names
from bakery.prompt_sections import Message, PrefixConfig, PromptsConfig
from bakery.recipe_files import parse_yaml, read_recipe, set_key
from bakery.recipe_secrets import refuse_secrets
from bakery.sections import (
    ApiConfig,
    CacheConfig,
    CacheSource,
    Dtype,
    LoraSection,
    LossConfig,
    OnPolicyConfig,
    PriceConfig,
    SamplingConfig,
    Section,
    StudentConfig,
    TeacherConfig,
)

__all__ = [
    "ApiConfig",
    "CacheConfig",
    "CacheSource",
    "Dtype",
    "LoraSection",
    "LossConfig",
    "Message",
    "OnPolicyConfig",
    "PrefixConfig",
    "PriceConfig",
    "PromptsConfig",
    "Recipe",
    "SamplingConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "load_recipe",
]


class Recipe(Section):
    teacher: TeacherConfig | None = None
    prompts: PromptsConfig | None = None
    sampling: SamplingConfig | None = None
    cache: CacheConfig | None = None
    caches: tuple[CacheSource, ...] = ()
    student: StudentConfig | None = None
    loss: LossConfig = Field(default_factory=LossConfig)
    on_policy: OnPolicyConfig = Field(default_factory=OnPolicyConfig)
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_keys(cls, tree: Any) -> Any:
        refuse_secrets(tree)
        return tree

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, training: dict[str, Any]) -> dict[str, Any]:
        if training:
            from dataclasses import fields

            from transformers import TrainingArguments

            known = {f.name for f in fields(TrainingArguments) if f.init} - {"remove_unused_columns"}
            for key in training:
                if key not in known:
                    raise RecipeError(
                        f"training.{key} is no argument of transformers.TrainingArguments{nearest(key, known)}"
                    )
        return training

    @model_validator(mode="after")
    def _targets_are_given(self) -> Self:
        prompts = self.prompts
        chosen = prompts and (prompts.target_content_pattern is not None or prompts.target_roles != ("assistant",))
        if chosen and self.sampling is not None:
            raise RecipeError(
                "prompts.target_roles and prompts.target_content_pattern choose among given turns, and with a "
                "`sampling:` section the teacher writes its own; leave one of them out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _local_toggle_is_the_student(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        teacher, student = tree.get("teacher"), tree.get("student")
        if not (isinstance(teacher, dict) and teacher.get("backend") == "local_toggle" and isinstance(student, dict)):
            return tree
        same = {name: student[name] for name in ("model_name_or_path", "revision") if name in student}
        return {**tree, "teacher": same | teacher}

    @model_validator(mode="after")
    def _local_toggle_has_a_base(self) -> Self:
        teacher, student = self.teacher, self.student
        if teacher is None or student is None or teacher.backend != "local_toggle":
            return self
        for name in ("model_name_or_path", "revision"):
            mine, theirs = getattr(teacher, name), getattr(student, name)
            if mine != theirs:
                raise RecipeError(
                    f"teacher.{name} is {mine}, student.{name} is {theirs}: with backend local_toggle they are one "
                    f"model; leave it out of `teacher:`"
                )
        if student.lora is None:
            raise RecipeError(
                "teacher.backend local_toggle is the student with its adapters off, and `lora: null` trains the base "
                "itself: nothing of the teacher would be left; use backend hf, which holds a copy of its own"
            )
        return self

    def section(self, name: str) -> Any:
        """A section that the caller cannot do without; a RecipeError where the recipe lacks it."""
        value = getattr(self, name)
        if value is None:
            raise RecipeError(f"the recipe has no `{name}:` section, which this command needs")
        return value


def nearest(key: str, known: Any) -> str:
    match = difflib.get_close_matches(key[:60], list(known), n=1, cutoff=0.5)
    return f"; did you mean `{match[0]}`?" if match else ""


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides in order (values are YAML), check everything.

    Raises RecipeError, with the nearest real name for a misspelt key.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        set_key(tree, override)
    return checked(with_new_names(tree), path)


def checked(tree: dict[str, Any], where: object) -> Recipe:
    """The recipe that a tree of plain values is; RecipeError, which begins with `where`, where it is none."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_one_line(error)}") from error


def read_tree(path: Path) -> dict[str, Any]:
    tree = parse_yaml(read_recipe(path), str(path)) or {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    return tree


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    name = ".".join(loc)[:200]
    if first["type"] == "extra_forbidden":
        return f"unknown key `{name}`{nearest(loc[-1], _fields_at(loc[:-1]))}"
    if first["type"] == "missing":
        return f"`{name}` is missing"
    return f"`{name}` is {reprlib.repr(first['input'])}: {first['msg'].removeprefix('Value error, ')}"


def _fields_at(loc: list[str]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        annotation = model.model_fields[part].annotation if part in model.model_fields else model
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
