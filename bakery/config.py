"""A recipe: one frozen, strict description that serves both stages; each stage reads its own sections."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bakery.errors import RecipeError
from bakery.recipe_files import parse_yaml, set_key

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Message = dict[str, str]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ApiConfig(Section):
    """Where a served teacher is. The key itself stands in the environment and nowhere else."""

    base_url: str
    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    key_env: str = "OPENAI_API_KEY"
    in_flight: int = Field(16, ge=1)
    prompts_per_request: int = Field(8, ge=1)
    timeout: float = Field(120.0, gt=0)
    max_retries: int = Field(6, ge=0)


class PriceConfig(Section):
    """Money per million tokens, in any currency."""

    input: float = Field(0.0, ge=0)
    output: float = Field(0.0, ge=0)


class TeacherConfig(Section):
    backend: Literal["hf", "vllm", "openai", "fake"] = "hf"
    model_name_or_path: str
    revision: str | None = None
    top_k: int = Field(64, ge=1)
    top_mass: float | None = Field(None, gt=0, le=1)
    dtype: Dtype = "auto"
    device: str | None = None
    tokens_per_batch: int = Field(4096, ge=1)
    trust_remote_code: bool = False
    api: ApiConfig | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    price_per_million: PriceConfig | None = None

    @model_validator(mode="after")
    def _api_where_it_belongs(self) -> Self:
        if (self.backend == "openai") != (self.api is not None):
            raise ValueError("an `api:` section belongs to backend openai, and to no other")
        if self.engine and self.backend != "vllm":
            raise ValueError("an `engine:` section belongs to backend vllm, and to no other")
        return self


class PrefixConfig(Section):
    """What only the teacher reads: exactly one of a text, a text file, or chat messages."""

    text: str | None = None
    file: Path | None = None
    messages: tuple[Message, ...] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(x is not None for x in (self.text, self.file, self.messages)) != 1:
            raise ValueError("give exactly one of text, file, messages")
        return self

    def as_messages(self) -> list[Message]:
        if self.messages is not None:
            return list(self.messages)
        text = self.text
        if self.file is not None:
            try:
                text = self.file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"prompts.prefix.file: cannot read {self.file}: {error}") from error
        return [{"role": "system", "content": text or ""}]


class PromptsConfig(Section):
    path: str
    split: str = "train"
    prefix: PrefixConfig | None = None
    validation_fraction: float = Field(0.0, ge=0, lt=1)


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    n: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)


class CacheConfig(Section):
    out: Path
    rows_per_shard: int = Field(4096, ge=1)
    logprob_step: float = Field(1 / 64, ge=0, le=1)
    temperatures: tuple[float, ...] = ()

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < t < math.inf for t in values):
            raise ValueError("temperatures are finite and above 0")
        return tuple(dict.fromkeys(values))


class LoraSection(Section):
    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class StudentConfig(Section):
    model_name_or_path: str
    revision: str | None = None
    lora: LoraSection | None = LoraSection()
    drop_layers: tuple[int, ...] = ()
    dtype: Dtype = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _whole_where_layers_go(self) -> Self:
        if self.drop_layers and self.lora is not None:
            raise ValueError("drop_layers needs `lora: null`: an adapter would name a base that has all its layers")
        return self


class LossConfig(Section):
    divergence: str = "forward_kl"
    support: str = "tail_bucket"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    cross_entropy_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        from bakery.losses import check_loss_options

        check_loss_options(self.support, self.divergence, self.beta, self.alpha, self.temperature)
        return self


class CacheSource(Section):
    path: Path
    weight: float = Field(1.0, gt=0)


class Recipe(Section):
    teacher: TeacherConfig | None = None
    prompts: PromptsConfig | None = None
    sampling: SamplingConfig | None = None
    cache: CacheConfig | None = None
    caches: tuple[CacheSource, ...] = ()
    student: StudentConfig | None = None
    loss: LossConfig = Field(default_factory=LossConfig)
    training: dict[str, Any] = Field(default_factory=dict)

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

    def section(self, name: str) -> Any:
        """A section that the caller cannot do without; a RecipeError where the recipe lacks it."""
        value = getattr(self, name)
        if value is None:
            raise RecipeError(f"the recipe has no `{name}:` section, which this command needs")
        return value


def nearest(key: str, known: Any) -> str:
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{match[0]}`?" if match else ""


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides in order (values are YAML), check everything.

    Raises RecipeError, with the nearest real name for a misspelt key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    tree = parse_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    for override in overrides:
        set_key(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    name = ".".join(loc)
    if first["type"] == "extra_forbidden":
        return f"unknown key `{name}`{nearest(loc[-1], _fields_at(loc[:-1]))}"
    if first["type"] == "missing":
        return f"`{name}` is missing"
    return f"`{name}` is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"


def _fields_at(loc: list[str]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        annotation = model.model_fields[part].annotation if part in model.model_fields else model
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
