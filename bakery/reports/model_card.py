"""The README.md of what a run made: which cache, which teacher, which loss, how good."""

from typing import Any

from bakery.config import Recipe
from bakery.reports.table import measure_rows
from bakery.shards.reader import CacheReader


def run_facts(recipe: Recipe, caches: list[tuple[CacheReader, float]]) -> dict[str, str]:
    """What made this model, in words: for the card and for the report."""
    student, loss = recipe.section("student"), recipe.loss
    options = [f"temperature {loss.temperature}"]
    options += [f"beta {loss.beta}"] if loss.divergence in ("mixed_kl", "jsd", "scaled_jsd") else []
    options += [f"alpha {loss.alpha}"] if loss.divergence == "skew_kl" else []
    options += [f"plus {loss.cross_entropy_weight} × cross-entropy"] if loss.cross_entropy_weight else []
    facts = {
        "student": student.model_name_or_path
        + (f", without layers {list(student.drop_layers)}" if student.drop_layers else ""),
        "trained": "all weights"
        if student.lora is None
        else f"LoRA, rank {student.lora.r}, on {student.lora.target_modules}",
        "loss": f"{loss.divergence} on {loss.support}, {', '.join(options)}",
    }
    for number, (reader, weight) in enumerate(caches, start=1):
        manifest, teacher = reader.manifest, reader.manifest.teacher
        name = "cache" if len(caches) == 1 else f"cache {number}"
        kept = f"{manifest.draws} draws" if manifest.draws else f"top-{manifest.k}"
        facts[name] = f"{reader.path}, {kept}, {manifest.total('targets'):,} targets" + (
            f", weight {weight}" if weight != 1 else ""
        )
        facts[f"teacher of {name}"] = f"{teacher.name} ({teacher.backend}, {teacher.dtype}, {teacher.fingerprint[:16]})"
    return facts


def model_card(recipe: Recipe, facts: dict[str, str], metrics: dict[str, Any]) -> str:
    student = recipe.section("student")
    front = [
        f"base_model: {student.model_name_or_path}",
        "library_name: " + ("peft" if student.lora else "transformers"),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    card = "---\n" + "\n".join(front) + "\ntags:\n- bakery\n- knowledge-distillation\n---\n"
    card += "# A student distilled with bakery\n\n| | |\n|---|---|\n" + rows + "\n"
    if metrics["heldout"]:
        measured = "\n".join(f"| {' | '.join(row)} |" for row in measure_rows(metrics["heldout"]))
        head = "| measure | before | after | change |\n|---|---|---|---|\n"
        card += f"\nOn {metrics['heldout']['rows']} held-out rows:\n\n{head}{measured}\n"
    return card
