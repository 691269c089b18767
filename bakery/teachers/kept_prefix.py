"""The keys and values of a prefix, run once and kept, for each batch that stands behind it.

Legend: B rows, H heads, L tokens of the prefix, D width of a head.
"""

from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bakery.records import Ids, ids_array

States = list[tuple[Tensor, Tensor]]  # keys and values [1,H,L,D], layer by layer


class KeptPrefix:
    """Of the prefix that was used last. What it gives are arguments of the model's forward."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        known = signature(self.decoder.forward).parameters
        # The name changed during transformers 5; a model that has neither has no such cache.
        self.argument = next((name for name in ("cache", "past_key_values") if name in known), "")
        self._last: tuple[bytes, States] = b"", []

    def _kept(self, prefix: bytes) -> States:
        if prefix != self._last[0]:
            self._last = prefix, self._run(prefix)
        return self._last[1]

    def _run(self, prefix: bytes) -> States:
        # Without a configuration every layer keeps all it saw; a sliding window is then the attention mask's affair.
        cache = DynamicCache()
        ids = torch.tensor(np.frombuffer(prefix, np.int32), dtype=torch.long, device=self.decoder.device)
        self.decoder(input_ids=ids[None], use_cache=True, **{self.argument: cache})
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def lent(self, prefix: Ids) -> dict[str, Any]:
        """For one forward over what stands behind the prefix, in any number of rows."""
        if not len(prefix):
            return {"use_cache": False}
        layers: list[Any] = [_Lent(*states) for states in self._kept(prefix.tobytes())]
        return {self.argument: Cache(layers=layers), "use_cache": True}

    def copied(self, prefix: Ids, padding: list[int]) -> dict[str, Any]:
        """For `generate`, which appends to it. Row b begins with `padding[b]` empty slots, as where rows are padded at
        the left, and holds as much of the prefix as then fits into L slots; the rest is for the caller to run."""
        if not len(prefix):
            return {}
        cache = DynamicCache()
        for layer, states in enumerate(self._kept(prefix.tobytes())):
            keys, values = (_behind(padding, kept) for kept in states)
            cache.update(keys, values, layer)
        return {self.argument: cache}

    def works(self) -> bool:
        """Whether keys and values are all that the model carries from token to token, and a few tokens come out behind
        a prefix as they do in one go."""
        if not self.argument or not _carries_only_keys_and_values(self.decoder.config):
            return False
        ids = torch.arange(12, device=self.decoder.device).expand(2, -1)
        with torch.inference_mode():
            whole = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 8:].float()
            lent = self.lent(ids_array(range(8)))
            behind = self.decoder(input_ids=ids[:, 8:], attention_mask=torch.ones_like(ids), **lent).last_hidden_state
        return torch.allclose(behind.float(), whole, atol=1e-3 + 1e-2 * float(whole.abs().max()), rtol=0)


def _carries_only_keys_and_values(config: Any) -> bool:
    """And what comes later leaves them as they are: no rotation that changes with the length of a sequence."""
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    rotations = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return layers <= {DynamicLayer, DynamicSlidingWindowLayer} and not rotations & {"dynamic", "longrope"}


def _behind(padding: list[int], kept_1HLD: Tensor) -> Tensor:
    length = kept_1HLD.shape[2]
    return torch.cat([torch.nn.functional.pad(kept_1HLD, (0, 0, empty, 0))[:, :, :length] for empty in padding])


class _Lent(DynamicLayer):
    """Keys and values of the prefix in front of any batch's own, which are not kept."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys_1HLD: Tensor, values_1HLD: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys_1HLD, values_1HLD, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (kept.expand(len(key_states), -1, -1, -1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
