"""A configuration of the first bakery, one flat mapping, as a recipe."""

from dataclasses import fields
from pathlib import Path

import yaml

from bakery.config import checked, read_tree
from bakery.errors import RecipeError
from bakery.old_names import MIGRATED, with_new_names

SECTIONS = ("teacher", "prompts", "sampling", "cache", "student", "loss", "on_policy", "training")
GONE = {
    "training_prompts": "put the prompts into a .jsonl file, one {\"prompt\": …} a line, and name it as prompts.path",
    "max_seq_length": "rows that are too long are refused by name, none is cut",
    "bnb_4bit_quant_type": "a four-bit base is always NF4",
    "bnb_4bit_use_double_quant": "a four-bit base always quantises its constants",
    "bias": "adapters have none",
    "eval_dataset_split": "prompts.validation_fraction holds rows out of the same file",
    "eval_file": "prompts.validation_fraction holds rows out of the same file",
    "heldout_file": "prompts.validation_fraction holds rows out of the same file",
    "corpus_file": "put the text into the prefix",
    "corpus_format": "put the text into the prefix",
    "system_prompt_template": "put the text into the prefix",
    "sequential_eval": "no teacher runs in stage two",
    "use_unsloth": "not used",
    "auto_install_optional_deps": "nothing is installed at run time",
}  # fmt: skip


def migrated(path: Path) -> str:
    """The recipe as YAML, with a comment for every key that has no counterpart. Raises RecipeError, also where the
    recipe would be refused."""
    from transformers import TrainingArguments

    old = read_tree(path)
    training = {field.name for field in fields(TrainingArguments) if field.init}
    notes, kept = [], {}
    for key, value in old.items():
        if key in SECTIONS and not isinstance(value, dict):
            raise RecipeError(f"{path}: `{key}` is {value!r:.60}; a section is a mapping, or is left out")
        if key in MIGRATED or key in SECTIONS:
            kept[key] = value
        elif key in GONE:
            notes.append(f"{key}: {GONE[key]}")
        elif key in training:
            kept.setdefault("training", {})[key] = value
        else:
            raise RecipeError(f"{path}: {key} is no key of the first bakery, nor of transformers.TrainingArguments")
    kept.setdefault("teacher_backend", "local_toggle")  # all there was
    if "training_prompts" in old and "dataset" not in old:
        kept["dataset"] = f"{path.stem}.jsonl"
    tree = with_new_names(kept, MIGRATED)
    tree.setdefault("cache", {"out": f"caches/{path.stem}"})
    tree.setdefault("training", {}).setdefault("output_dir", f"runs/{path.stem}")
    checked(tree, path)
    ordered = {name: tree[name] for name in SECTIONS if name in tree}
    head = "".join(f"# {note}\n" for note in [f"From {path.name}.", *notes])
    return head + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120)
