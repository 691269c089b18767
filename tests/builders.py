"""Records and caches with known numbers, made without a teacher."""

import json
from pathlib import Path

import numpy as np
from conftest import TINY_TOKENIZER

from bakery.records import Example, Record, TeacherInfo, TopK, ids_array
from bakery.shards.manifest import Identity
from bakery.shards.writer import CacheWriter


def topk_of(logits_NV, labels_N, k, temperatures=()):
    """The TopK of dense logits, in float64: softmax, sort, sum of the rest."""
    logits_NV = np.asarray(logits_NV, np.float64)
    logp_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    order_NV = np.argsort(-logp_NV, axis=1)
    top_NK = order_NV[:, :k]
    rest_NV = np.take_along_axis(np.exp(logp_NV), order_NV[:, k:], 1)
    with np.errstate(divide="ignore"):
        tail_N = np.log(rest_NV.sum(1))
    norm_NT = np.stack([np.logaddexp.reduce(logp_NV / t, axis=1) for t in temperatures], 1) if temperatures else None
    token_N = logp_NV[np.arange(len(labels_N)), labels_N]
    return TopK.from_rows(top_NK, np.take_along_axis(logp_NV, top_NK, 1), tail_N, token_N, norm_NT)


def random_record(
    key, context=5, response=6, k=8, vocab=259, seed=0, is_target=None, temperatures=(), teacher_context=None
):
    """Random tokens below 256 with a random teacher of `vocab` tokens."""
    rng = np.random.default_rng(seed)
    student, answer = ids_array(rng.integers(0, 256, context)), ids_array(rng.integers(0, 256, response))
    mask = np.ones(response, bool) if is_target is None else np.asarray(is_target, bool)
    teacher = student if teacher_context is None else ids_array(teacher_context)
    logits = 3 * rng.standard_normal((int(mask.sum()), vocab))
    topk = topk_of(logits, answer[mask], k, temperatures)
    return Record(Example(key, student, teacher, answer, mask), topk, "dataset")


def write_cache(out: Path, splits: dict[str, list[Record]], k=8, vocab=259, temperatures=(), **identity) -> Path:
    """A finished cache of these records, log-probs to the bit, for the tiny tokenizer."""
    from bakery.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint

    settings = {
        "k": k,
        "top_mass": None,
        "vocab_size": vocab,
        "logprob_step": 0,
        "logprob_step_max": identity.get("logprob_step", 0),  # one step everywhere
        "temperatures": temperatures,
        "teacher": TeacherInfo(backend="made", name="made-up", revision=None, dtype="float32", fingerprint="0" * 32),
        "tokenizer_fingerprint": tokenizer_fingerprint(load_tokenizer(str(TINY_TOKENIZER))),
        "template_sha": "",
        "prefix_sha": "",
        "prompts_sha": "",
        "sampling": None,
        "validation_fraction": 0.0,
        "rows_per_shard": 4096,
    }
    records = {record.example.id: (split, record) for split, rows in splits.items() for record in rows}
    with CacheWriter.open_or_resume(out, Identity(**(settings | identity)), {}) as writer:
        for window in writer.windows([record.example for _, record in records.values()]):
            rows = [records[example.id] for example in window.examples]
            writer.add([record for _, record in rows])
            writer.publish(window, [split for split, _ in rows])
        writer.finish()
    return out


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
