"""The sole owner of chat templates and masks: a row -> token ids of both contexts, the response and its targets.

A conversation is tokenised in pieces cut where the model would be handed over to: after the generation prompt of each
assistant turn and after the turn's end. So a context is exactly what a server would feed the model, the response is
tokenised once for both sides, and nothing is ever decoded and tokenised again.
"""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from os.path import commonprefix
from typing import Any

import numpy as np

from bakery.errors import DataError
from bakery.prompts.reading import Row
from bakery.prompts.tokenizers import special_ids
from bakery.records import Ids, Mask, ids_array

Messages = list[dict[str, str]]
UNSEEN = "\ue000"  # a private character, which no turn begins with


@dataclass(frozen=True)
class Rendered:
    student_context: Ids
    teacher_context: Ids
    response: Ids  # empty when the teacher is to write it
    is_target: Mask
    conversation: Messages | None = None  # what the teacher is asked, before any template; None for plain text
    unprompted: bool = False  # nothing that the student reads before the response asks for it: the response is the row


class Renderer:
    """Renders rows with one tokenizer. `prefix` is read by the teacher alone, before the row's own `prefix_messages`;
    of both together the student reads the last `retained` messages.

    With `generate`, a given last answer is dropped and the teacher writes its own. Without it, targets are the turns of
    `roles`, where a `pattern` is given those whose content it is found in (`^` and `$` at every line). Raises DataError
    naming the row.
    """

    def __init__(
        self,
        tokenizer: Any,
        prefix: Messages,
        generate: bool,
        *,
        retained: int = 0,
        roles: tuple[str, ...] = ("assistant",),
        pattern: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.generate = generate
        self.retained, self.roles = retained, roles
        self.pattern = re.compile(pattern, re.MULTILINE) if pattern is not None else None
        self.special = special_ids(tokenizer)

    @property
    def turns_sha(self) -> str | None:
        """Of the options that choose targets and the student's context; None where all are at their defaults."""
        chosen = (self.retained, sorted({*self.roles}), self.pattern.pattern if self.pattern else None)
        return None if chosen == (0, ["assistant"], None) else sha256(json.dumps(chosen).encode()).hexdigest()

    def render(self, row: Row) -> Rendered | None:
        """None for a row of which no turn matches the pattern."""
        prefix = [*self.prefix, *(row.data.get("prefix_messages") or [])]
        messages = self._as_messages(row)
        rendered = self._plain(row, prefix) if messages is None else self._chat(row, messages, prefix)
        if not self.generate and not rendered.is_target.any():
            if self.pattern is not None:
                return None
            wanted, found = ", ".join(self.roles), ", ".join(m["role"] for m in messages or [])
            raise DataError(
                f"{row.where}: no token is a target: "
                + (f"prompts.target_roles is {wanted}, the row has turns of {found}; " if messages else "")
                + "give a response or such a turn, or let the teacher write it with a `sampling:` section"
            )
        return rendered

    def _as_messages(self, row: Row) -> Messages | None:
        """The row as a conversation; None for text that no template touches."""
        prompt = row.data.get("prompt")
        if row.form == "text" or (isinstance(prompt, str) and not self.tokenizer.chat_template):
            return None
        if not self.tokenizer.chat_template:
            raise DataError(f"{row.where}: chat messages, but the tokenizer has no chat template; give `prompt` text")
        if row.form == "messages":
            return list(row.data["messages"])
        asked: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        response = row.data.get("response")
        return asked if response is None else [*asked, {"role": "assistant", "content": response}]

    # -- plain text --------------------------------------------------------------------------------------------------

    def _plain(self, row: Row, prefix: Messages) -> Rendered:
        ahead, kept = ("".join(m["content"] + "\n\n" for m in part) for part in (prefix, self._kept(prefix)))
        if row.form == "prompt":
            student, teacher = (self._encode(t + row.data["prompt"], special=True) for t in (kept, ahead))
            response = self._encode(row.data.get("response") or "")
            if len(response) and self.tokenizer.eos_token_id is not None:
                response = np.append(response, np.int32(self.tokenizer.eos_token_id))
        else:
            ids = self._encode(row.data["text"], special=True)
            student, response = (ids, ids[:0]) if self.generate else (ids[:1], ids[1:])
            # A tokenizer that opens every text with a special token opens the prefix with it, not the text again.
            tail = student[1:] if student[:1].tolist() and int(student[0]) in self.special else student
            student, teacher = (
                np.concatenate([self._encode(t, special=True), tail]) if t else student for t in (kept, ahead)
            )
        if self.generate:
            response = response[:0]
        unprompted = row.form == "text" and not self.generate
        return Rendered(student, teacher, response, np.ones(len(response), dtype=bool), unprompted=unprompted)

    # -- chat --------------------------------------------------------------------------------------------------------

    def _chat(self, row: Row, messages: Messages, prefix: Messages) -> Rendered:
        messages = _joined_systems(messages)
        if self.generate and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        read = {who: _joined_systems([*ahead, *messages]) for who, ahead in (("s", self._kept(prefix)), ("t", prefix))}
        turns = [] if self.generate else [i - len(messages) for i, m in enumerate(messages) if self._is_target(m)]
        opening = messages[: turns[0]] if turns else messages
        if turns and prefix and not opening and prefix[-1]["role"] == messages[0]["role"] == "system":
            raise DataError(
                f"{row.where}: its first system message is a target, and would be one with that of the prefix; take "
                f"`system` out of prompts.target_roles, or end the prefix with another turn"
            )
        student_text, teacher_text = (
            self._start(row, said, len(said) + turns[0]) if turns else self._apply(row, said, prompt=True)
            for said in read.values()
        )
        pieces = self._pieces(row, read["s"], [len(read["s"]) + turn for turn in turns])
        if pieces and prefix:
            whole = self._apply(row, read["t"][: len(read["t"]) + turns[-1] + 1])
            if whole != teacher_text + "".join(text for text, _ in pieces):
                raise DataError(f"{row.where}: the chat template renders the response differently behind the prefix")
        ids, before = [], student_text
        for text, _ in pieces:
            ids.append(self._encode_behind(before, text))
            before += text
        masks = [
            self._turn_mask(i) if answered else np.zeros(len(i), bool)
            for i, (_, answered) in zip(ids, pieces, strict=True)
        ]
        return Rendered(
            self._encode(student_text),
            self._encode(teacher_text),
            np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32),
            np.concatenate([*masks, np.zeros(0, bool)]),
            read["t"],
            unprompted=bool(turns) and _asks_nothing(opening, messages[turns[0]]),
        )

    def _kept(self, prefix: Messages) -> Messages:
        return prefix[max(len(prefix) - self.retained, 0) :]

    def _is_target(self, message: dict[str, str]) -> bool:
        matches = self.pattern is None or self.pattern.search(message["content"])
        return message["role"] in self.roles and bool(matches)

    def _start(self, row: Row, messages: Messages, turn: int) -> str:
        """All before the first token of a turn: the model is handed over to there, or its header ends."""
        if messages[turn]["role"] == "assistant":
            return self._apply(row, messages[:turn], prompt=True)
        other = {**messages[turn], "content": UNSEEN}
        both = [self._apply(row, [*messages[:turn], said]) for said in (messages[turn], other)]
        return commonprefix(both)  # noqa: RUF071, characters are what is compared

    def _pieces(self, row: Row, messages: Messages, turns: list[int]) -> list[tuple[str, bool]]:
        """The response as (text, is a target): the turns, and what the template puts between them."""
        pieces: list[tuple[str, bool]] = []
        if not turns:
            return pieces
        whole = self._apply(row, messages[: turns[-1] + 1])
        done = 0
        for i in turns:
            start = self._start(row, messages, i)
            end = self._apply(row, messages[: i + 1])
            if not (whole.startswith(start) and whole.startswith(end)):
                raise DataError(
                    f"{row.where}: the chat template rewrites {messages[i]['role']} turn {i} once later turns follow, "
                    f"so one sequence cannot hold them all; give one row for each assistant turn"
                )
            if done:
                pieces.append((whole[done : len(start)], False))
            pieces.append((whole[len(start) : len(end)], True))
            done = len(end)
        return pieces

    def _turn_mask(self, ids: Ids) -> Mask:
        """All of a turn through its end-of-turn token; the white space a template puts behind that is no target."""
        mask = np.ones(len(ids), dtype=bool)
        specials = np.flatnonzero(np.isin(ids, list(self.special)))
        if len(specials) and not self.tokenizer.decode(ids[specials[-1] + 1 :].tolist()).strip():
            mask[specials[-1] + 1 :] = False
        return mask

    def _apply(self, row: Row, messages: Messages, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, ValueError, IndexError) as error:
            raise DataError(f"{row.where}: the chat template refuses the conversation: {error}") from error

    def _encode_behind(self, before: str, text: str) -> Ids:
        """`text` as it is tokenised where it stands: some tokenizers put a mark of their own at the start of a text.
        Where a token would reach across the border, on its own: so a model is handed over to there."""
        ahead, whole = self._encode(before), self._encode(before + text)
        return whole[len(ahead) :] if np.array_equal(whole[: len(ahead)], ahead) else self._encode(text)

    def _encode(self, text: str, special: bool = False) -> Ids:
        return ids_array(self.tokenizer.encode(text, add_special_tokens=special))


def _asks_nothing(opening: Messages, turn: dict[str, str]) -> bool:
    """Whether the turn begins a row; a user's also does behind instructions, which are no question to it."""
    return not opening or (turn["role"] != "assistant" and all(m["role"] == "system" for m in opening))


def _joined_systems(messages: Messages) -> Messages:
    """Neighbouring system messages as one: most templates take a single one, at the front."""
    joined: Messages = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "system":
            joined[-1] = {**message, "content": joined[-1]["content"] + "\n\n" + message["content"]}
        else:
            joined.append(message)
    return joined
