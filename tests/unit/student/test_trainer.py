"""Gradients of the real Trainer: however a batch is cut, they are those of sum(loss) / number of targets."""

import json

import pytest
import torch
from builders import random_record
from transformers import AutoModelForCausalLM, TrainerState

from bakery.config import LossConfig, StudentConfig
from bakery.progress import Progress
from bakery.student.arguments import training_arguments
from bakery.student.batch_loss import target_losses
from bakery.student.collate import collate
from bakery.student.model import load_student
from bakery.student.run_loss import RunLoss
from bakery.student.trainer import DistillTrainer

RATE = 0.05
# Ragged: a mean of micro-batch means would be far from the mean of all targets.
LENGTHS = (1, 12, 2, 9, 1, 3, 20, 5, 1, 7)


class Watched(list):
    """Rows that remember the order in which they were taken."""

    def __init__(self, rows):
        super().__init__(rows)
        self.taken = []

    def __getitem__(self, index):
        self.taken.append(index)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def rows():
    return [random_record(f"r{i}", context=3 + i % 3, response=n, seed=i) for i, n in enumerate(LENGTHS)]


def trained(tiny_model, rows, out, loss=None, **training):
    student = load_student(StudentConfig(model_name_or_path=str(tiny_model), lora=None), "cpu")
    settings = {
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    data = Watched(rows)
    trainer = DistillTrainer(
        model=student,
        args=training_arguments(settings | training, out, "cpu"),
        train_dataset=data,
        data_collator=collate,
        loss=loss or LossConfig(),
    )
    trainer.train()
    return student, trainer, data.taken


def dense_loss_sum(model, rows):
    """Σ over targets of KL(teacher ‖ student) in K + 1 buckets, from full logits, row by row; and their number."""
    total, targets = 0.0, 0
    for record in rows:
        example, topk = record.example, record.topk
        ids = torch.as_tensor([*example.student_context.tolist(), *example.response.tolist()])
        q_RV = model(input_ids=ids[None]).logits[0, len(example.student_context) - 1 : -1].softmax(-1)
        q_NV = q_RV[torch.as_tensor(example.is_target)]
        ids_NK = torch.as_tensor(topk.ids.reshape(len(topk), -1)).long()
        p_NK, q_NK = torch.as_tensor(topk.logprobs).reshape(len(topk), -1).exp(), q_NV.gather(1, ids_NK)
        p_N, q_N = torch.as_tensor(topk.tail_logprob).exp(), 1 - q_NK.sum(1)
        total = total + (p_NK * (p_NK / q_NK).log()).sum() + (p_N * (p_N / q_N).log()).sum()
        targets += len(topk)
    return total, targets


def by_hand(tiny_model, steps):
    """Plain gradient descent on sum(loss) / number of targets; the rows of each step are given."""
    model, losses = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), []
    for rows in steps:
        total, targets = dense_loss_sum(model, rows)
        model.zero_grad()
        (total / targets).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
        losses.append(float(total.detach()) / targets)
    return model, losses


def assert_same_weights(ours, theirs):
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_one_batch_of_8_is_4_micro_batches_of_2(tiny_model, rows, tmp_path):
    whole, *_ = trained(tiny_model, rows[:8], tmp_path / "a", per_device_train_batch_size=8)
    split, *_ = trained(
        tiny_model, rows[:8], tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert_same_weights(split, whole)
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (start.lm_head.weight - whole.lm_head.weight).abs().max() > 1e-4


@pytest.mark.parametrize(("micro", "accumulated"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_that_of_the_sum_over_the_number_of_targets(micro, accumulated, tiny_model, rows, tmp_path):
    ours, trainer, _ = trained(
        tiny_model,
        rows[:8],
        tmp_path,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
    )
    theirs, [loss] = by_hand(tiny_model, [rows[:8]])
    assert_same_weights(ours, theirs)
    assert trainer.summary()["last_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_last_step_of_an_epoch_counts_only_what_is_left(tiny_model, rows, tmp_path):
    """Ten rows in micro-batches of two, four a step: the second step has one micro-batch."""
    ours, trainer, order = trained(
        tiny_model, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert trainer.state.global_step == 2
    assert sorted(order) == list(range(10))
    theirs, losses = by_hand(tiny_model, [[rows[i] for i in order[:8]], [rows[i] for i in order[8:]]])
    assert_same_weights(ours, theirs)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert trainer.summary()["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_a_loss_of_steps_that_no_checkpoint_tells_of_is_not_made_up():
    """As in one of another bakery's."""
    run_loss = RunLoss()
    run_loss.on_train_begin(None, TrainerState(global_step=4), None)
    run_loss.add(torch.tensor(1.5))
    assert run_loss.mean(5) is None
    begun = TrainerState(global_step=4, stateful_callbacks=[run_loss])
    run_loss.on_train_begin(None, begun, None)
    assert run_loss.mean(5) is None
    begun.stateful_callbacks["RunLoss"]["attributes"]["total"] = 1.0
    run_loss.on_train_begin(None, begun, None)
    run_loss.add(torch.tensor(1.5))
    assert run_loss.mean(5) == 0.5


def test_a_checkpoint_without_the_sum_is_gone_on_from_and_saved_again(tiny_model, rows, tmp_path):
    saving = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    _, whole, _ = trained(tiny_model, rows[:6], tmp_path / "a", **saving)
    state = tmp_path / "a/checkpoint-1/trainer_state.json"
    tree = json.loads(state.read_text())
    assert tree["stateful_callbacks"].pop("RunLoss")["attributes"]["total"] > 0
    state.write_text(json.dumps(tree))
    whole.train(resume_from_checkpoint=str(state.parent))
    assert whole.state.global_step == 3
    assert (tmp_path / "a/checkpoint-3/trainer_state.json").is_file()
    assert "loss" not in whole.summary()


def test_a_step_that_is_no_number_is_no_mean():
    run_loss = RunLoss()
    run_loss.add(torch.tensor(float("nan")))
    assert run_loss.mean(1) is None


def test_defect_13_every_target_counts_the_first_of_a_batch_too(tiny_model, tmp_path):
    """A Trainer that shifts labels would count 0 targets in a row of one, and 3 in these four."""
    ones = [random_record(f"one{i}", context=4, response=1, seed=50 + i) for i in range(4)]
    ours, trainer, _ = trained(tiny_model, ones, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    theirs, [loss] = by_hand(tiny_model, [ones])
    assert_same_weights(ours, theirs)
    assert trainer.summary()["last_loss"] == pytest.approx(loss, rel=1e-4)


def test_tokens_that_are_no_targets_weigh_nothing(tiny_model, tmp_path):
    masked = [random_record(f"m{i}", response=4, is_target=[1, 0, 0, i], seed=80 + i) for i in range(2)]
    ours, *_ = trained(tiny_model, masked, tmp_path, per_device_train_batch_size=2)
    assert_same_weights(ours, by_hand(tiny_model, [masked])[0])


def test_gradient_checkpointing_changes_no_gradient(tiny_model, rows, tmp_path):
    ours, *_ = trained(tiny_model, rows[:4], tmp_path, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert_same_weights(ours, by_hand(tiny_model, [rows[:4]])[0])


def test_cross_entropy_is_added_at_its_weight_and_at_temperature_1(tiny_model, rows):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    batch = collate(rows[:4])
    at_two = {"temperature": 2.0, "support": "renormalized"}
    without = target_losses(model, batch, LossConfig(**at_two))
    with_it = target_losses(model, batch, LossConfig(**at_two, cross_entropy_weight=0.25))
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    nll = torch.stack(
        [-full[r, t, label] for (r, t), label in zip(batch["target_index"], batch["labels"], strict=True)]
    )
    torch.testing.assert_close(with_it - without, 0.25 * nll, atol=1e-5, rtol=1e-5)


def test_cross_entropy_is_divided_by_the_targets_of_the_step_as_well(tiny_model, rows, tmp_path):
    loss = LossConfig(cross_entropy_weight=0.5)
    whole, *_ = trained(tiny_model, rows[:8], tmp_path / "a", loss, per_device_train_batch_size=8)
    split, *_ = trained(
        tiny_model, rows[:8], tmp_path / "b", loss, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    without, *_ = trained(tiny_model, rows[:8], tmp_path / "c", per_device_train_batch_size=8)
    assert_same_weights(split, whole)
    assert (without.lm_head.weight - whole.lm_head.weight).abs().max() > 1e-4


@pytest.mark.parametrize("option", [{"divergence": "jsd", "beta": 0.2}, {"support": "truncated"}])
def test_the_recipes_loss_is_the_one_that_trains(option, tiny_model, rows, tmp_path):
    _, trainer, _ = trained(tiny_model, rows[:8], tmp_path, LossConfig(**option), per_device_train_batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    expected = target_losses(model, collate(rows[:8]), LossConfig(**option)).mean()
    default = target_losses(model, collate(rows[:8]), LossConfig()).mean()
    assert trainer.summary()["last_loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert abs(float((expected - default).detach())) > 0.01


def test_the_bar_is_taken_down_whatever_ends_training(tiny_model, rows, tmp_path, monkeypatch):
    """A terminal would be left without its cursor; transformers calls no on_train_end where training raises."""
    ended = []

    class Bar(Progress):
        def __exit__(self, *error):
            ended.append(error[0])
            super().__exit__(*error)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bakery.student.trainer.Progress", Bar)
    trained(tiny_model, rows, tmp_path, max_steps=1)
    assert ended == [None]
    monkeypatch.setattr(DistillTrainer, "training_step", full)
    with pytest.raises(OSError, match="No space"):
        trained(tiny_model, rows, tmp_path, max_steps=1)
    assert ended == [None, OSError]
