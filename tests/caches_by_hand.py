"""Small numbered records, the caches that they make through the real writer, and ways to damage one."""

import json
from pathlib import Path

import numpy as np
from builders import topk_of

from bakery.files import file_sha256
from bakery.records import Example, Record, TeacherInfo, ids_array
from bakery.shards.manifest import Identity
from bakery.shards.writer import CacheWriter

V, K = 32, 4
ARRAYS = ("student_context", "teacher_context", "response", "is_target")
SPARSE = ("ids", "logprobs", "support_size", "tail_logprob", "token_logprob", "log_norm")


def identity(**changes) -> Identity:
    fields = {
        "k": K,
        "top_mass": None,
        "vocab_size": V,
        "logprob_step": 0.0,
        "logprob_step_max": changes.get("logprob_step", 0.0),  # one step everywhere
        "temperatures": (),
        "teacher": TeacherInfo(backend="fake", name="by hand", revision=None, dtype="float32", fingerprint="f"),
        "tokenizer_fingerprint": "t",
        "template_sha": "c",
        "prefix_sha": "p",
        "prompts_sha": "q",
        "sampling": None,
        "validation_fraction": 0.0,
        "rows_per_shard": 70,
    }
    return Identity.model_validate(fields | changes)


def record(number: int, temperatures=(), vocab=V, k=K) -> Record:
    """Row `number`: 1 to 5 response tokens, of which the first is no target where there are several."""
    rng = np.random.default_rng(number)
    length = 1 + number % 5
    mask = np.arange(length) > 0 if length > 1 else np.ones(1, bool)
    response = ids_array(rng.integers(0, vocab, length))
    contexts = [ids_array(rng.integers(0, vocab, 1 + rng.integers(6))) for _ in range(2)]
    logits_NV = 3 * rng.standard_normal((mask.sum(), vocab))
    topk = topk_of(logits_NV, response[mask], k, temperatures)
    return Record(Example(f"row{number:04d}", *contexts, response, mask), topk, "dataset")


def write_cache(out: Path, records: list[Record], split=lambda record: "train", **changes) -> Path:
    with CacheWriter.open_or_resume(out, identity(**changes), {"made": "by hand"}) as writer:
        fill(writer, records, split)
    return out


def fill(writer: CacheWriter, records: list[Record], split=lambda record: "train") -> None:
    by_id = {r.example.id: r for r in records}
    for window in writer.windows([r.example for r in records]):
        if missing := writer.missing(window.examples):
            writer.add([by_id[e.id] for e in missing])
        writer.publish(window, [split(by_id[e.id]) for e in window.examples])
    writer.finish()


def bits(record: Record) -> tuple:
    """All of a record, comparable to the bit."""
    arrays = [getattr(record.example, name) for name in ARRAYS] + [getattr(record.topk, name) for name in SPARSE]
    return record.example.id, record.origin, *((str(a.dtype), a.shape, a.tobytes()) for a in arrays)


def files(directory: Path) -> dict[str, bytes]:
    """All that is in a directory, by path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def edit_manifest(cache: Path, change) -> None:
    """As a program with a bug would write it: nothing in it speaks against it."""
    tree = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    tree.pop("checksum", None)
    change(tree)
    (cache / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")


def trust(cache: Path, file: str) -> None:
    """Write a changed file's true size and checksum into the manifest, as whoever made it that way would."""

    def change(tree):
        for entry in (e for entries in tree["splits"].values() for e in entries if e["file"] == file):
            entry |= {"bytes": (cache / file).stat().st_size, "sha256": file_sha256(cache / file)}

    edit_manifest(cache, change)
