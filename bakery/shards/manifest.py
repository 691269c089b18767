"""manifest.json: what a cache is, who made it from what, and the checksum of every shard. Written last."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bakery.config import SamplingConfig
from bakery.errors import CacheError
from bakery.files import publish
from bakery.records import TeacherInfo
from bakery.shards.schema import FORMAT_VERSION
from bakery.trees import Changes, changes

NAME = "manifest.json"
PARTIAL = "manifest.partial.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Model):
    # A fixed shape, so that no manifest can point outside its directory.
    file: str = Field(pattern=r"^data/[a-z]+-\d{5}\.parquet$")
    rows: int = Field(ge=1)
    targets: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Identity(_Model):
    """All that decides what the rows are. Two runs with equal identities fill the same cache."""

    k: int = Field(ge=1)
    top_mass: float | None
    vocab_size: int = Field(ge=1)
    logprob_dtype: str = "float32"
    logprob_step: float = Field(ge=0)
    temperatures: tuple[float, ...]
    teacher: TeacherInfo
    tokenizer_fingerprint: str
    template_sha: str
    prefix_sha: str
    prompts_sha: str
    sampling: SamplingConfig | None
    validation_fraction: float
    rows_per_shard: int

    def differences(self, there: "Identity") -> Changes:
        """Each value of the identity that differs from the other's."""
        own = set(Identity.model_fields)
        return changes(*(x.model_dump(mode="json", include=own) for x in (self, there)))


class Manifest(Identity):
    format_version: int = FORMAT_VERSION
    bakery_version: str
    recipe: dict[str, Any]  # as given, for the reader's information
    first_window: int = Field(0, ge=0)  # shards below this number were there before the last --extend
    splits: dict[str, list[ShardEntry]] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises CacheError for a file that is missing, no JSON, of a newer version, or no manifest."""
        try:
            tree = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise CacheError(f"{path.parent} is no finished bakery cache: it has no {path.name}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path}: not readable as JSON: {error}") from error
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{path}: format_version is {version!r}, this bakery reads {FORMAT_VERSION}; "
                f"read it with the bakery that wrote it, or make it again"
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            raise CacheError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error

    def save(self, path: Path) -> None:
        publish(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())

    def entries(self) -> list[ShardEntry]:
        return [entry for shards in self.splits.values() for entry in shards]

    def total(self, field: str, split: str | None = None) -> int:
        shards = self.entries() if split is None else self.splits.get(split, [])
        return sum(getattr(entry, field) for entry in shards)
