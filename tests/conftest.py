"""What most tests need: a tiny tokenizer and model made on the spot, and the real SmolLM2 for the integration tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy two-core machine are slower than one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
TINY_TOKENIZER = ROOT / "data/golden-tokenizer"  # 256 bytes and 3 specials, ChatML
# The quick suite tries the same examples every time, so that a change is judged by what it changes; `make soak` draws
# a thousand new ones. No deadline: an example of a fuzz test may wait for a disk that others use.
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=1_000, derandomize=False)
settings.load_profile("default")
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """Recipes name their files from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from bakery.prompts.tokenizers import load_tokenizer

    return load_tokenizer(str(TINY_TOKENIZER))


def save_tiny_model(path: Path, seed: int = 0, layers: int = 3, vocab_size: int = 264, **config) -> Path:
    """A Llama of 32 hidden units; its output has 5 rows more than the tokenizer has tokens, as padded models do."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 258,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=layers, **(settings | config)))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY_TOKENIZER).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory that the tests of a module share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def student(home) -> Path:
    """One that is not the tiny teacher."""
    return save_tiny_model(home / "student", seed=1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, converted once into models/."""
    subprocess.run([sys.executable, ROOT / "pipelines/get_smollm2.py", SMOLLM2], check=True)
    return SMOLLM2
