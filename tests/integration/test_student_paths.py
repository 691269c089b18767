"""Students other than a plain LoRA: a 4-bit base, explicit modules, Gemma 3 with its token types."""

import pytest
import torch
from conftest import save_tiny_model
from peft import PeftModel
from test_on_policy_run import on_policy_recipe
from test_stage_two import LORA, make_cache, metrics_of, prompts, recipe, run, weights
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from bakery.config import Recipe, StudentConfig
from bakery.distillation import distill
from bakery.errors import RecipeError
from bakery.heads import logits_at
from bakery.student import model as student_model
from bakery.student.model import load_student


@pytest.fixture(scope="module")
def wide(home):
    """64 hidden units: four-bit blocks hold 64 weights."""
    return save_tiny_model(home / "wide", seed=1, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def cache(home, tiny_model):
    return make_cache(home / "cache", tiny_model, prompts(home / "rows.jsonl"))


def in_four_bits(cache, student, out, **more):
    tree = recipe(cache, student, out, **more).model_dump(mode="json")
    tree["student"]["load_in_4bit"] = True
    return Recipe.model_validate(tree)


def test_qlora_trains_its_adapters_on_a_base_of_four_bits(cache, wide, home):
    out = distill(in_four_bits(cache, wide, home / "qlora"), device="cpu")
    before, after = (metrics_of(out)["heldout"][when]["kl"] for when in ("before", "after"))
    assert after < before - 0.1
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide), out)  # as anyone loads it
    assert set(weights(out)) == {name.replace(".default", "") for name, _ in plain.named_parameters() if "lora" in name}


def test_a_base_of_four_bits_is_half_a_byte_a_weight_and_has_the_gradients_of_its_dequantised_self(wide):
    from bitsandbytes.functional import dequantize_4bit

    config = StudentConfig(model_name_or_path=str(wide), lora=LORA)
    torch.manual_seed(0)
    whole = load_student(config, "cpu")
    torch.manual_seed(0)
    four = load_student(config.model_copy(update={"load_in_4bit": True}), "cpu")
    errors = []
    for (name, mine), theirs in zip(whole.named_modules(), four.modules(), strict=True):
        if name.endswith("base_layer"):
            assert theirs.weight.dtype == torch.uint8
            assert theirs.weight.numel() == mine.weight.numel() / 2
            near = dequantize_4bit(theirs.weight, theirs.weight.quant_state)
            errors.append(float((near - mine.weight).norm() / mine.weight.norm()))
            mine.weight.data = near
    assert 0.05 < max(errors) < 0.12  # NF4 on normal weights is off by some 9 %
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        four.eval()(input_ids=ids)  # a forward that bitsandbytes takes for the beginning of inference
    losses = [m.train()(input_ids=ids).logits.log_softmax(-1)[..., 7].sum() for m in (whole, four)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(whole.named_parameters(), four.parameters(), strict=True):
        if "lora_B" in name:
            assert mine.grad.abs().max() > 1e-3
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-3, atol=1e-3 * float(mine.grad.abs().max()))


def test_local_toggle_on_a_base_of_four_bits(cache, wide, home):
    tree = on_policy_recipe(cache, wide, home / "toggle4", wide, 1.0, backend="local_toggle", max_steps=2).model_dump()
    tree["student"]["load_in_4bit"] = True
    tree["teacher"]["dtype"] = "auto"
    out = distill(Recipe.model_validate(tree), device="cpu")
    assert metrics_of(out)["train"]["steps"] == 2


def test_without_bitsandbytes_the_extra_is_named(wide, monkeypatch):
    monkeypatch.setattr(student_model, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match=r"pip install bakery\[qlora\]"):
        load_student(StudentConfig(model_name_or_path=str(wide), load_in_4bit=True), "cpu")


def test_four_bits_do_not_train_without_adapters(wide):
    with pytest.raises(ValueError, match="load_in_4bit needs `lora:`"):
        StudentConfig(model_name_or_path=str(wide), load_in_4bit=True, lora=None)


def test_explicit_target_modules_are_those_that_train(cache, wide, home):
    out = run(cache, wide, home / "explicit", lora={"r": 4, "target_modules": ["q_proj", "down_proj"]}, max_steps=1)
    assert {name.split(".")[-3] for name in weights(out)} == {"q_proj", "down_proj"}


@pytest.fixture(scope="module")
def gemma3():
    torch.manual_seed(0)
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def test_gemma_3_with_images_reads_text_as_text_while_it_trains(gemma3):
    """All token types 0; the answer is the language model's own, causal everywhere."""
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    index = torch.tensor([[0, 3], [1, 8], [1, 0]])
    gemma3.train()
    seen = {}
    handle = gemma3.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    logits = logits_at(gemma3, ids, mask, index)
    handle.remove()
    assert seen["token_type_ids"].tolist() == [[0] * 9] * 2
    hidden = gemma3.model.language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(logits, gemma3.lm_head(hidden)[index[:, 0], index[:, 1]])
    changed = ids.clone()
    changed[:, 5:] = 7  # nothing behind a position reaches it
    torch.testing.assert_close(logits_at(gemma3, changed, mask, index)[[0, 2]], logits[[0, 2]])
