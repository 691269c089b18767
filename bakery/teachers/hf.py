"""A Hugging Face model as teacher: scores given responses, or writes its own and keeps what it sampled from."""

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bakery.batching import plan_batches
from bakery.config import SamplingConfig, TeacherConfig
from bakery.models import Head, context_length, load_causal_lm, load_config, logits_at, pick_device, weights_fingerprint
from bakery.prompts.tokenizers import vocabulary_size
from bakery.records import Ids, Mask, TeacherInfo, TopK, content_id, ids_array, predicting_positions
from bakery.teachers.distributions import Summary, summarize
from bakery.teachers.protocol import Task, Written

# Targets whose logits exist in float32 at one time: 256 x 262,144 x 4 B = 268 MB.
TARGETS_PER_CHUNK = 256


class HFTeacher:
    """Scorer and Generator. Weights load at the first question."""

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        self.config = config
        self.temperatures = temperatures
        model_config = load_config(config.model_name_or_path, config.revision, config.trust_remote_code)
        stored_dtype = str(getattr(model_config, "dtype", None) or torch.float32).removeprefix("torch.")
        self.info = TeacherInfo(
            backend="hf",
            name=config.model_name_or_path,
            revision=config.revision,
            dtype=stored_dtype if config.dtype == "auto" else config.dtype,
            fingerprint=weights_fingerprint(config.model_name_or_path, config.revision),
        )
        # Ids past the tokenizer's last token are padding of the output layer.
        self.vocab_size = min(model_config.get_text_config().vocab_size, vocabulary_size(tokenizer))
        self.max_length = context_length(model_config)
        self.tokens_per_batch = config.tokens_per_batch
        self.calls_in_flight = 1
        self.eos_token_id = tokenizer.eos_token_id

    def rows_per_call(self, task: Task) -> None:
        return None

    def open(self) -> "HFTeacher":
        _ = self.model
        return self

    @cached_property
    def model(self) -> Any:
        model = load_causal_lm(
            self.config.model_name_or_path,
            revision=self.config.revision,
            dtype=self.config.dtype,
            trust_remote_code=self.config.trust_remote_code,
        )
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = sorted({int(e) for e in (*ends, self.eos_token_id) if e is not None})
        # transformers fills whatever a request leaves open from here, and some of it would falsify the log-probs.
        model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=(self.end_ids or [0])[0])
        return model.to(pick_device(self.config.device)).eval()

    @cached_property
    def head(self) -> Head | None:
        head = Head(self.model)
        if head.agrees_with(self.model):
            return head
        logging.getLogger("bakery").warning(
            "%s makes its logits in a way the chunked head does not know: its own is used, a whole batch at a time",
            type(self.model).__name__,
        )
        return None

    # -- given responses ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        lengths = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
        answers: dict[int, TopK] = {}
        for batch in plan_batches(lengths, self.tokens_per_batch):
            parts = [(contexts[i], responses[i], targets[i]) for i in batch]
            answers |= dict(zip(batch, self._score_batch(parts, k), strict=True))
        return [answers[i] for i in range(len(contexts))]

    def _score_batch(self, parts: list[tuple[Ids, Ids, Mask]], k: int) -> list[TopK]:
        positions = [predicting_positions(len(context), target) for context, _, target in parts]
        # Nothing behind the last predicting position is ever read.
        sequences = [np.concatenate(p[:2])[: at[-1] + 1] for p, at in zip(parts, positions, strict=True)]
        input_ids, mask = self._padded(sequences, left=False)
        rows = np.repeat(np.arange(len(parts)), [len(at) for at in positions])
        index = torch.as_tensor(np.stack([rows, np.concatenate(positions)], 1), device=self.model.device)
        labels = torch.as_tensor(np.concatenate([r[t] for _, r, t in parts]), device=self.model.device).long()
        if self.head is None:
            chunks = logits_at(self.model, input_ids, mask, index).split(TARGETS_PER_CHUNK)
        else:
            decoder = self.model.get_decoder()
            hidden = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            chunks = map(self.head, hidden[index[:, 0], index[:, 1]].split(TARGETS_PER_CHUNK))
        summaries = [
            summarize(logits, label, k, self.vocab_size, self.temperatures)
            for logits, label in zip(chunks, labels.split(TARGETS_PER_CHUNK), strict=True)
        ]
        whole = Summary.joined(summaries).on_cpu()
        ends = np.cumsum([len(at) for at in positions])
        return [whole.rows(slice(e - len(at), e)).to_topk() for e, at in zip(ends, positions, strict=True)]

    def _padded(self, sequences: list[Ids], left: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids, mask = np.zeros((2, len(sequences), longest), np.int64)
        for row, sequence in enumerate(sequences):
            where = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
            ids[row, where], mask[row, where] = sequence, 1
        return torch.as_tensor(ids, device=self.model.device), torch.as_tensor(mask, device=self.model.device)

    # -- responses of its own ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        """One random stream serves the batch, seeded by all of its seeds."""
        input_ids, mask = self._padded(contexts, left=True)
        capture = _Capture(k, self.vocab_size, self.temperatures)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(content_id(*seeds)[:15], 16))
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self._generation_config(sampling),
                logits_processor=LogitsProcessorList([capture]),
            )
        steps = [step.on_cpu() for step in capture.finish(sequences)]
        answers = []
        for row, tokens in enumerate(sequences[:, input_ids.shape[1] :].cpu().numpy()):
            ends = np.flatnonzero(np.isin(tokens, self.end_ids))
            length = int(ends[0]) + 1 if len(ends) else len(tokens)
            topk = Summary.joined([step.rows(slice(row, row + 1)) for step in steps[:length]]).to_topk()
            answers.append((ids_array(tokens[:length]), topk))
        return answers

    def _generation_config(self, sampling: SamplingConfig) -> GenerationConfig:
        greedy = sampling.temperature == 0
        how = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=self.end_ids,
            pad_token_id=(self.end_ids or [0])[0],
            **how,
        )


class _Capture(LogitsProcessor):
    """Sees the raw logits of every step before temperature and top-p, and keeps a summary of them."""

    def __init__(self, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> None:
        self.settings = (k, vocab_size, temperatures)
        self.steps: list[Summary] = []
        self.pending: Tensor | None = None  # logits whose sampled token is known only at the next step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finish(input_ids)
        self.pending = scores
        vocab_size = self.settings[1]
        if scores.shape[1] == vocab_size:
            return scores
        padding = torch.arange(scores.shape[1], device=scores.device) >= vocab_size
        return scores.masked_fill(padding, float("-inf"))  # an id that is no token is never sampled

    def finish(self, input_ids: Tensor) -> list[Summary]:
        if self.pending is not None:
            self.steps.append(summarize(self.pending, input_ids[:, -1], *self.settings))
        self.pending = None
        return self.steps
