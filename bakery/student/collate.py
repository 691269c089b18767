"""Records -> tensors: padded, and through `predicting_positions` the only shift.

Legend: B rows, T longest row, N targets of all rows, K longest support here.
"""

from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from bakery.batching import padded
from bakery.records import Record, TopK, predicting_positions


class Batch(TypedDict, total=False):
    input_ids: Tensor  # int64 [B,T], padded at the right with 0
    attention_mask: Tensor  # int64 [B,T]
    target_index: Tensor  # int64 [N,2]: (row, position) whose output predicts the target
    labels: Tensor  # int64 [N]: the target tokens themselves, none masked
    topk_ids: Tensor  # int64 [N,K]
    topk_logprobs: Tensor  # float32 [N,K]; padding is -inf
    tail_logprob: Tensor  # float32 [N]
    log_norm: Tensor  # float32 [N], only at a temperature that the cache lists


def collate(records: list[Record]) -> Batch:
    """What the student reads of each record, and the teacher's distribution for each target, in order."""
    examples = [record.example for record in records]
    sequences = [np.concatenate([e.student_context, e.response]) for e in examples]
    input_ids, mask = padded(sequences)
    positions = [predicting_positions(len(e.student_context), e.is_target) for e in examples]
    rows = np.repeat(np.arange(len(records)), [len(p) for p in positions])
    topk_ids, topk_logprobs = _padded_supports([record.topk for record in records])
    arrays: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "target_index": np.stack([rows, np.concatenate(positions)], 1),
        "labels": np.concatenate([e.response[e.is_target] for e in examples]).astype(np.int64),
        "topk_ids": topk_ids,
        "topk_logprobs": topk_logprobs,
        "tail_logprob": np.concatenate([record.topk.tail_logprob for record in records]),
    }
    norms = [record.topk.log_norm for record in records]
    if all(norm.shape[1] == 1 for norm in norms):
        arrays["log_norm"] = np.concatenate(norms)[:, 0]
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}  # type: ignore[return-value]


def _padded_supports(topks: list[TopK]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged supports as rectangles [N,K]; where a support ends, id 0 at -inf."""
    size_N = np.concatenate([topk.support_size for topk in topks])
    ids_M = np.concatenate([topk.ids for topk in topks])
    logprobs_M = np.concatenate([topk.logprobs for topk in topks])
    shape = len(size_N), int(size_N.max())
    if len(ids_M) == shape[0] * shape[1]:  # none is shorter than another
        return ids_M.astype(np.int64).reshape(shape), logprobs_M.reshape(shape)
    real_NK = np.arange(shape[1]) < size_N[:, None]
    ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    ids[real_NK], logprobs[real_NK] = ids_M, logprobs_M
    return ids, logprobs
