"""A server that has only /chat/completions, as a Generator: where its tokens are exactly the student's.

It is sent the conversation, renders it with its own template, and names tokens by text and bytes; each is mapped to the
one id that stands for those bytes, or refused. Many such servers leave the end-of-turn token out, and then no cache
holds it.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from bakery.config import SamplingConfig
from bakery.errors import TeacherError
from bakery.prompts.chat import Messages
from bakery.prompts.token_bytes import TokenBytes
from bakery.records import Ids, ids_array
from bakery.teachers.openai_api import OpenAITeacher
from bakery.teachers.probing import SAME, Capabilities, reached
from bakery.teachers.protocol import Written
from bakery.teachers.wire import ID_PREFIX, Row, quoted, refuse_other_forms, token_id, topk_from_rows

log = logging.getLogger("bakery")


class ChatTeacher(OpenAITeacher):
    """ChatGenerator."""

    extension: Mapping[str, bool] = MappingProxyType({"return_tokens_as_token_ids": True})

    @cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    def probe(self, full: bool = False) -> Capabilities:
        found = reached(self.client)
        try:
            (_, cold), (_, hot) = (self._hello(temperature) for temperature in (0.0, 2.0))
        except TeacherError as error:
            return replace(found, notes={"generates": str(error), "score_by": "a chat endpoint scores nothing"})
        first = int(cold.ids[0])
        again = dict(zip(hot.ids.tolist(), hot.logprobs.tolist(), strict=True)).get(first, -1e9)
        notes = {"score_by": "a chat endpoint scores nothing"}
        return replace(found, generates=True, raw=abs(again - float(cold.logprobs[0])) < SAME, notes=notes)

    def open(self) -> "ChatTeacher":
        """Two answers of one token, so that what would make a wrong cache is refused before more is paid for."""
        self.usable()
        return self

    def _hello(self, temperature: float) -> Written:
        hello = [{"role": "user", "content": "Say hello."}]
        one_token = SamplingConfig(temperature=temperature, max_new_tokens=1)
        try:
            return self._ask(hello, one_token, self.config.top_k, seed=0)[0]
        except TeacherError:
            # Hosted endpoints refuse a field that they do not know; vLLM needs it, since it names control tokens "".
            self.extension = {}
            return self._ask(hello, one_token, self.config.top_k, seed=0)[0]

    def generate_chat(
        self, conversations: list[Messages], contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]
    ) -> list[Written]:
        answers = []
        for conversation, context, seed in zip(conversations, contexts, seeds, strict=True):
            written, read = self._ask(conversation, sampling, k, seed)
            if read not in (None, len(context)):
                log.warning(
                    "the server read %s tokens where the teacher's context has %d: another template",
                    quoted(read),
                    len(context),
                )
            answers.append(written)
        return answers

    @refuse_other_forms()
    def _ask(self, conversation: Messages, sampling: SamplingConfig, k: int, seed: int) -> tuple[Written, int | None]:
        body = {
            "messages": conversation,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**31,
            "logprobs": True,
            # Some servers count the sampled token among the k and cut the last: one more than is kept.
            "top_logprobs": k + 1,
            **self.extension,
        }
        choice, usage = self.client.chat(body)
        entries = (choice.get("logprobs") or {}).get("content") or []
        if not entries:
            raise TeacherError("the server gives no log-probs with its answer")
        tokens = [self._id(entry) for entry in entries]
        rows = [self._row(entry) for entry in entries]
        return (ids_array(tokens), topk_from_rows(rows, tokens, k)), usage.get("prompt_tokens")

    def _row(self, entry: dict[str, Any]) -> Row:
        row = {self._id(other): float(other["logprob"]) for other in entry["top_logprobs"]}
        return {**row, self._id(entry): float(entry["logprob"])}

    def _id(self, entry: dict[str, Any]) -> int:
        if "id" in entry:
            return int(entry["id"])
        token = str(entry["token"])
        return token_id(token) if token.startswith(ID_PREFIX) else self.token_bytes.id_of(token, entry.get("bytes"))
