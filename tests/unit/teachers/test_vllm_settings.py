"""What vLLM's engine is told, without vLLM: the class is a stand-in. The real one answers in tests/contract."""

import sys
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict

from bakery.config import TeacherConfig
from bakery.errors import RecipeError
from bakery.teachers.opening import open_teacher


class LLM(BaseModel):
    """Strict about its arguments, as vLLM's configuration is, and by the same library."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str
    dtype: str
    trust_remote_code: bool
    enable_prefix_caching: bool
    max_logprobs: int
    seed: int
    max_model_len: int = 0


@pytest.fixture
def opened(tiny_model, tiny_tokenizer, monkeypatch):
    def open_with(llm=LLM, **engine):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
        config = TeacherConfig(backend="vllm", model_name_or_path=str(tiny_model), top_k=7, engine=engine)
        return open_teacher(config, tiny_tokenizer).open()

    return open_with


def test_what_the_engine_is_told(opened, tiny_model):
    assert opened(max_model_len=64, seed=3).engine.model_dump() == {
        "model": str(tiny_model),
        "dtype": "auto",
        "trust_remote_code": False,
        "enable_prefix_caching": False,
        "max_logprobs": 7,
        "seed": 3,
        "max_model_len": 64,
    }


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [("dtype", "half", "dtype"), ("model", "other", "model_name_or_path"), ("trust_remote_code", True, "trust_rem")],
)
def test_what_the_recipe_says_elsewhere_is_refused(opened, key, value, cure):
    with pytest.raises(RecipeError, match=rf"teacher\.engine\.{key} '?{value}'?: say it as teacher\.{cure}"):
        opened(**{key: value})


def test_what_vllm_refuses_is_one_line(opened):
    with pytest.raises(
        RecipeError, match=r"^teacher\.engine: vLLM refuses: 1 validation error for LLM quantisation Extra"
    ):
        opened(quantisation="fp8")

    def strict(model, **settings):
        raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'quantisation'")

    with pytest.raises(RecipeError, match="unexpected keyword argument 'quantisation'"):
        opened(strict, quantisation="fp8")
