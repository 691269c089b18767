"""A model behind an OpenAI-compatible server as teacher. Token ids go out, token ids come back; text never does."""

from functools import cached_property
from typing import Any

from bakery.batching import plan_batches
from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import RecipeError, TeacherError
from bakery.prompts.tokenizers import tokenizer_fingerprint, vocabulary_size
from bakery.records import Ids, Mask, TeacherInfo, TopK, content_id, ids_array
from bakery.teachers.openai_client import Client
from bakery.teachers.probing import Capabilities, ask_score, probe
from bakery.teachers.protocol import Task, Teacher, Written
from bakery.teachers.wire import scored_rows, topk_from_rows, written_rows

SENTENCE = "The capital of France is Paris, and"

# Servers have defaults of their own (llama.cpp: top-k 40, min-p .05; vLLM: the model's generation_config.json).
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


class OpenAITeacher:
    """Described; `open` probes the server and gives a ServedScorer, a ServedGenerator, or one that is both."""

    max_length: int | None = None  # known to the server, which refuses what is longer

    def __init__(self, config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> None:
        assert config.api is not None
        if config.draws:
            raise RecipeError(
                "teacher.support sampled: a server tells its most likely tokens, not the whole distribution that is "
                "drawn from; choose support topk, or backend hf"
            )
        if temperatures:
            raise RecipeError("cache.temperatures: a server gives no norm over the vocabulary; leave it empty")
        self.config, self.api = config, config.api
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.calls_in_flight = self.api.in_flight
        fingerprint = content_id("openai", self.api.model, tokenizer_fingerprint(tokenizer))
        self.info = TeacherInfo(
            backend="openai", name=self.api.model, revision=config.revision, dtype="served", fingerprint=fingerprint
        )

    def plan(self, contexts: list[Ids], lengths: list[int], task: Task) -> list[list[int]]:
        """A sampled response has its own seed, so its own request."""
        rows = self.api.prompts_per_request if task == "score" else 1
        return plan_batches(lengths, self.config.tokens_per_batch, rows)

    @cached_property
    def client(self) -> Client:
        return Client(self.api)

    def close(self) -> None:
        if client := self.__dict__.pop("client", None):
            client.close()

    def probe(self, full: bool = False) -> Capabilities:
        return probe(self.client, self.tokenizer.encode(SENTENCE), self.config.top_k, self.vocab_size, full)

    def usable(self) -> Capabilities:
        """By the quick probe. Raises TeacherError where a cache from it would be wrong, or could not be."""
        found = self.probe()
        if found.aligned is False:
            raise TeacherError(f"{self.api.base_url}: {found.notes['aligned']}; a cache from it would be wrong")
        if found.generates and found.raw is False:
            raise TeacherError(
                f"{self.api.base_url}: log-probs follow the sampling temperature; start the server with raw log-probs "
                f"(vLLM: --logprobs-mode raw_logprobs)"
            )
        if not found.generates and found.score_by is None:
            raise TeacherError(
                f"{self.api.base_url} gives no log-probs that can be used: {'; '.join(found.notes.values())}"
            )
        return found

    def open(self) -> Teacher:
        found = self.usable()
        kinds = {(True, True): ServedBoth, (True, False): ServedScorer, (False, True): ServedGenerator}
        opened = kinds[found.score_by is not None, found.generates](self.config, self.tokenizer)
        opened.client, opened.found = self.client, found
        return opened


class _Opened(OpenAITeacher):
    found: Capabilities


class ServedScorer(_Opened):
    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        assert self.found.score_by is not None
        sequences = [[*c.tolist(), *r.tolist()] for c, r in zip(contexts, responses, strict=True)]
        choices = ask_score(self.client, sequences, k, self.found.score_by)
        answers = []
        for choice, sequence, context, target in zip(choices, sequences, contexts, targets, strict=True):
            # Entry t of an answer belongs to token t itself: no shift here.
            where = [len(context) + j for j in target.nonzero()[0].tolist()]
            answers.append(topk_from_rows(scored_rows(choice, sequence, where), [sequence[t] for t in where], k))
        return answers


class ServedGenerator(_Opened):
    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        bodies = [
            {
                "prompt": [context.tolist()],
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                **PLAIN_SAMPLING,
                "seed": seed % 2**31,
                "logprobs": k,
                "return_tokens_as_token_ids": True,
            }
            for context, seed in zip(contexts, seeds, strict=True)
        ]
        answers = []
        for [choice] in self.client.complete_all(bodies):
            tokens, rows = written_rows(choice)
            if not tokens:
                raise TeacherError("the server wrote an empty response")
            answers.append((ids_array(tokens), topk_from_rows(rows, tokens, k)))
        return answers


class ServedBoth(ServedScorer, ServedGenerator):
    pass
