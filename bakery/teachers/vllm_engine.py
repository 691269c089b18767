"""vLLM in this process as teacher: its own batching, exact ids, log-probs straight from the engine."""

from functools import cached_property
from typing import Any

import numpy as np

from bakery.batching import plan_batches
from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import RecipeError, TeacherError, first_line
from bakery.models import local_files
from bakery.records import Ids, Mask, TopK, ids_array
from bakery.teachers.local import LocalTeacher
from bakery.teachers.protocol import Task, Written
from bakery.teachers.wire import Row, quoted, topk_from_rows

# Arguments of vllm.LLM that the recipe has keys for, by which a cache's teacher is known.
OWN_KEYS = {"model": "model_name_or_path", "dtype": "dtype", "trust_remote_code": "trust_remote_code"}


class VLLMTeacher(LocalTeacher):
    """Scorer and Generator. `teacher.engine` goes to vllm.LLM unchanged (tensor_parallel_size, quantization, …)."""

    backend = "vllm"
    calls_in_flight = 1

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        if config.draws:
            raise RecipeError(
                "teacher.support sampled: vLLM tells its most likely tokens, not the whole distribution that is drawn "
                "from; choose support topk, or backend hf"
            )
        if temperatures:
            raise RecipeError("cache.temperatures: vLLM gives no norm over the vocabulary; leave it empty")
        if key := next((key for key in OWN_KEYS if key in config.engine), None):
            raise RecipeError(f"teacher.engine.{key} {config.engine[key]!r}: say it as teacher.{OWN_KEYS[key]}")
        super().__init__(config, tokenizer)
        self.max_length = config.engine.get("max_model_len") or self.max_length

    def plan(self, contexts: list[Ids], lengths: list[int], task: Task) -> list[list[int]]:
        """The engine batches for itself; this bounds in memory what it answers."""
        return plan_batches(lengths, self.config.tokens_per_batch)

    def open(self) -> "VLLMTeacher":
        _ = self.engine
        return self

    def close(self) -> None:
        """Ends the engine's processes here, not at the interpreter's exit, where threads of theirs may still run."""
        if engine := self.__dict__.pop("engine", None):
            engine.llm_engine.engine_core.shutdown()

    @cached_property
    def engine(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise RecipeError(f"teacher.backend vllm: {error}; pip install bakery[vllm]") from error
        settings = {
            "model": str(local_files(self.config.model_name_or_path, self.config.revision, weights=True)),
            "dtype": self.config.dtype,
            "trust_remote_code": self.config.trust_remote_code,
            # Cached prefixes make log-probs depend on the order of requests.
            "enable_prefix_caching": False,
            "max_logprobs": self.config.top_k,
            "seed": 0,
            **self.config.engine,
        }
        try:
            return LLM(**settings)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"teacher.engine: vLLM refuses: {quoted(' '.join(str(error).split()))}") from error

    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        sequences = [[*c.tolist(), *r.tolist()] for c, r in zip(contexts, responses, strict=True)]
        outputs = self._run(sequences, [self._sampling(max_tokens=1, prompt_logprobs=k)] * len(sequences))
        answers = []
        for output, sequence, context, target in zip(outputs, sequences, contexts, targets, strict=True):
            # Entry t belongs to token t itself, as on the wire.
            where = (len(context) + np.flatnonzero(target)).tolist()
            rows = [_row(output.prompt_logprobs, t) for t in where]
            answers.append(topk_from_rows(rows, [sequence[t] for t in where], k))
        return answers

    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        settings = [
            self._sampling(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed % 2**31,
                logprobs=k,
            )
            for seed in seeds
        ]
        answers = []
        for output in self._run([context.tolist() for context in contexts], settings):
            [written] = output.outputs
            tokens = list(written.token_ids)
            rows = [_row(written.logprobs, t) for t in range(len(tokens))]
            answers.append((ids_array(tokens), topk_from_rows(rows, tokens, k)))
        return answers

    def _run(self, prompts: list[list[int]], settings: list[Any]) -> list[Any]:
        try:
            return self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        except ValueError as error:
            raise TeacherError(f"vLLM refuses: {first_line(error)}") from error

    @staticmethod
    def _sampling(**settings: Any) -> Any:
        from vllm import SamplingParams

        flat = {"flat_logprobs": True} if "flat_logprobs" in getattr(SamplingParams, "__struct_fields__", ()) else {}
        return SamplingParams(**{"temperature": 0.0, "detokenize": False, **flat, **settings})


def _row(logprobs: Any, t: int) -> Row:
    """Position t of vLLM's answer, flat or not; a flat one holds the actual token first and again at its rank."""
    if hasattr(logprobs, "start_indices"):
        where = slice(logprobs.start_indices[t], logprobs.end_indices[t])
        return dict(zip(logprobs.token_ids[where], logprobs.logprobs[where], strict=True))
    return {token: entry.logprob for token, entry in logprobs[t].items()}
