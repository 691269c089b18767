"""The loss of a batch by the fused path and by the plain one, for real architectures: the same number and gradients."""

import logging

import pytest
import torch
from builders import random_record
from conftest import save_tiny_model
from dense_losses import SUPPORTS
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from bakery.config import LoraSection, LossConfig, StudentConfig
from bakery.heads import hidden_at, knows_head, lm_head, logits_at
from bakery.losses import fused
from bakery.student.arguments import training_arguments
from bakery.student.batch_loss import BatchLoss, target_losses
from bakery.student.collate import collate
from bakery.student.model import bare, load_student
from bakery.student.trainer import DistillTrainer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
KNOWN = {
    "llama": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "granite": (GraniteConfig, {"logits_scaling": 6.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "phi": (PhiConfig, {}),  # a bias
}


def model_of(config, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES | changes))
    for name, weight in model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(weight)
    return model


@pytest.fixture(scope="module")
def batch():
    return collate([random_record(f"r{i}", context=3 + i, response=n, seed=i) for i, n in enumerate((4, 1, 7, 2))])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Fourteen targets in three chunks."""
    monkeypatch.setattr(fused, "TARGETS_PER_CHUNK", 5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_paths_agree(model, batch, loss=None, rtol=1e-4, **options):
    """Returns the fused path's gradients."""
    loss = loss or LossConfig(**options)
    total, loss_N = BatchLoss(loss)(model, batch, bare(model))
    plain_N = target_losses(model, batch, loss, bare(model))
    assert not loss_N.requires_grad  # it was the fused path
    torch.testing.assert_close(loss_N, plain_N.detach(), rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, total), gradients(model, plain_N.sum())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    return ours


@pytest.mark.parametrize("kind", KNOWN)
def test_a_known_head_is_fused_and_has_the_plain_gradient(kind, batch):
    config, changes = KNOWN[kind]
    ours = assert_paths_agree(model_of(config, **changes).eval(), batch)
    assert max(g.abs().max() for g in ours.values()) > 0.01
    assert ("lm_head.bias" in ours) == (kind == "phi")
    assert ("lm_head.weight" in ours) == (kind not in ("tied", "gemma2", "cohere"))


@pytest.mark.parametrize("support", SUPPORTS)
def test_every_part_of_the_recipe_counts(support, tiny_model, tmp_path):
    """Temperature, the other divergences' parameters and cross-entropy, with the cache's norm at that temperature."""
    rows = [random_record(f"r{i}", response=4, seed=i, temperatures=(2.0,)) for i in range(3)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    seen = [
        assert_paths_agree(model, collate(rows), support=support, temperature=2.0, **options)["lm_head.weight"]
        for options in (
            {"divergence": "jsd", "beta": 0.2},
            {"divergence": "jsd", "beta": 0.7},
            {"divergence": "skew_kl", "alpha": 0.3},
            {"divergence": "skew_kl", "alpha": 0.3, "cross_entropy_weight": 0.5},
        )
    ]
    assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > 1e-3


def with_lora(path, **section):
    model = load_student(StudentConfig(model_name_or_path=str(path), lora=LoraSection(r=4, **section)), "cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # an adapter that does something
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model


def test_under_lora_the_head_gets_no_gradient(tiny_model, batch):
    ours = assert_paths_agree(with_lora(tiny_model).eval(), batch)
    assert ours
    assert all("lora" in name for name in ours)


def test_with_gradient_checkpointing(tiny_model, batch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = assert_paths_agree(model.eval(), batch)
    model.train().gradient_checkpointing_enable()
    checkpointed = assert_paths_agree(model, batch)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6)


def test_under_autocast_the_head_multiplies_in_bfloat16(tiny_model, batch):
    """Hidden states are float32 here: it is autocast that makes the head's inputs bfloat16, and so do we."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids, mask, index = batch["input_ids"], batch["attention_mask"], batch["target_index"]
    with torch.autocast("cpu", torch.bfloat16):
        hidden, logits = hidden_at(model, ids, mask, index), logits_at(model, ids, mask, index)
        assert logits.dtype == hidden.dtype == torch.bfloat16
        assert torch.equal(hidden @ model.lm_head.weight.bfloat16().T, logits)
        ours = assert_paths_agree(model, batch, rtol=0.05)
    assert all(g.dtype == torch.float32 for g in ours.values())


def test_hidden_at_is_what_the_head_is_fed(tiny_model, batch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    args = batch["input_ids"], batch["attention_mask"], batch["target_index"]
    fed = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    model(input_ids=args[0], attention_mask=args[1])
    handle.remove()
    rows, positions = args[2].T
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _layer, _args, out: sizes.append(out.numel()))
    torch.testing.assert_close(hidden_at(model, *args), fed[0][rows, positions])
    handle.remove()
    assert sizes == [0]  # the head itself had nothing to do
    assert model(input_ids=args[0]).logits.shape[1] == args[0].shape[1]  # the hook is gone


def said(caplog, model, batch, times=3):
    """The warnings of several batches, and the last loss with its gradient."""
    loss_of = BatchLoss(LossConfig())
    with caplog.at_level(logging.WARNING, logger="bakery"):
        for _ in range(times):
            total, loss_N = loss_of(model, batch, bare(model))
    plain_N = target_losses(model, batch, LossConfig(), bare(model))
    torch.testing.assert_close(loss_N, plain_N)
    ours, theirs = gradients(model, total), gradients(model, plain_N.sum())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    return [record.getMessage() for record in caplog.records], ours


def test_an_adapter_on_the_head_takes_the_plain_path_and_says_so_once(tiny_model, batch, caplog):
    messages, ours = said(caplog, with_lora(tiny_model, target_modules=("lm_head", "q_proj")).eval(), batch)
    assert len(messages) == 1
    assert "LlamaForCausalLM, a peft.tuners.lora.layer.Linear, is none that the fused loss knows" in messages[0]
    assert any("lm_head.lora_A" in name for name in ours)


def test_an_architecture_with_a_trick_of_its_own_takes_the_plain_path_and_says_so_once(batch, caplog):
    """Recurrent Gemma soft-caps under a name that `Head` does not know."""
    model = model_of(RecurrentGemmaConfig, logits_soft_cap=2.0, attention_window_size=16, lru_width=32).eval()
    messages, _ = said(caplog, model, batch)
    assert len(messages) == 1
    assert "RecurrentGemmaForCausalLM" in messages[0]


def test_a_known_head_says_nothing(tiny_model, batch, caplog):
    with caplog.at_level(logging.WARNING, logger="bakery"):
        BatchLoss(LossConfig())(AutoModelForCausalLM.from_pretrained(tiny_model), batch)
    assert not caplog.records


def test_a_wrong_constant_is_noticed(batch):
    model = model_of(*KNOWN["granite"][:1], logits_scaling=6.0).eval()
    assert knows_head(model)
    assert lm_head(model).scale == pytest.approx(1 / 6)
    model.lm_head.register_forward_hook(lambda _layer, _args, out: out * 1.001)
    assert not knows_head(model)


def test_asking_neither_draws_random_numbers_nor_leaves_the_mode_changed():
    model = model_of(LlamaConfig, attention_dropout=0.5).train()
    before = torch.get_rng_state()
    assert knows_head(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.model.layers[0].training


@pytest.mark.parametrize("precision", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}, {}], ids=str)
def test_the_trainer_reaches_the_weights_of_the_plain_path(precision, tmp_path, monkeypatch):
    """Through accelerate's wrappers, autocast among them; three steps with AdamW."""
    path = save_tiny_model(tmp_path / "model")
    rows = [random_record(f"r{i}", response=n, seed=i) for i, n in enumerate((4, 1, 7, 2, 5, 3))]

    def trained(name):
        settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "save_strategy": "no", "max_grad_norm": 0}
        trainer = DistillTrainer(
            model=load_student(StudentConfig(model_name_or_path=str(path), lora=None), "cpu"),
            args=training_arguments(settings | precision | {"learning_rate": 0.01}, tmp_path / name, "cpu"),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
            loss=LossConfig(cross_entropy_weight=0.1),
        )
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        return trainer.model, first, trainer.evaluate()["eval_loss"], trainer.batch_loss.known

    ours, *losses, known = trained("fused")
    assert known
    monkeypatch.setattr("bakery.student.batch_loss.knows_head", lambda model: False)
    theirs, *plain_losses, known = trained("plain")
    assert not known
    assert losses == pytest.approx(plain_losses, rel=0.02 if precision else 1e-4)
    assert losses[1] < losses[0] - 0.1
    for (name, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        start = AutoModelForCausalLM.from_pretrained(path).get_parameter(name)
        moved = torch.cosine_similarity((x - start).flatten(), (y - start).flatten(), 0)
        assert moved > (0.95 if precision else 0.999), name


def test_a_compiled_student_trains_as_another_does(tiny_model, tmp_path):
    """training.torch_compile, with the backend that compiles nothing: the head is found inside the compiled model."""
    losses = []
    for name, how in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        trainer = DistillTrainer(
            model=load_student(StudentConfig(model_name_or_path=str(tiny_model), lora=None), "cpu"),
            args=training_arguments({"max_steps": 1, "save_strategy": "no"} | how, tmp_path / name, "cpu"),
            train_dataset=[random_record("r", response=5)],
            data_collator=collate,
            loss=LossConfig(),
        )
        trainer.train()
        losses.append(trainer.summary()["loss"])
        assert trainer.batch_loss.known
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
