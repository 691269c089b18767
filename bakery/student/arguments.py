"""recipe.training -> transformers.TrainingArguments: the user's own names and values, over a few defaults of ours."""

from pathlib import Path
from typing import Any

from bakery.errors import RecipeError

# What differs from transformers' defaults, and why.
OURS: dict[str, Any] = {
    "remove_unused_columns": False,  # a record has no columns that a forward would name
    "prediction_loss_only": True,  # [N,V] logits are never gathered
    "logging_steps": 5,  # a curve worth looking at
    "report_to": "none",
}


def training_arguments(training: dict[str, Any], out: Path, device: str | None) -> Any:
    """On a GPU: bf16, unless the recipe chose a precision. `device` "cpu" keeps away from a GPU that is there."""
    import torch
    from transformers import TrainingArguments

    settings = {**OURS, "disable_tqdm": True, **training, "output_dir": str(out)}
    if device == "cpu":
        settings["use_cpu"] = True
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    settings.setdefault("dataloader_pin_memory", on_gpu)
    if on_gpu and not {"bf16", "fp16"} & training.keys():
        settings["bf16"] = True
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {(str(error).splitlines() or [''])[0]}") from error
