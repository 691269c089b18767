"""A whole training step of SmolLM2-135M on cached logits beside cross-entropy alone and a teacher in the loop.

python benchmarks/training_step.py                   on a CPU, float32
python benchmarks/training_step.py --device cuda     bfloat16

Each step reads its batch, runs forward and backward and lets AdamW move the weights. The cache is a real one, made here
by `bakery.cache_teacher`. Teacher and student are of one size: a larger teacher costs the loop more.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import Meter, machine
from passages import MODEL, make_cache, write_prompts
from torch.nn.functional import cross_entropy, kl_div

from bakery.config import LoraSection, LossConfig, StudentConfig
from bakery.heads import logits_at
from bakery.models import load_causal_lm
from bakery.student.batch_loss import BatchLoss, target_losses
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.model import bare, load_student

K = 64


def scored_passages(directory, rows, characters, device):
    prompts = write_prompts(directory / "prompts.jsonl", rows, characters)
    return make_cache(prompts, {"top_k": K, "dtype": "auto", "device": device}, out=str(directory / "cache"))


class Steps:
    """One student with its optimizer, moved by whichever loss is asked for; the teacher answers at the same targets."""

    def __init__(self, rows, lora, device, dtype):
        section = LoraSection() if lora else None
        config = StudentConfig(model_name_or_path=str(MODEL), lora=section, dtype=dtype)
        self.rows, self.device = rows, device
        self.student = load_student(config, device).train()
        self.teacher = load_causal_lm(str(MODEL), revision=None, dtype=dtype).to(device).eval()
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.loss, self.fused = LossConfig(), BatchLoss(LossConfig())

    def step(self, loss_of):
        batch = {name: x.to(self.device) for name, x in collate([self.rows[i] for i in range(len(self.rows))]).items()}
        (loss_of(batch) / len(batch["labels"])).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, model, batch):
        return logits_at(model, batch["input_ids"], batch["attention_mask"], batch["target_index"], bare(model))

    def cross_entropy(self, batch):
        return cross_entropy(self.logits(self.student, batch).float(), batch["labels"], reduction="sum")

    def cached_fused(self, batch):
        return self.fused(self.student, batch, bare(self.student))[0]

    def cached_plain(self, batch):
        return target_losses(self.student, batch, self.loss, bare(self.student)).sum()

    def online(self, batch):
        with torch.no_grad():
            logp = self.logits(self.teacher, batch).float().log_softmax(-1)
        return kl_div(self.logits(self.student, batch).float().log_softmax(-1), logp, log_target=True, reduction="sum")

    def calls(self):
        losses = {
            "cross-entropy alone": self.cross_entropy,
            "cached, fused": self.cached_fused,
            "cached, full logits": self.cached_plain,
            "teacher in the loop, dense forward KL (its weights counted)": self.online,
        }
        return {name: partial(self.step, loss) for name, loss in losses.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--characters", type=int, default=1000, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    print(machine(args.device, "transformers", "peft"))
    meter = Meter(args.device)
    with tempfile.TemporaryDirectory() as directory:
        reader = scored_passages(Path(directory), args.rows, args.characters, args.device)
        rows = CacheDataset([(reader, 1.0)], "train", 1.0)
        print(f"{len(rows)} sequences, {int(rows.lengths.sum()):,} tokens, {rows.targets:,} targets, K = {K}, {dtype}")
        for lora in (True, False):
            steps = Steps(rows, lora, args.device, dtype)
            results = meter.in_turns(steps.calls(), args.rounds, warm_up=1)
            *_, online = results
            weights = sum(weight.nbytes for weight in steps.teacher.parameters()) / 2**20
            results[online] = (results[online][0], results[online][1] + weights)
            seconds, mib = results["cross-entropy alone"]
            print(f"\n| {'LoRA' if lora else 'all weights'} | s | × CE | MiB | × CE |\n|---|---|---|---|---|")
            for name, (s, m) in results.items():
                print(f"| {name} | {s:.3g} | {s / seconds:.2f} | {m:,.0f} | {m / mib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
