"""A teacher without a model: a made-up but fixed distribution after any two tokens. For tests and dry runs.

Its numbers come from numpy's Philox alone, so a cache it fills is the same on every machine.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from bakery.batching import plan_batches
from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import tokenizer_fingerprint, vocabulary_size
from bakery.records import Ids, Mask, TeacherInfo, TopK, content_id, ids_array, predicting_positions
from bakery.teachers.draws import Streams, drawn_by, sample_of
from bakery.teachers.protocol import Task, Written

SPREAD = 3.0  # standard deviation of the made-up logits
VERSION = 1


class FakeTeacher:
    """Scorer and Generator over the vocabulary of a real tokenizer."""

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        self.vocab_size = vocabulary_size(tokenizer)
        self.eos_token_id = tokenizer.eos_token_id
        self.temperatures, self.draws = temperatures, config.draws
        self.max_length: int | None = None
        self.tokens_per_batch = config.tokens_per_batch
        self.calls_in_flight = 1
        self.info = TeacherInfo(
            backend="fake",
            name=config.model_name_or_path,
            revision=config.revision,
            dtype="float32",
            fingerprint=content_id("fake", VERSION, tokenizer_fingerprint(tokenizer)),
        )
        self._logits = lru_cache(maxsize=65536)(self._fresh_logits)

    def plan(self, contexts: list[Ids], lengths: list[int], task: Task) -> list[list[int]]:
        return plan_batches(lengths, self.tokens_per_batch)

    def open(self) -> "FakeTeacher":
        return self

    def close(self) -> None:
        pass

    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        answers = []
        for context, response, target in zip(contexts, responses, targets, strict=True):
            sequence = np.concatenate([context, response])
            logits = [self._after(sequence[: at + 1]) for at in predicting_positions(len(context), target)]
            answers.append(self._kept(np.stack(logits), response[target], k, Streams([context], [response], k)))
        return answers

    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        return [self._write(context, sampling, k, seed) for context, seed in zip(contexts, seeds, strict=True)]

    def _write(self, context: Ids, sampling: SamplingConfig, k: int, seed: int) -> tuple[Ids, TopK]:
        rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
        tokens, seen = list(context), []
        for _ in range(sampling.max_new_tokens):
            seen.append(self._after(tokens))
            tokens.append(_sample(seen[-1], sampling, rng))
            if tokens[-1] == self.eos_token_id:
                break
        response = ids_array(tokens[len(context) :])
        return response, self._kept(np.stack(seen), response, k, Streams([context], [seed], k))

    def _after(self, tokens: Any) -> np.ndarray:
        return self._logits(int(tokens[-2]) if len(tokens) > 1 else -1, int(tokens[-1]))

    def _fresh_logits(self, before: int, last: int) -> np.ndarray:
        key = int(content_id("fake", VERSION, before, last)[:16], 16)
        return SPREAD * np.random.Generator(np.random.Philox(key=key)).standard_normal(self.vocab_size)

    def _kept(self, logits_NV: np.ndarray, labels_N: np.ndarray, k: int, stream: Streams) -> TopK:
        logp_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
        if self.draws:
            draws_ND = drawn_by(stream.next([0] * len(logp_NV))[:, 0], logp_NV)
            mean_N = np.take_along_axis(logp_NV, draws_ND, 1).mean(1)
            return sample_of(draws_ND, mean_N, logp_NV[np.arange(len(labels_N)), labels_N])
        order_NV = np.argsort(-logp_NV, axis=1, kind="stable")
        top_NK, rest = order_NV[:, :k], order_NV[:, k:]
        rest_logp = np.take_along_axis(logp_NV, rest, 1)
        tail_N = np.logaddexp.reduce(rest_logp, axis=1, initial=-np.inf)
        norm_NT = [np.logaddexp.reduce(logp_NV / t, axis=1) for t in self.temperatures]
        return TopK.from_rows(
            top_NK,
            np.take_along_axis(logp_NV, top_NK, 1),
            tail_N,
            logp_NV[np.arange(len(labels_N)), labels_N],
            np.stack(norm_NT, 1) if norm_NT else None,
        )


def _sample(logits: np.ndarray, sampling: SamplingConfig, rng: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = np.exp(logits / sampling.temperature - np.logaddexp.reduce(logits / sampling.temperature))
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1]
    return int(rng.choice(kept, p=p[kept] / p[kept].sum()))
