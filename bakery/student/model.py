"""recipe.student -> the model that trains: whole, with layers dropped, or with LoRA adapters on it."""

from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from bakery.config import LoraSection, StudentConfig
from bakery.errors import DataError, RecipeError, first_line
from bakery.models import load_causal_lm
from bakery.student.dropping import drop_layers


def load_student(config: StudentConfig, device: str) -> Any:
    """`dtype: auto` is bfloat16 under LoRA on a GPU, else float32: full fine-tuning keeps float32 master weights."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.lora is not None and device.startswith("cuda") else "float32"
    model = load_causal_lm(
        config.model_name_or_path,
        revision=config.revision,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        **(_four_bits(dtype, device) if config.load_in_4bit else {}),
    )
    if config.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # bitsandbytes repacks weights on some CPUs in the first forward of eval mode, and gradients through
            # the repacked ones are silently wrong.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if config.drop_layers:
        drop_layers(model, config.drop_layers)
    if config.lora is not None:
        model = add_lora(model, config.lora, config.model_name_or_path, config.revision)
    return model if config.load_in_4bit else model.to(device)


def load_trained(model: Any, config: StudentConfig, path: Path) -> Any:
    """What training saved at `path`: adapters are put into `model`, whole models take its place.

    Raises DataError where that is damaged, RecipeError where it is of another student.
    """
    if not any(path.glob("*.safetensors")):
        raise DataError(f"{path} holds no weights")
    if config.lora is None:
        whole = load_causal_lm(str(path), revision=None, dtype="auto", trust_remote_code=config.trust_remote_code)
        return whole.to(model.device)
    try:
        weights = load((path / "adapter_model.safetensors").read_bytes())
    except (SafetensorError, FileNotFoundError) as error:
        raise DataError(f"{path}: its weights do not load: {first_line(error)}") from error
    try:
        loaded: Any = set_peft_model_state_dict(model, weights)
        others = loaded.unexpected_keys
    except RuntimeError as error:  # they have other sizes
        others = str(error).splitlines()[-1:]
    if others:
        raise RecipeError(
            f"{path} holds adapters that `student.lora` has not ({others[0].strip()}); take the run's own recipe"
        )
    return model


def _four_bits(dtype: str, device: str) -> dict[str, Any]:
    """QLoRA's base: NF4, its constants quantised as well. Dettmers 2023."""
    if not is_bitsandbytes_available():
        raise RecipeError("student.load_in_4bit needs bitsandbytes; pip install bakery[qlora]")
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": how, "device_map": {"": device}}


def add_lora(model: Any, lora: LoraSection, base: str, revision: str | None) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = lora.model_dump()
    if not isinstance(settings["target_modules"], str):
        settings["target_modules"] = list(settings["target_modules"])
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise RecipeError(f"student.lora: {first_line(error)}") from error
    # The base by the name that others know it by, not by where it was unpacked here.
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.peft_config["default"].revision = revision
    return adapted


def bare(model: Any) -> Any:
    """The transformers model under a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
