"""The head and the loss alone, forward + backward: fused beside cross-entropy and dense losses (docs/benchmarks.md).

python benchmarks/fused_loss.py                    on a CPU, float32
python benchmarks/fused_loss.py --device cuda --sizes 8192x49152 32768x49152 8192x262144 32768x262144    bfloat16
python benchmarks/fused_loss.py --dtype bfloat16 --rounds 1 --warm-up 0 --only "tail bucket" --sizes 32768x262144

TRL's and Liger's losses are measured where `trl` and `liger-kernel` are installed (--no-deps is enough).
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from measuring import Meter, machine
from torch.nn.functional import cross_entropy, kl_div, linear

from bakery.losses import sparse_loss
from bakery.losses.fused import fused_loss
from bakery.losses.heads import LMHead

HIDDEN, K = 576, 64  # SmolLM2-135M's width
MICRO = 2048  # targets of one micro-batch, where all at once do not fit


@dataclass
class Problem:
    """A student a little off its teacher: random hidden states times one head, logits with a deviation of 3."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    tail: torch.Tensor
    labels: torch.Tensor
    frozen: bool = False

    @classmethod
    def draw(cls, n, v, device, dtype):
        torch.manual_seed(0)
        weight = torch.randn(v, HIDDEN, device=device) / HIDDEN**0.5
        teacher_hidden = 3 * torch.randn(n, HIDDEN, device=device)
        hidden = teacher_hidden + torch.randn(n, HIDDEN, device=device)
        parts = [cls._topk(part @ weight.T) for part in teacher_hidden.split(128)]
        ids, logprobs, tail, labels = (torch.cat(x) for x in zip(*parts, strict=True))
        return cls(hidden.to(dtype), weight.to(dtype), teacher_hidden.to(dtype), ids, logprobs, tail, labels)

    @staticmethod
    def _topk(logits):
        logprobs, ids = logits.topk(K)
        norm = logits.logsumexp(-1, keepdim=True)
        tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - norm[:, 0]
        return ids, logprobs - norm, tail, logits.softmax(-1).multinomial(1)[:, 0]

    def leaves(self, rows=slice(None)):
        """Fresh ones, so that each call makes its own gradients; the head's where it trains."""
        return self.hidden[rows].detach().requires_grad_(), self.weight.detach().requires_grad_(not self.frozen)

    def sparse(self):
        return {"topk_ids_NK": self.ids, "topk_logprobs_NK": self.logprobs, "tail_logprob_N": self.tail}

    # -- what is compared --------------------------------------------------------------------------------------------

    def cross_entropy(self, targets=None):
        """In one go, or in micro-batches of `targets`, whose gradients add up."""
        weight = self.weight.detach().requires_grad_(not self.frozen)
        for start in range(0, len(self.hidden), targets or len(self.hidden)):
            rows = slice(start, start + (targets or len(self.hidden)))
            hidden = self.hidden[rows].detach().requires_grad_()
            cross_entropy(linear(hidden, weight).float(), self.labels[rows], reduction="sum").backward()

    def dense_forward_kl(self):
        hidden, weight = self.leaves()
        logq, logp = linear(hidden, weight).float().log_softmax(-1), self.teacher_logits.float().log_softmax(-1)
        kl_div(logq, logp, log_target=True, reduction="sum").backward()

    def trl_jsd(self):
        from trl.experimental.gkd import GKDTrainer

        hidden, weight = self.leaves()
        GKDTrainer.generalized_jsd_loss(linear(hidden, weight), self.teacher_logits, beta=0.5).backward()

    def liger_jsd(self):
        """Takes hidden states of the teacher and multiplies them by the teacher's head as it goes."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        hidden, weight = self.leaves()
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=hidden.is_cuda)
        loss(hidden, weight, self.teacher_hidden, self.weight, self.labels).backward()

    def plain(self):
        hidden, weight = self.leaves()
        sparse_loss(linear(hidden, weight), **self.sparse()).sum().backward()

    def fused(self, **options):
        hidden, weight = self.leaves()
        fused_loss(hidden, LMHead(weight), **self.sparse(), labels_N=self.labels, **options)[0].backward()

    @property
    def teacher_logits(self):
        """[N,V], there before the clock starts: a cache would have to hold them."""
        if not hasattr(self, "_teacher_logits"):
            self._teacher_logits = linear(self.teacher_hidden, self.weight)
        return self._teacher_logits


# name -> (what runs, how many [N,V] float32 tensors it was seen to need at once, the teacher's logits among them)
METHODS = {
    "cross-entropy": (Problem.cross_entropy, 3),
    "dense generalised JSD (TRL)": (Problem.trl_jsd, 13),
    "fused JSD (Liger)": (Problem.liger_jsd, 0),
    "dense forward KL": (Problem.dense_forward_kl, 7),
    "sparse forward KL, full logits": (Problem.plain, 6),
    "fused, tail bucket, forward KL": (Problem.fused, 0),
    "fused, JSD": (partial(Problem.fused, divergence="jsd"), 0),
    "fused, forward KL + cross-entropy": (partial(Problem.fused, cross_entropy_weight=0.1), 0),
    "fused, renormalised (K rows of the head)": (partial(Problem.fused, support="renormalized"), 0),
}
OTHERS = {"dense generalised JSD (TRL)": "trl", "fused JSD (Liger)": "liger_kernel"}


def installed(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def compare(n, v, args, meter, dtype):
    problem = Problem.draw(n, v, args.device, dtype)
    calls, notes = {}, {}
    for name, (call, tensors) in METHODS.items():
        if args.only and name != "cross-entropy" and not any(part in name for part in args.only):
            continue
        if name in OTHERS and not installed(OTHERS[name]):
            notes[name] = "not installed"
        elif tensors * n * v * 4 > 0.8 * meter.free_bytes():
            notes[name] = f"does not fit ({tensors * n * v * 4 / 2**30:.0f} GiB)"
        else:
            calls[name] = call
    base = "cross-entropy"
    if base in notes:
        base = f"cross-entropy, {n // MICRO} micro-batches of {MICRO:,}"
        calls = {base: partial(Problem.cross_entropy, targets=MICRO), **calls}
    if any("dense" in name for name in calls):
        _ = problem.teacher_logits
    columns = {}
    for frozen in (False, True):
        problem.frozen = frozen
        bound = {name: partial(call, problem) for name, call in calls.items()}
        columns[frozen] = meter.in_turns(bound, args.rounds, args.warm_up)
    print(
        f"\nN = {n:,}, V = {v:,}, H = {HIDDEN}, K = {K}, {str(dtype).removeprefix('torch.')}, medians of {args.rounds}"
    )
    print("\n| | s | × CE | MiB | head frozen: s | × CE | MiB |\n|---|---|---|---|---|---|---|")
    for name in [*calls, *notes]:
        cells = [notes[name]] if name in notes else []
        for frozen in (False, True) if name in calls else ():
            seconds, mib = columns[frozen][name]
            cells += [f"{seconds:.3g}", f"{seconds / columns[frozen][base][0]:.2f}", f"{mib:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def agreement(v, args, dtype):
    """Value and gradients of the fused loss against dense float64 formulas, on 128 targets."""
    problem = Problem.draw(128, v, args.device, dtype)
    hidden, weight = problem.leaves()
    total, loss_N = fused_loss(hidden, LMHead(weight), **problem.sparse())
    ours = torch.autograd.grad(total, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    q_NV = linear(*exact).softmax(-1)
    q_NK, p_NK = q_NV.gather(-1, problem.ids), problem.logprobs.double().exp()
    rest_N = q_NV.scatter(-1, problem.ids, 0).sum(-1)
    tail_N = problem.tail.double()
    want_N = (p_NK * (p_NK / q_NK).log()).sum(-1) + tail_N.exp() * (tail_N - rest_N.log())
    theirs = torch.autograd.grad(want_N.sum(), exact)
    worst, whole = (loss_N - want_N).abs().max().item(), (loss_N.sum() / want_N.sum() - 1).abs().item()
    print(
        f"V = {v:,}: sum off by {whole:.1e} of it, the worst target by {worst:.1e} nats of {want_N.mean().item():.2f}"
    )
    for name, a, b in zip(("hidden states", "head"), ours, theirs, strict=True):
        cosine = torch.cosine_similarity(a.double().flatten(), b.flatten(), 0).item()
        print(f"V = {v:,}: 1 − cosine of the gradient of the {name}: {1 - cosine:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", default=["2048x49152"], help="targets x vocabulary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="cross-entropy, and rows whose names hold one of these")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, bfloat16 on a GPU")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    print(machine(args.device, "trl", "liger-kernel"))
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    for v in sorted({v for _, v in sizes}):
        agreement(v, args, dtype)
    for n, v in sizes:
        compare(n, v, args, Meter(args.device), dtype)


if __name__ == "__main__":
    main()
