"""How a transformers model is made to write, for a teacher and for a student alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from bakery.config import SamplingConfig
from bakery.heads import head_fed_with
from bakery.models import eval_mode
from bakery.records import Ids, ids_array


def end_ids(model: Any, eos_token_id: int | None) -> list[int]:
    """What ends a turn: by the bare model's own generation config, and by the tokenizer."""
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    return sorted({int(end) for end in (*ends, eos_token_id) if end is not None})


def generation_config(ends: list[int], sampling: SamplingConfig, **more: Any) -> GenerationConfig:
    closed = {"eos_token_id": ends, "pad_token_id": (ends or [0])[0], **more}
    greedy = sampling.temperature == 0
    how = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=not greedy, **how, **closed)


@contextmanager
def writing_with(model: Any, inner: Any, config: GenerationConfig) -> Iterator[None]:
    """`model`, whose bare self is `inner`, in eval mode and with these settings in place of its own, from which it
    would fill what a request leaves open: repetition penalties, top-k and more, which would falsify log-probs.

    Eval mode is also what keeps the key-value cache on where gradients are checkpointed. The head gets its hidden
    states contiguous: of the slice that `generate` hands it for the last position of B rows, torch makes B products
    with as many copies of the weight, where one product would do.
    """
    own, inner.generation_config = inner.generation_config, config
    try:
        with eval_mode(model), head_fed_with(inner, torch.Tensor.contiguous):
            yield
    finally:
        inner.generation_config = own


def through_end(tokens: Any, ends: list[int]) -> Ids:
    """The tokens up to the first end, that one included."""
    found = np.flatnonzero(np.isin(tokens, ends))
    return ids_array(tokens[: found[0] + 1] if len(found) else tokens)
