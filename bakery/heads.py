"""A model's output layer: run at targets only, or known well enough to be run without the model.

It is known in two ways, each with its probe. For a teacher `Head` calls the layer, whatever it is made of, and shapes
logits in the architecture's own dtype. For a loss that makes gradients itself `lm_head` takes the weights out; `shaped`
then makes float32 of their products.

N targets, B rows, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from bakery.losses.heads import LMHead, shaped
from bakery.models import eval_mode


@contextmanager
def head_fed_with(model: Any, select: Any) -> Iterator[None]:
    """`select` between a bare model's hidden states and its head."""

    def narrow(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (select(args[0]), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: Any, input_ids: Any, attention_mask: Any, target_index: Any, head_of: Any = None) -> Any:
    """Logits [N,V] at the N (row, position) pairs of `target_index`, by the model's own forward.

    Only the head's input is narrowed, so soft-caps, logit scales and biases are the architecture's own, wrappers
    (peft, DDP, FSDP) keep working, and [B,T,V] never exists. `head_of` is the bare model when `model` wraps it.
    """
    rows, positions = target_index[:, 0], target_index[:, 1]
    bare = head_of or model
    with head_fed_with(bare, lambda hidden_BTH: hidden_BTH[rows, positions][None]):
        return model(**_inputs(bare, input_ids, attention_mask)).logits[0]


def _inputs(bare: Any, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "token_type_ids" in signature(bare.forward).parameters:  # Gemma 3 tells images from text by it: all is text
        inputs["token_type_ids"] = input_ids * 0
    return inputs


def hidden_at(model: Any, input_ids: Any, attention_mask: Any, target_index: Any, head_of: Any = None) -> Any:
    """What the head would read there, [N,H], in the dtype that it would multiply in; the arguments of `logits_at`.

    The model's own forward again, wrappers and all; its head is left a sequence of no tokens.
    """
    rows, positions = target_index[:, 0], target_index[:, 1]
    taken = []

    def take(hidden_BTH: Any) -> Any:
        hidden_NH, device = hidden_BTH[rows, positions], hidden_BTH.device.type
        autocast = torch.is_autocast_enabled(device)
        taken.append(hidden_NH.to(torch.get_autocast_dtype(device)) if autocast else hidden_NH)
        return hidden_BTH[:, :0]

    bare = head_of or model
    with head_fed_with(bare, take):
        model(**_inputs(bare, input_ids, attention_mask))
    return taken[0]


class Head:
    """Hidden states [N,H] -> logits [N,V], to be called in chunks of any size."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings()
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.scale = getattr(config, "logit_scale", None)  # Cohere
        self.divisor = getattr(config, "logits_scaling", None)  # Granite

    def __call__(self, hidden: Any) -> Any:
        logits = self.linear(hidden)
        if self.divisor:
            logits = logits / self.divisor
        if self.scale:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits

    def agrees_with(self, model: Any) -> bool:
        """Whether this is how the model makes its logits; an architecture with a trick of its own says no."""
        ids = torch.arange(8, device=model.device)[None]
        with torch.inference_mode():
            own = model(input_ids=ids, use_cache=False).logits.float()
            ours = self(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
        return torch.allclose(own, ours, atol=1e-3 + 1e-2 * float(own.abs().max()), rtol=0)


def lm_head(model: Any) -> LMHead:
    head = Head(model)
    scale = (head.scale or 1) / (head.divisor or 1)
    return LMHead(head.linear.weight, head.linear.bias, scale, head.softcap)


@torch.no_grad()
def knows_head(model: Any) -> bool:
    """Whether `lm_head` of a bare transformers model gives its logits, on eight tokens.

    Not where something sits on the output layer (an adapter, a quantised or a sharded weight), nor where the
    architecture has a trick of its own.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.dim() != 2:
        return False
    ids = torch.arange(8, device=model.device)[None]
    asked = (model, ids, torch.ones_like(ids), torch.stack([torch.zeros_like(ids[0]), ids[0]], 1))
    with eval_mode(model):
        own_NV, hidden_NH = logits_at(*asked), hidden_at(*asked)
    head, dtype = lm_head(model), hidden_NH.dtype
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    ours_NV = shaped(linear(hidden_NH, head.weight_VH.to(dtype), bias_V), head.scale, head.softcap, temperature=1)
    tolerance = 4 * torch.finfo(dtype).eps * float(own_NV.abs().max())
    return torch.allclose(own_NV.to(ours_NV.dtype), ours_NV, atol=tolerance, rtol=0)
