"""Models from disk: safetensors alone, and logits at a few places equal to all of them gathered."""

import shutil

import pytest
import torch
from conftest import save_tiny_model
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from bakery.config import LoraSection, StudentConfig
from bakery.errors import RecipeError
from bakery.heads import logits_at
from bakery.models import context_length, load_causal_lm, load_config
from bakery.prompts.tokenizers import load_tokenizer, vocabulary_size
from bakery.student.model import bare, load_student

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
INDEX = torch.tensor([[0, 1], [0, 4], [1, 0], [1, 2]])


def load(path, dtype="float32"):
    return load_causal_lm(str(path), revision=None, dtype=dtype)


def soft_capped():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        final_logit_softcapping=3.0,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


def with_lora(path):
    model = load_student(StudentConfig(model_name_or_path=str(path), lora=LoraSection(r=4)), "cpu")
    with torch.no_grad():  # an adapter that does something
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lora"])
def test_logits_at_are_the_full_logits_gathered(kind, tiny_model):
    model = {"llama": lambda: load(tiny_model), "gemma2": soft_capped, "lora": lambda: with_lora(tiny_model)}[kind]()
    model.eval()
    full = model(input_ids=IDS, attention_mask=MASK).logits
    ours = logits_at(model, IDS, MASK, INDEX, bare(model))
    torch.testing.assert_close(ours, full[INDEX[:, 0], INDEX[:, 1]], atol=1e-5, rtol=0)
    if kind == "lora":
        base = load(tiny_model).eval()(input_ids=IDS, attention_mask=MASK).logits
        assert (base - full).abs().max() > 0.01
    # The model is as it was.
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits, full)


def test_logits_at_has_the_gradient_of_the_full_logits(tiny_model):
    gradients = []
    for narrow in (True, False):
        model = load(tiny_model).eval()
        logits = logits_at(model, IDS, MASK, INDEX) if narrow else model(input_ids=IDS, attention_mask=MASK).logits
        chosen = logits if narrow else logits[INDEX[:, 0], INDEX[:, 1]]
        chosen.log_softmax(-1)[:, 3].sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_an_error_in_the_forward_leaves_the_head_whole(tiny_model):
    model = load(tiny_model).eval()
    full = model(input_ids=IDS, attention_mask=MASK).logits
    with pytest.raises(IndexError):
        logits_at(model, IDS, MASK, torch.tensor([[7, 0]]))
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits, full)


def test_weights_are_fetched_by_who_reads_them_alone(tiny_model, tmp_path, monkeypatch):
    """A served teacher's tokenizer and configuration come without its weights; no pickle comes at all."""
    published = [path.name for path in tiny_model.iterdir()] + ["pytorch_model.bin"]

    def fetch(name, *, revision, allow_patterns):
        """The hub, where models/tiny is `tiny_model`."""
        assert (name, revision) == ("models/tiny", "main")
        for file in filter_repo_objects(published, allow_patterns=allow_patterns):
            shutil.copy(tiny_model / file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert vocabulary_size(load_tokenizer("models/tiny", "main")) == 259
    assert context_length(load_config("models/tiny", "main")) == 512
    assert not list(tmp_path.glob("*.safetensors"))
    load_causal_lm("models/tiny", revision="main", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(published[:-1])


def test_only_safetensors_are_loaded(tmp_path):
    path = save_tiny_model(tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"pickled holds no \*\.safetensors"):
        load(path)


def test_a_pickle_beside_safetensors_is_not_read(tmp_path):
    path = save_tiny_model(tmp_path / "both")
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    expected = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True).lm_head.weight
    assert torch.equal(load(path).lm_head.weight, expected)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(dtype, expected, tiny_model):
    assert load(tiny_model, dtype).dtype == expected


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(RecipeError, match=r"config\.json"):
        load_config(str(tmp_path))


def test_the_context_length_of_a_text_model_inside_another(tiny_model):
    from transformers import Gemma3Config

    assert context_length(load_config(str(tiny_model))) == 512
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77
