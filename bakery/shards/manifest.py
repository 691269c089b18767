"""manifest.json: what a cache is, who made it from what, and the checksum of every shard. Written last."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import CacheError
from bakery.files import publish
from bakery.records import TeacherInfo
from bakery.sections import COARSEST, FINEST
from bakery.shards.grid import Grid
from bakery.shards.versions import FORMAT_VERSION, VERSIONS, in_todays_terms
from bakery.trees import Changes, changes

NAME = "manifest.json"
PARTIAL = "manifest.partial.json"
CHECKSUM = "checksum"
ABSENT = ("turns_sha", "draws", "part")  # of a manifest, where they are None
STEPS = ("logprob_step", "logprob_step_max")
MOST_WINDOWS = 100_000  # as a shard's name has five digits
MOST_BYTES = 64 << 20  # a hundred thousand shards take a third of it


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ShardEntry(_Model):
    # A fixed shape, so that no manifest can point outside its directory.
    file: str = Field(pattern=r"^data/[a-z]+-\d{5}\.parquet$")
    rows: int = Field(ge=1)
    targets: int = Field(ge=0)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rows > self.bytes:
            raise ValueError(f"{self.rows} rows in {self.bytes} bytes")
        return self


class Identity(_Model):
    """All that decides what the rows are. Two runs with equal identities fill the same cache."""

    k: int = Field(ge=1)
    top_mass: float | None
    vocab_size: int = Field(ge=1)
    logprob_dtype: str = "float32"
    logprob_step: float = Field(ge=0)
    logprob_step_max: float = Field(ge=0)
    temperatures: tuple[float, ...]
    teacher: TeacherInfo
    tokenizer_fingerprint: str
    template_sha: str
    prefix_sha: str
    prompts_sha: str
    sampling: SamplingConfig | None
    validation_fraction: float
    rows_per_shard: int
    turns_sha: str | None = None  # of what else chooses targets and the student's context; None at the defaults
    draws: int | None = Field(None, ge=1)  # of a sampled cache, whose supports are samples: k of them are asked for
    part: tuple[int, int] | None = None  # (index, of how many): the windows whose number leaves that remainder

    @classmethod
    def of(cls, config: TeacherConfig, steps: tuple[float, float], **others: Any) -> Self:
        """`config` says what is kept of an answer, on the grid of these steps if on any; `others` is all the rest."""
        finest, coarsest = config.logprob_steps(steps)
        return cls(
            k=config.entries,
            draws=config.draws,
            top_mass=config.top_mass,
            logprob_step=finest,
            logprob_step_max=coarsest,
            **others,
        )

    @field_validator("part")
    @classmethod
    def _one_of_several(cls, part: tuple[int, int] | None) -> tuple[int, int] | None:
        if part is not None and not 0 <= part[0] < part[1]:
            raise ValueError(f"part {part[0]} of {part[1]}")
        return part

    @model_validator(mode="after")
    def _a_grid_or_none(self) -> Self:
        finest, coarsest = self.logprob_step, self.logprob_step_max
        if (finest, coarsest) != (0, 0) and not FINEST <= finest <= coarsest <= COARSEST:
            raise ValueError(f"a logprob_step of {finest} and a logprob_step_max of {coarsest}")
        return self

    @model_validator(mode="after")
    def _a_sample_is_exact(self) -> Self:
        cut = (self.top_mass, self.logprob_step, self.temperatures, self.k)
        if self.draws is not None and cut != (None, 0, (), self.draws):
            raise ValueError(f"a sample of {self.draws} draws at a top_mass, logprob_step, temperatures and k of {cut}")
        return self

    @property
    def grid(self) -> Grid:
        return Grid(self.logprob_step, self.logprob_step_max)

    @property
    def steps_told(self) -> str:
        """As a recipe or --set says them."""
        return " and ".join(f"cache.{name}={getattr(self, name)}" for name in STEPS)

    def differences(self, there: "Identity") -> Changes:
        """Each value of the identity that differs from the other's."""
        own = set(Identity.model_fields)
        return changes(*(x.model_dump(mode="json", include=own) for x in (self, there)))


class Manifest(Identity):
    format_version: int = FORMAT_VERSION
    bakery_version: str
    recipe: dict[str, Any]  # as given, for the reader's information
    first_window: int = Field(0, ge=0)  # shards below this number were there before the last --extend
    splits: dict[str, Annotated[list[ShardEntry], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, tree: Any) -> Any:
        return in_todays_terms(tree) if isinstance(tree, dict) else tree

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises CacheError for a file that is missing, no JSON, of a newer version, or no manifest."""
        if not path.is_file():
            raise CacheError(f"{path.parent} is no finished bakery cache: it has no {path.name}")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise CacheError(f"{path}: {size:,} bytes, a manifest has {MOST_BYTES:,} at most")
        try:
            tree = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path}: not readable as JSON: {error}") from error
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if type(version) is not int or version not in VERSIONS:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            cure = "install a newer bakery" if newer else "no bakery wrote it, make it again"
            known = ", ".join(map(str, VERSIONS))
            raise CacheError(f"{path}: format_version is {version!r:.20}, this bakery reads {known}; {cure}")
        told = tree.pop(CHECKSUM, None)  # the first caches have none
        if told is not None and told != _checksum(tree):
            raise CacheError(f"{path}: its checksum is not that of its content: damaged, or changed by hand")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            raise CacheError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error

    def save(self, path: Path) -> None:
        """In today's terms, which are those it has here, whatever the version that it was read from."""
        absent = {name for name in ABSENT if getattr(self, name) is None}
        tree = {**self.model_dump(mode="json", exclude=absent), "format_version": FORMAT_VERSION}
        publish(path, (json.dumps({**tree, CHECKSUM: _checksum(tree)}, indent=2) + "\n").encode())

    def entries(self) -> list[ShardEntry]:
        return [entry for shards in self.splits.values() for entry in shards]

    def total(self, field: str, split: str | None = None) -> int:
        shards = self.entries() if split is None else self.splits.get(split, [])
        return sum(getattr(entry, field) for entry in shards)


def window_number(entry: ShardEntry) -> int:
    return int(entry.file.removesuffix(".parquet")[-5:])


def _checksum(tree: dict[str, Any]) -> str:
    """Of the content, however it is laid out as JSON."""
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
