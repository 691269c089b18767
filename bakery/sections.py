"""The sections of a recipe but that of the prompts: each strict, frozen and checked by itself."""

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# Steps of a grid, in nats: far below float32's own, and far above any use.
FINEST, COARSEST = 1e-9, 1.0


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
    backend: Literal["hf", "vllm", "openai", "local_toggle", "fake"] = "hf"
    model_name_or_path: str
    revision: str | None = None
    top_k: int = Field(64, ge=1)
    top_mass: float | None = Field(None, gt=0, le=1)
    support: Literal["topk", "sampled"] = "topk"
    draws: int | None = Field(None, ge=1, le=4096)  # set exactly where the support is sampled
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    tokens_per_batch: int = Field(4096, ge=1)
    trust_remote_code: bool = False
    api: ApiConfig | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    price_per_million: PriceConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fifty_draws(cls, tree: Any) -> Any:
        return {"draws": 50, **tree} if isinstance(tree, dict) and tree.get("support") == "sampled" else tree

    @model_validator(mode="after")
    def _draws_where_they_belong(self) -> Self:
        if (self.support == "sampled") != (self.draws is not None):
            raise ValueError("`draws` belongs to support sampled, and to no other")
        if self.draws is not None and self.top_mass is not None:
            raise ValueError("`top_mass` would cut a sample, which then is none; leave it out, or choose support topk")
        return self

    @property
    def entries(self) -> int:
        """What is asked for at each target: the most likely tokens, or draws."""
        return self.draws or self.top_k

    def logprob_steps(self, asked: tuple[float, float]) -> tuple[float, float]:
        """The finest and the coarsest step, where a cache asks for these: draws are exact."""
        return (0.0, 0.0) if self.draws else asked

    @model_validator(mode="after")
    def _api_where_it_belongs(self) -> Self:
        if (self.backend == "openai") != (self.api is not None):
            raise ValueError("an `api:` section belongs to backend openai, and to no other")
        if self.engine and self.backend != "vllm":
            raise ValueError("an `engine:` section belongs to backend vllm, and to no other")
        return self


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=0)
    n: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    @property
    def prompts_alone(self) -> bool:
        """Nobody writes a response: the rows are what on-policy steps ask the student."""
        return self.max_new_tokens == 0


class CacheConfig(Section):
    out: Path
    rows_per_shard: int = Field(4096, ge=1, le=65_536)  # of far more a reader takes no footer: shards/footer.py
    logprob_step: float = Field(1 / 256, ge=0, le=COARSEST)
    logprob_step_max: float = Field(1 / 16, ge=0, le=COARSEST)
    temperatures: tuple[float, ...] = ()

    @field_validator("logprob_step")
    @classmethod
    def _a_step_or_none(cls, step: float) -> float:
        if 0 < step < FINEST:
            raise ValueError("log-probs are float32, whose own steps are larger; for no rounding say 0")
        return step

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < t < math.inf for t in values):
            raise ValueError("temperatures are finite and above 0")
        return tuple(dict.fromkeys(values))

    @property
    def logprob_steps(self) -> tuple[float, float]:
        """The finest and the coarsest that log-probs are rounded to; (0, 0) where they stay float32 to the bit."""
        return self.logprob_step, max(self.logprob_step, self.logprob_step_max) if self.logprob_step else 0.0


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
    load_in_4bit: bool = False
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _whole_where_layers_go(self) -> Self:
        if self.drop_layers and self.lora is not None:
            raise ValueError("drop_layers needs `lora: null`: an adapter would name a base that has all its layers")
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit needs `lora:`: four-bit weights do not train, adapters on them do")
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


class OnPolicyConfig(Section):
    """Steps whose responses the student samples and the teacher scores, beside those from the cache."""

    fraction: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    lag: int = Field(1, ge=0)


class CacheSource(Section):
    path: Path
    weight: float = Field(1.0, gt=0)
