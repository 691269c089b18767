"""The student that trains: whole, with layers dropped, with adapters. Against models run with layers skipped."""

import json
import shutil

import pytest
import torch
from conftest import save_tiny_model
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bakery.config import LoraSection, StudentConfig
from bakery.errors import RecipeError
from bakery.student.dropping import drop_layers
from bakery.student.model import bare, load_student
from bakery.student.sampling import write_answers

IDS = torch.tensor([[5, 60, 70, 80, 90, 100, 7, 3]])


def student(path, **options):
    options = {"lora": None} | options
    return load_student(StudentConfig(model_name_or_path=str(path), **options), "cpu")


def skipping(model, skipped):
    """The whole model, its skipped layers made to hand on what they are given."""
    for i in skipped:
        model.model.layers[i].register_forward_hook(lambda _layer, args, _output: args[0])
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """Five layers of two kinds: the last three see only three tokens back."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("models") / "sliding"
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("dropped", [(1,), (0, 2), (2,)])
def test_dropping_layers_is_skipping_them(dropped, tiny_model):
    whole = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(skipping(whole, dropped))
    torch.testing.assert_close(logits(student(tiny_model, drop_layers=dropped)), expected)


@pytest.mark.parametrize("dropped", [(0,), (0, 3), (1, 2, 4)])
def test_a_kept_layer_keeps_its_kind_of_attention(dropped, sliding):
    whole = AutoModelForCausalLM.from_pretrained(sliding)
    kinds = [kind for i, kind in enumerate(whole.config.layer_types) if i not in dropped]
    expected = logits(skipping(whole, dropped))
    small = student(sliding, drop_layers=dropped)
    assert small.config.layer_types == kinds
    torch.testing.assert_close(logits(small), expected)


def test_the_rest_is_renumbered(tiny_model):
    small = student(tiny_model, drop_layers=(0, 2))
    assert small.config.num_hidden_layers == len(small.model.layers) == 1
    assert small.model.layers[0].self_attn.layer_idx == 0


@pytest.mark.parametrize("kind", ["tiny_model", "sliding"])
def test_a_smaller_model_writes_with_its_key_value_cache_what_it_says_without(kind, request):
    path = request.getfixturevalue(kind)
    small = student(path, drop_layers=(0,)).eval()
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    cached = small.generate(input_ids=IDS, attention_mask=mask, use_cache=True, **plain)
    assert torch.equal(cached, small.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **plain))


@pytest.mark.parametrize("kind", ["tiny_model", "sliding"])
def test_saved_and_loaded_again_it_is_the_same(kind, request, tmp_path):
    small = student(request.getfixturevalue(kind), drop_layers=(1,))
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(small), atol=0, rtol=0)


def made(kind, **more):
    """Six small layers of an architecture, its weights drawn."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "initializer_range": 0.3,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **more))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHER_LISTS = {
    "smollm3": ({"no_rope_layers": [1, 1, 1, 0, 1, 1]}, {"no_rope_layers": [1, 0, 1, 1]}),
    "qwen3_moe": (EXPERTS | {"mlp_only_layers": [0, 3, 5]}, {"mlp_only_layers": [1, 3]}),
}


@pytest.mark.parametrize("kind", OTHER_LISTS)
def test_every_list_about_layers_tells_of_those_left(kind, tmp_path):
    """One entry per layer is cut, a number of a layer becomes its new one."""
    options, left = OTHER_LISTS[kind]
    expected = logits(skipping(made(kind, **options), (0, 2)))
    small = made(kind, **options)
    drop_layers(small, (0, 2))
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {name: getattr(again.config, name) for name in left} == left
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [("diffllama", {}, "layers.0.self_attn"), ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2}, "layers.0.mlp")],
)
def test_what_no_config_can_tell_is_refused(kind, options, part):
    """Where a number of the layer decides what it is: how attention is scaled, whether it has experts."""
    with pytest.raises(RecipeError, match=rf"student\.drop_layers: no config of .*{part} would be another"):
        drop_layers(made(kind, **options), (0,))


def test_a_token_id_is_no_layer(tmp_path):
    small = made("llama", eos_token_id=[1, 2, 3, 4, 5, 6])
    drop_layers(small, (0,))
    assert small.config.eos_token_id == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("dropped", "message"), [((3,), "layer 3.*0 to 2"), ((-1,), "layer -1.*0 to 2"), ((0, 1, 2), "drops all 3 layers")]
)
def test_layers_that_cannot_be_dropped(dropped, message, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(RecipeError, match=message):
        drop_layers(model, dropped)
    assert len(model.model.layers) == 3


def test_lora_trains_its_adapters_and_nothing_else(tiny_model):
    model = student(tiny_model, lora=LoraSection(r=4))
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    # 3 layers x (q, k, v, o, gate, up, down) x (A, B); all-linear leaves the output layer out.
    assert len(trainable) == 3 * 7 * 2
    assert not any("lm_head" in name for name in trainable)


def test_explicit_target_modules_and_rank(tiny_model):
    model = student(tiny_model, lora=LoraSection(r=3, target_modules=("q_proj", "down_proj")))
    trainable = {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable} == {"q_proj", "down_proj"}
    assert len(trainable) == 3 * 2 * 2
    assert {shape[0] for name, shape in trainable.items() if "lora_A" in name} == {3}


def test_a_fresh_adapter_changes_nothing(tiny_model):
    whole = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(logits(student(tiny_model, lora=LoraSection())), logits(whole), atol=0, rtol=0)


def test_an_adapter_says_which_model_it_belongs_to(tiny_model, tmp_path):
    student(tiny_model, lora=LoraSection(r=2)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_no_adapter_on_a_smaller_model(tiny_model):
    """Its base could not be named: the adapter would be loaded onto all layers."""
    with pytest.raises(ValidationError, match="lora: null"):
        student(tiny_model, lora=LoraSection(r=2), drop_layers=(0,))


def test_target_modules_that_the_model_has_not(tiny_model):
    with pytest.raises(RecipeError, match=r"student\.lora.*no_such_layer"):
        student(tiny_model, lora=LoraSection(target_modules=("no_such_layer",)))


def test_full_fine_tuning_keeps_float32_weights_of_a_bfloat16_model(tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16().save_pretrained(tmp_path / "half")
    model = student(tmp_path / "half")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in model.parameters())


def test_answers_are_the_greedy_ones_and_the_mode_stays(tiny_tokenizer, tmp_path):
    model = student(save_tiny_model(tmp_path / "wordy", seed=4))
    model.train()
    [text] = write_answers(model, tiny_tokenizer, [IDS[0].numpy()], 5)
    assert model.training
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, bare(model).eval()(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert text == tiny_tokenizer.decode(ids[0, IDS.shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_greedy_whatever_the_generation_config_says(tiny_model, tiny_tokenizer, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "penal")
    file = tmp_path / "penal/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}))
    context = [IDS[0].numpy()]
    plain = write_answers(student(tiny_model), tiny_tokenizer, context, 12)
    assert write_answers(student(tmp_path / "penal"), tiny_tokenizer, context, 12) == plain
