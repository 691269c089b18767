"""Hidden states × LM head -> loss, a chunk of targets at a time, the gradients made on the way: [N,V] never exists.

N targets, n those of one chunk, K support, V vocabulary, H hidden, C columns: the support, and the label where a loss
reads it. The idea is that of the tail bucket once more: the tokens that a loss does not read one by one are merged into
one. On the C + 1 logits that are left, a loss of this package is the same number as on all V. docs/losses.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bakery.errors import RecipeError
from bakery.losses import check_loss_options
from bakery.losses.divergences import divergence_between
from bakery.losses.heads import AllRows, GatheredRows, Gradients, LMHead, shaped
from bakery.losses.supports import MASKED, SUPPORTS, teacher_at

TARGETS_PER_CHUNK = 256  # on a CPU, measured: docs/benchmarks.md
TARGETS_PER_GPU_CHUNK = 1024  # a guess: enough rows to keep its matrix units busy

LossOf = Callable[[Tensor, slice], Tensor]  # (logits of the columns and the rest, which targets) -> loss_n


def fused_loss(
    hidden_NH: Tensor,
    head: LMHead,
    topk_ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    labels_N: Tensor | None = None,
    *,
    tail_logprob_N: Tensor | None = None,
    log_norm_N: Tensor | None = None,
    support: str = "tail_bucket",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(Σ loss, loss_N), nats: `sparse_loss` of the head's logits, plus the labels' cross-entropy.

    Only the sum has a gradient, made here in the forward pass: by the hidden states, and by the head's weight and bias
    where they want one. loss_N is for the record, and a backward through it raises.

    The head multiplies in the dtype of hidden_NH, as under autocast (float16 in float32: its gradients would want a
    scale that is known only later). All else is float32; float64 stays float64. `cross_entropy_weight` times
    −log q(label) at temperature 1 is added. The other arguments are those of `sparse_loss`. Raises RecipeError.
    """
    check_loss_options(support, divergence, beta, alpha, temperature)
    reads_label = cross_entropy_weight > 0 or support == "residual_to_label"
    if reads_label and labels_N is None:
        cause = "cross_entropy_weight" if cross_entropy_weight else "support residual_to_label"
        raise RecipeError(f"loss.{cause} needs the actual tokens, got none; pass labels_N")
    teacher = teacher_at(temperature, topk_logprobs_NK, tail_logprob_N, log_norm_N, support, len(head.weight_VH))
    logp_NK, tail_N = (logp.to(torch.promote_types(hidden_NH.dtype, torch.float32)) for logp in teacher)
    columns_NC, live_NC, place_N = _columns(topk_ids_NK, logp_NK > -torch.inf, labels_N if reads_label else None)

    def divergence_of(logits_nC: Tensor, rows: slice) -> Tensor:
        ids_nK = torch.arange(logp_NK.shape[1], device=logits_nC.device).expand(len(logits_nC), -1)
        logp_nB, logq_nB = SUPPORTS[support](logits_nC, ids_nK, logp_NK[rows], tail_N[rows], place_N[rows])
        return divergence_between(logp_nB, logq_nB, divergence, beta, alpha)

    def cross_entropy_of(logits_nC: Tensor, rows: slice) -> Tensor:
        return cross_entropy_weight * cross_entropy(logits_nC, place_N[rows], reduction="none")

    losses: dict[float, list[LossOf]] = {temperature: [divergence_of]}
    if cross_entropy_weight:
        losses.setdefault(1.0, []).append(cross_entropy_of)
    reader = GatheredRows if support == "renormalized" and not cross_entropy_weight else AllRows
    sources = (hidden_NH, head.weight_VH, head.bias_V)
    needed = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in sources)
    return _Fused.apply(*sources, head, _Question(columns_NC, live_NC, losses, reader), needed)


@dataclass(frozen=True)
class _Question:
    """Of each target: which tokens are read, and the losses at each temperature of the logits."""

    columns_NC: Tensor
    live_NC: Tensor
    losses: dict[float, list[LossOf]]
    reader: type[AllRows] | type[GatheredRows]

    def loss_of(self, rows: slice, hidden_nH: Tensor, head: LMHead, gradients: Gradients | None) -> Tensor:
        """loss_n of one chunk, whose part it adds to the gradients, if any are wanted."""
        loss_n = torch.zeros((), device=hidden_nH.device)
        for temperature, losses in self.losses.items():
            chunk = self.reader(hidden_nH, head, self.columns_NC[rows])
            with torch.set_grad_enabled(gradients is not None):
                at_nC, *rest = (x.detach().requires_grad_(gradients is not None) for x in chunk.read(temperature))
                logits_nC = shaped(at_nC, head.scale, head.softcap, temperature)
                logits_nC = torch.cat([logits_nC.masked_fill(~self.live_NC[rows], MASKED), *rest], -1)
                here_n = torch.stack([loss(logits_nC, rows) for loss in losses]).sum(0)
                total = here_n.sum()
            loss_n = loss_n + here_n.detach()
            if gradients is not None:
                chunk.give(gradients, rows, *torch.autograd.grad(total, [at_nC, *rest]))
        return loss_n


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Any, head: LMHead, asked: _Question, needed: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if hidden_NH.dtype == torch.float16 else hidden_NH.dtype
        head = head._replace(weight_VH=weight_VH.to(dtype), bias_V=None if bias_V is None else bias_V.to(dtype))
        gradients = Gradients(needed, hidden_NH, weight_VH, bias_V) if any(needed) else None
        loss_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.promote_types(dtype, torch.float32))
        size = TARGETS_PER_GPU_CHUNK if hidden_NH.is_cuda else TARGETS_PER_CHUNK
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(hidden_NH), size):
                rows = slice(start, start + size)
                loss_N[rows] = asked.loss_of(rows, hidden_NH[rows].to(dtype), head, gradients)
        ctx.gradients, ctx.dtypes = gradients, [x if x is None else x.dtype for x in (hidden_NH, weight_VH, bias_V)]
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_loss_N: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a fused loss has its gradients once, from its forward pass; call fused_loss again")
        sums = (gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        scaled = (
            None if x is None else x.mul_(grad_total).to(dtype) for x, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _columns(ids_NK: Tensor, real_NK: Tensor, labels_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(the columns' token ids, which of them count, the label's place among them).

    Padding points at the row's first id and does not count; nor does the label's own column where the support has it.
    """
    ids_NK = torch.where(real_NK, ids_NK, ids_NK[:, :1])
    if labels_N is None:
        return ids_NK, real_NK, torch.zeros_like(ids_NK[:, 0])
    is_label_NK = ids_NK == labels_N.unsqueeze(-1)  # at padding only where at the first, which argmax takes
    inside_N = is_label_NK.any(-1)
    place_N = torch.where(inside_N, is_label_NK.int().argmax(-1), ids_NK.shape[1])
    columns = torch.cat([ids_NK, labels_N.unsqueeze(-1)], -1)
    return columns, torch.cat([real_NK, ~inside_N.unsqueeze(-1)], -1), place_N
