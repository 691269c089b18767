"""Causal language models from disk or hub: safetensors only, fingerprinted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from bakery.errors import DataError, RecipeError, first_line
from bakery.files import out_of_files

DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
WEIGHTS = ["*.safetensors"]
BLOCK = 4096


def local_files(name: str, revision: str | None = None, *, weights: bool) -> Path:
    """The directory of a model: itself, or the hub's snapshot of it without any pickle. Raises RecipeError.

    `weights` may be hundreds of gigabytes, so they come only where they will be read.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = DESCRIPTION + WEIGHTS if weights else DESCRIPTION
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            f"model_name_or_path: {name} is no directory, and the hub has no such model: {first_line(error)}"
        ) from error


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    path = local_files(name, revision, weights=False)
    if not (path / "config.json").is_file():
        raise RecipeError(f"model_name_or_path: {name} holds no config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: {first_line(error)}") from error


def context_length(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def pick_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device {device} is none that torch knows; try cuda or cpu") from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {device}: torch finds {torch.cuda.device_count()} GPUs; leave it out, or say cpu")
    return device


def load_causal_lm(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **more: Any,
) -> Any:
    """Weights from safetensors, on the CPU unless `more` (for transformers' from_pretrained) says otherwise.

    Raises RecipeError where there are none, or where this machine lacks what the options need.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = local_files(name, revision, weights=True)
    if not any(path.glob("*.safetensors")):
        raise RecipeError(f"{name} holds no *.safetensors file; bakery loads weights from no other format: convert it")
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=kind,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **more,
        )
    except ImportError as error:
        raise RecipeError(f"{name}: {first_line(error)}") from error
    except (SafetensorError, OSError, ValueError) as error:
        if out_of_files(error):
            raise
        raise DataError(f"{name}: its weights do not load: {first_line(error)}") from error


def weights_fingerprint(name: str, revision: str | None = None) -> str:
    """sha256 over the configuration, every tensor's name, shape and type, and 4 KiB from the middle of each tensor.

    Training changes nearly every value of a tensor, so the sample tells two sets of weights apart without reading
    hundreds of gigabytes.
    """
    path = local_files(name, revision, weights=True)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for unstable in ("transformers_version", "_name_or_path", "_model_name_or_path"):
        config.pop(unstable, None)
    digest = sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(min(header_size, file.stat().st_size)))
            except ValueError as error:
                raise DataError(f"{file} is no safetensors file, or a cut one; fetch it again") from error
            header.pop("__metadata__", None)
            digest.update(json.dumps(header, sort_keys=True).encode())
            for tensor in sorted(header):
                start, end = header[tensor]["data_offsets"]
                stream.seek(8 + header_size + max(start, (start + end - BLOCK) // 2))
                digest.update(stream.read(min(BLOCK, end - start)))
    return digest.hexdigest()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Without dropout, which would also take random numbers from a run that has to be repeatable; then as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
