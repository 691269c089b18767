"""recipe.training -> transformers.TrainingArguments: the user's own names and values, over a few defaults of ours."""

from pathlib import Path
from typing import Any

from bakery.errors import RecipeError, first_line

# What differs from transformers' defaults, and why.
OURS: dict[str, Any] = {
    "remove_unused_columns": False,  # a record has no columns that a forward would name
    "prediction_loss_only": True,  # [N,V] logits are never gathered
    "logging_steps": 5,  # a curve worth looking at
    "logging_first_step": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def training_arguments(training: dict[str, Any], out: Path, device: str | None) -> Any:
    """On a GPU: bf16, unless the recipe chose a precision. `device` "cpu" keeps away from a GPU that is there.

    Raises RecipeError for a value that transformers cannot take, and for a GPU that is not there.
    """
    import torch
    from transformers import TrainingArguments

    if device not in (None, "cpu", "cuda"):
        raise RecipeError(f"--device {device}: a student trains on cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch finds no GPU; leave the flag out to train on the CPU")
    settings = {**OURS, **_typed(training), "output_dir": str(out)}
    if device == "cpu":
        settings["use_cpu"] = True
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    settings.setdefault("dataloader_pin_memory", on_gpu)
    if on_gpu and not {"bf16", "fp16"} & training.keys():
        settings["bf16"] = True
    try:
        args = TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {first_line(error)}") from error
    if args.world_size > 1:
        raise RecipeError(f"{args.world_size} processes: a student trains in one; start bakery without a launcher")
    if args.train_sampling_strategy == "batch_rebalance":
        raise RecipeError(
            "training.train_sampling_strategy=batch_rebalance evens out processes, and a student trains in one; "
            "group_by_length saves padding"
        )
    args._n_gpu = min(args.n_gpu, 1)  # nn.DataParallel would cut [N,…] tensors by rows
    return args


def _typed(training: dict[str, Any]) -> dict[str, Any]:
    """Numbers and switches checked by their declared type, which transformers itself does not do."""
    from dataclasses import fields

    from pydantic import TypeAdapter, ValidationError
    from transformers import TrainingArguments

    simple = {"int": int, "float": float, "bool": bool}
    kinds = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(TrainingArguments)}
    typed = dict(training)
    for key, value in training.items():
        kind = simple.get(kinds[key])
        if kind is None:
            continue
        try:
            typed[key] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"training.{key} is {value!r}: {error.errors()[0]['msg']}") from error
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"):
        if typed.get(key, 1) <= 0:
            raise RecipeError(f"training.{key} is {typed[key]}; it is above 0")
    return typed
