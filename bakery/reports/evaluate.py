"""How far a student is from the cached teacher, on rows that training never sees."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from bakery.batching import plan_batches
from bakery.heads import logits_at
from bakery.losses import sparse_loss
from bakery.models import eval_mode
from bakery.student.collate import collate
from bakery.student.dataset import CacheDataset
from bakery.student.model import bare

TOKENS_PER_BATCH = 2048
TARGETS_PER_CHUNK = 256  # whose logits exist in float32 at one time


class Measures(TypedDict):
    kl: float  # nats a target: KL(teacher ‖ student) over support and tail, a lower bound of the full KL; or, of a
    # sampled cache, the mean over draws of log p − log q: the full KL on average, with the noise of its draws
    perplexity: float  # of the student on the cached responses
    top1_agreement: float  # share of targets where both find the same token most likely (or most often drawn)


@torch.inference_mode()
def evaluate(model: Any, rows: CacheDataset, bf16: bool = False) -> Measures:
    """Means over all targets of `rows`, at temperature 1. `bf16` runs the forward under autocast."""
    device = bare(model).device
    kl = nll = agree = targets = 0.0
    support = "sampled" if rows.sampled else "tail_bucket"
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    with eval_mode(model), autocast:
        for batch in _batches(rows):
            on_cpu: Any = collate([rows[i] for i in batch])
            tensors = {name: tensor.to(device) for name, tensor in on_cpu.items()}
            index, ids, logprobs = (tensors[name] for name in ("target_index", "topk_ids", "topk_logprobs"))
            all_logits = logits_at(model, tensors["input_ids"], tensors["attention_mask"], index, bare(model))
            for at in torch.arange(len(index)).split(TARGETS_PER_CHUNK):
                logits, tail, labels = all_logits[at].float(), tensors["tail_logprob"][at], tensors["labels"][at]
                kl += float(sparse_loss(logits, ids[at], logprobs[at], tail_logprob_N=tail, support=support).sum())
                nll += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                agree += float((logits.argmax(-1) == ids[at, 0]).sum())
                targets += len(logits)
    mean_nll = torch.tensor(nll / targets, dtype=torch.float64)
    return {"kl": kl / targets, "perplexity": float(mean_nll.exp()), "top1_agreement": agree / targets}


def _batches(rows: CacheDataset) -> Iterator[NDArray[np.int64]]:
    """Of like length, window by window, so that rows larger than memory are decoded once."""
    for window in rows.windows():
        for batch in plan_batches(rows.lengths[window].tolist(), TOKENS_PER_BATCH):
            yield window[batch]
