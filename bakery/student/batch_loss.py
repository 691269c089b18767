"""A batch -> its loss in nats: fused with the student's head where that is known, else on full logits.

N targets, V vocabulary.
"""

import logging
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from bakery.config import LossConfig
from bakery.heads import hidden_at, knows_head, lm_head, logits_at
from bakery.losses import sparse_loss
from bakery.losses.fused import fused_loss
from bakery.student.collate import Batch


class BatchLoss:
    """The recipe's divergence plus `cross_entropy_weight` times the label's cross-entropy, for one student.

    Whether its head is known is asked at the first batch, when the model is on its device and in its wrappers.
    """

    def __init__(self, loss: LossConfig) -> None:
        self.loss = loss
        self.known: bool | None = None

    def __call__(self, model: Any, batch: Batch, head_of: Any = None) -> tuple[Tensor, Tensor]:
        """(their sum, nats per target [N]), of which only the sum is sure to have a gradient."""
        inner = head_of or model
        if self.known is None:
            self.known = knows_head(inner)
            if not self.known:
                logging.getLogger("bakery").warning(
                    "the output layer of %s, a %s, is none that the fused loss knows: full logits are used instead, "
                    "which take more memory",
                    type(inner).__name__,
                    "{0.__module__}.{0.__qualname__}".format(type(inner.get_output_embeddings())),
                )
        if not self.known:
            loss_N = target_losses(model, batch, self.loss, head_of)
            return loss_N.sum(), loss_N
        hidden_NH = hidden_at(model, batch["input_ids"], batch["attention_mask"], batch["target_index"], head_of)
        weight = self.loss.cross_entropy_weight
        return fused_loss(hidden_NH, lm_head(inner), **_both_sides(batch, self.loss), cross_entropy_weight=weight)


def target_losses(model: Any, batch: Batch, loss: LossConfig, head_of: Any = None) -> Tensor:
    """Nats per target [N] the plain way, which any head allows: from logits [N,V]."""
    logits_NV = logits_at(model, batch["input_ids"], batch["attention_mask"], batch["target_index"], head_of)
    loss_N = sparse_loss(logits_NV, **_both_sides(batch, loss))
    if loss.cross_entropy_weight:
        nll_N = cross_entropy(logits_NV.float(), batch["labels"], reduction="none")
        loss_N = loss_N + loss.cross_entropy_weight * nll_N
    return loss_N


def _both_sides(batch: Batch, loss: LossConfig) -> dict[str, Any]:
    return {
        "topk_ids_NK": batch["topk_ids"],
        "topk_logprobs_NK": batch["topk_logprobs"],
        "labels_N": batch["labels"],
        "tail_logprob_N": batch["tail_logprob"],
        "log_norm_N": batch.get("log_norm"),
        **loss.model_dump(exclude={"cross_entropy_weight"}),
    }
