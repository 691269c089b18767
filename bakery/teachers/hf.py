"""A Hugging Face model as teacher: scores given responses, or writes its own and keeps what it sampled from."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bakery.batching import padded
from bakery.config import SamplingConfig, TeacherConfig
from bakery.generation import end_ids, generation_config, through_end, writing_with
from bakery.heads import Head, logits_at
from bakery.models import load_causal_lm, pick_device
from bakery.records import Ids, Mask, TopK, content_id, predicting_positions
from bakery.teachers.capture import Capture
from bakery.teachers.distributions import Keep, Rows, sample, top
from bakery.teachers.draws import Streams
from bakery.teachers.kept_prefix import KeptPrefix
from bakery.teachers.local import LocalTeacher
from bakery.teachers.protocol import Task, Written
from bakery.teachers.shared_prefix import SharedPrefixes

log = logging.getLogger("bakery")

# Targets whose logits exist in float32 at one time: 256 x 262,144 x 4 B = 268 MB.
TARGETS_PER_CHUNK = 256


class HFTeacher(LocalTeacher):
    """Scorer and Generator. Weights load at the first question."""

    backend = "hf"
    calls_in_flight = 2  # so that one is run while the answer of the other is copied, checked and handed on

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        super().__init__(config, tokenizer)
        self.temperatures = temperatures
        self.eos_token_id = tokenizer.eos_token_id
        self.planned = SharedPrefixes([])
        self.turn = Lock()  # the model's

    @property
    def dtype(self) -> str:
        stored = getattr(self.model_config, "dtype", None) or torch.float32
        return str(stored).removeprefix("torch.") if self.config.dtype == "auto" else self.config.dtype

    def plan(self, contexts: list[Ids], lengths: list[int], task: Task) -> list[list[int]]:
        """What the contexts of a plan share is run once, until the next plan."""
        self.planned = SharedPrefixes(contexts)
        return self.planned.batches(contexts, lengths, self.config.tokens_per_batch, lent=task == "score")

    def open(self) -> "HFTeacher":
        _ = self.model
        return self

    def close(self) -> None:
        for loaded in ("model", "head", "kept", "keeps"):
            self.__dict__.pop(loaded, None)
        self.planned = SharedPrefixes([])

    @cached_property
    def model(self) -> Any:
        model = load_causal_lm(
            self.config.model_name_or_path,
            revision=self.config.revision,
            dtype=self.config.dtype,
            trust_remote_code=self.config.trust_remote_code,
            attn_implementation=self.config.attn_implementation,
        )
        self.end_ids = end_ids(model, self.eos_token_id)
        return model.to(pick_device(self.config.device)).eval()

    @cached_property
    def head(self) -> Head | None:
        head = Head(self.model)
        if head.agrees_with(self.model):
            return head
        name = type(self.model).__name__
        log.warning(
            "%s makes its logits in a way the chunked head does not know: its own is used, a batch at once", name
        )
        return None

    @cached_property
    def kept(self) -> KeptPrefix:
        return KeptPrefix(self.model)

    @cached_property
    def keeps(self) -> bool:
        if keeps := self.head is not None and self.kept.works():
            return keeps
        name = type(self.model).__name__
        log.warning("%s cannot go on behind a prefix that was run before: each row runs its own", name)
        return False

    @property
    def shared(self) -> SharedPrefixes:
        return self.planned if self.planned and self.keeps else SharedPrefixes([])

    # -- given responses ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        parts, keep = list(zip(contexts, responses, targets, strict=True)), self._keep(contexts, responses, k)
        lengths = [len(context) + len(response) for context, response, _ in parts]
        summaries = []
        with self.turn:
            shared = self.shared
            # A call that was planned is one batch; any other may be more than memory holds.
            batches = shared.batches(contexts, lengths, self.config.tokens_per_batch, lent=True)
            for batch in batches:
                prefix = shared.of(*(contexts[i] for i in batch))
                summaries.append(self._score_batch(prefix, batch, [parts[i] for i in batch], keep))
            copy = Rows.joined(summaries).copy_begun()
        whole, start, answers = copy(), 0, {}
        for i in chain(*batches):
            end = start + int(targets[i].sum())
            answers[i], start = whole.rows(slice(start, end)).to_topk(), end
        return [answers[i] for i in range(len(parts))]

    def _score_batch(self, prefix: Ids, batch: list[int], parts: list[tuple[Ids, Ids, Mask]], keep: Keep) -> Rows:
        positions = [predicting_positions(len(context), target) for context, _, target in parts]
        # Nothing behind the last predicting position is ever read.
        sequences = [np.concatenate(p[:2])[: at[-1] + 1] for p, at in zip(parts, positions, strict=True)]
        input_ids, mask = self._tensors(*padded(sequences))
        rows = np.repeat(np.arange(len(parts)), [len(at) for at in positions])
        index = np.stack([rows, np.concatenate(positions)], 1)
        index, labels = self._tensors(index, np.concatenate([r[t] for _, r, t in parts]).astype(np.int64))
        if self.head is None:
            chunks = logits_at(self.model, input_ids, mask, index).split(TARGETS_PER_CHUNK)
        else:
            behind = {"input_ids": input_ids[:, len(prefix) :], "attention_mask": mask, **self.kept.lent(prefix)}
            run = self.model.get_decoder()(**behind)
            hidden = run.last_hidden_state[index[:, 0], index[:, 1] - len(prefix)]
            chunks = map(self.head, hidden.split(TARGETS_PER_CHUNK))
        numbers = torch.as_tensor(np.asarray(batch)[rows])
        pieces = zip(chunks, *(x.split(TARGETS_PER_CHUNK) for x in (labels, numbers)), strict=True)
        return Rows.joined([keep(*piece) for piece in pieces])

    def _keep(self, contexts: list[Ids], behind: Sequence[Any], k: int) -> Keep:
        if self.config.draws:
            return sample(Streams(contexts, behind, k), self.vocab_size)
        return top(k, self.vocab_size, self.temperatures)

    def _tensors(self, *arrays: np.ndarray) -> list[Any]:
        return [torch.as_tensor(array, device=self.model.device) for array in arrays]

    # -- responses of its own ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        """One random stream serves the batch, seeded by all of its seeds."""
        with self.turn:
            keep = self._keep(contexts, seeds, k)
            tokens, copy = self._write(contexts, sampling, keep, int(content_id(*seeds)[:15], 16))
        summary, answers = copy(), []
        for row, written in enumerate(tokens.numpy()):
            response = through_end(written, self.end_ids)
            steps = slice(row, len(response) * len(contexts), len(contexts))
            answers.append((response, summary.rows(steps).to_topk()))
        return answers

    def _write(
        self, contexts: list[Ids], sampling: SamplingConfig, keep: Keep, seed: int
    ) -> tuple[Tensor, Callable[[], Rows]]:
        """New tokens [B,T], and a summary of what they were sampled from: T steps of B rows each, end to end."""
        input_ids, mask = self._tensors(*padded(contexts, left=True))
        prefix, padding = self.shared.of(*contexts), [input_ids.shape[1] - len(context) for context in contexts]
        capture = Capture(keep, self.vocab_size)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        config = generation_config(self.end_ids, sampling)
        with torch.random.fork_rng(devices=devices), writing_with(self.model, self.model, config):
            torch.manual_seed(seed)
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([capture]),
                **self.kept.copied(prefix, padding),
            )
        return sequences[:, input_ids.shape[1] :].cpu(), Rows.joined(capture.finish(sequences)).copy_begun()
