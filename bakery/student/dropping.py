"""A smaller student that starts from the big one: decoder layers go, and the config comes to tell of those left."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from bakery.errors import RecipeError, first_line

NUMBERS = ("mlp_only_layers", "moe_layers")  # lists of which layers, not of one entry per layer
Setting = bool | int | float | str | None


def drop_layers(model: Any, dropped: tuple[int, ...]) -> None:
    """Remove decoder layers in place and renumber the rest.

    Raises RecipeError for layers that are not there, and where no config can tell what is left: saved and loaded, it
    would be another model.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    layers = list(decoder.layers)
    if outside := [i for i in dropped if not 0 <= i < len(layers)]:
        raise RecipeError(f"student.drop_layers names layer {outside[0]}, the model has layers 0 to {len(layers) - 1}")
    kept = [i for i in range(len(layers)) if i not in set(dropped)]
    if not kept:
        raise RecipeError(f"student.drop_layers drops all {len(layers)} layers; keep at least one")
    decoder.layers = nn.ModuleList(layers[i] for i in kept)
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = number
    for name, value in config.to_dict().items():
        if name in NUMBERS:
            setattr(config, name, [kept.index(i) for i in value or () if i in kept])
        elif _is_per_layer(name, value, len(layers)):
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    _check_described(model)


def _is_per_layer(name: str, value: Any, layers: int) -> bool:
    """layer_types, no_rope_layers, indexer_types …; not eos_token_id, of whatever length it is."""
    return isinstance(value, list | tuple) and len(value) == layers and ("layer" in name or name.endswith("_types"))


def _check_described(model: Any) -> None:
    """Raises RecipeError unless the config, once it was written down, makes the model that is there."""
    name = type(model).__name__
    try:
        with torch.device("meta"):
            described = _structure(type(model)(type(model.config).from_dict(model.config.to_dict())))
    except (StrictDataclassError, ValueError, TypeError, LookupError) as error:
        raise RecipeError(
            f"student.drop_layers: no config of {name} describes what is left: {first_line(error)}"
        ) from error
    here = _structure(model)
    if others := sorted(part for part in here.keys() | described.keys() if here.get(part) != described.get(part)):
        raise RecipeError(
            f"student.drop_layers: no config of {name} describes what is left: loaded again, {others[0]} would be "
            f"another; drop other layers or none"
        )


def _structure(model: Any) -> dict[str, Any]:
    """The shape of each parameter; the kind of each part of a layer, and its settings."""
    parts = model.get_decoder().layers.named_modules(prefix="layers")
    kinds = {name: (type(part), _settings(part)) for name, part in parts}
    return kinds | {name: parameter.shape for name, parameter in model.named_parameters()}


def _settings(module: nn.Module) -> dict[str, Setting]:
    own = {name: value for name, value in vars(module).items() if name[0] != "_" and isinstance(value, Setting)}
    return own | {"training": False}
