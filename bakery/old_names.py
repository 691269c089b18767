"""The flat names of the first bakery, and where each stands in a recipe now. docs/migration.md."""

from typing import Any

from bakery.errors import RecipeError

# These work in a recipe and as --set, too.
STILL_READ = {
    "teacher_backend": "teacher.backend",
    "teacher_top_k": "teacher.top_k",
    "teacher_model_name_or_path": "teacher.model_name_or_path",
    "teacher_api_base": "teacher.api.base_url",
    "teacher_api_key": "teacher.api.key_env",
    "teacher_api_model": "teacher.api.model",
    "teacher_torch_dtype": "teacher.dtype",
    "teacher_device": "teacher.device",
    "teacher_attn_implementation": "teacher.attn_implementation",
    "gkd_on_policy_fraction": "on_policy.fraction",
    "gkd_jsd_beta": "loss.beta",
}
MIGRATED = {
    **STILL_READ,
    "model_name_or_path": "student.model_name_or_path",
    "torch_dtype": "student.dtype",
    "trust_remote_code": "student.trust_remote_code",
    "attn_implementation": "student.attn_implementation",
    "load_in_4bit": "student.load_in_4bit",
    "r": "student.lora.r",
    "lora_alpha": "student.lora.lora_alpha",
    "lora_dropout": "student.lora.lora_dropout",
    "target_modules": "student.lora.target_modules",
    "system_prompt": "prompts.prefix.text",
    "system_prompt_file": "prompts.prefix.file",
    "prefix_messages": "prompts.prefix.messages",
    "prefix_messages_file": "prompts.prefix.file",
    "student_retained_turns": "prompts.student_retained_turns",
    "target_roles": "prompts.target_roles",
    "target_content_pattern": "prompts.target_content_pattern",
    "dataset": "prompts.path",
    "dataset_split": "prompts.split",
    "num_trajectories": "sampling.n",
    "trajectory_length": "sampling.max_new_tokens",
    "sampling_temperature": "sampling.temperature",
    "temperature": "loss.temperature",
}


def with_new_names(tree: dict[str, Any], names: dict[str, str] = STILL_READ) -> dict[str, Any]:
    """The tree with every old name moved to its place. Raises RecipeError where both are given and differ.

    β of the old loss was (1−β) KL(T‖S) + β KL(S‖T) over the renormalised top-k, so that is what it means here.
    """
    moved = {key: value for key, value in tree.items() if key not in names}
    for old in (key for key in names if key in tree):
        _put(moved, names[old].split("."), _value(old, tree[old]), old)
    if "gkd_jsd_beta" in names and "gkd_jsd_beta" in tree:
        for key, value in (("divergence", "mixed_kl"), ("support", "renormalized")):
            moved["loss"].setdefault(key, value)
    return moved


def _put(tree: dict[str, Any], path: list[str], value: Any, old: str) -> None:
    *parents, last = path
    for name in parents:
        below = tree.get(name)
        tree[name] = dict(below) if isinstance(below, dict) else {}
        tree = tree[name]
    if last in tree and tree[last] != value:
        raise RecipeError(f"{old} is {value!r} and {'.'.join(path)} is {tree[last]!r}; leave the old name out")
    tree[last] = value


def _value(old: str, value: Any) -> Any:
    if old == "target_modules" and value in ("all", ["all"], ["all-linear"]):
        return "all-linear"
    return value
