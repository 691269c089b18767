"""What OpenAI-compatible servers answer -> rows of {token id: log-prob}, and those -> TopK. No network here.

Three dialects are known, all with exact ids:
  prompt_logprobs   vLLM: one object a prompt token, {"123": {"logprob": …, "rank": …}}; the first is null
  echo              completions with echo: `top_logprobs[t]` predicts token t *itself*, keys "token_id:123"
  content           llama.cpp and chat: [{"id": 123, "logprob": …, "top_logprobs": [{"id": …, "logprob": …}]}]
In all of them entry t belongs to token t of the sequence; a model's logits at t belong to token t + 1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bakery.errors import TeacherError, printable
from bakery.records import TopK, ids_array

Row = dict[int, float]

# A server gives no tail, so it is log(1 − Σ exp); below this the difference is noise of float32 log-probs.
TAIL_FLOOR = 1e-7
ID_PREFIX = "token_id:"


@contextmanager
def refuse_other_forms() -> Iterator[None]:
    """Around what reads an answer: one that is built otherwise than any dialect is a TeacherError like any other."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise TeacherError(
            f"the server's answer has a form that is not known: {type(error).__name__}: {quoted(error)}"
        ) from error


def quoted(text: Any) -> str:
    """What a server said: of bounded length, in one line, fit for a terminal."""
    return printable(str(text)[:300])[:300]


@refuse_other_forms()
def topk_from_rows(rows: list[Row], tokens: list[int], k: int) -> TopK:
    """Row n predicts tokens[n]. The k most likely entries of each; what a server adds for the actual token goes."""
    ids, logprobs, tails, actual = [], [], [], []
    for n, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if len(row) < k:
            raise TeacherError(f"target {n}: {len(row)} entries where {k} were asked for")
        if token not in row:
            raise TeacherError(f"target {n}: the answer does not speak of token {token}, which stands there")
        top = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k]
        ids.append([i for i, _ in top])
        logprobs.append([logprob for _, logprob in top])
        tails.append(math.log(max(1 - math.fsum(math.exp(min(x, 0)) for x in logprobs[-1]), TAIL_FLOOR)))
        actual.append(row[token])
    shape = (len(rows), k)
    return TopK.from_rows(np.reshape(ids, shape), np.reshape(logprobs, shape), tails, actual)


@refuse_other_forms()
def scored_rows(choice: dict[str, Any], sequence: list[int], where: list[int]) -> list[Row]:
    """The rows of the tokens at positions `where` of the prompt `sequence` that was sent. Raises TeacherError."""
    prompt_logprobs = choice.get("prompt_logprobs")
    if prompt_logprobs is not None:
        _check_length(prompt_logprobs, len(sequence))
        return [_row([(int(i), entry["logprob"]) for i, entry in prompt_logprobs[t].items()]) for t in where]
    logprobs = choice.get("logprobs") or {}
    _check_length(logprobs.get("tokens"), len(sequence))
    if (echoed := [token_id(t) for t in logprobs["tokens"][: len(sequence)]]) != sequence:
        first = next(t for t, (a, b) in enumerate(zip(echoed, sequence, strict=False)) if a != b)
        raise TeacherError(f"the server echoed token {echoed[first]} at position {first}, {sequence[first]} was sent")
    return [_named_row(logprobs, t) for t in where]


@refuse_other_forms()
def written_rows(choice: dict[str, Any]) -> tuple[list[int], list[Row]]:
    """The tokens that the server sampled, and the row each was sampled from."""
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content") is not None:
        entries = logprobs["content"]
        tokens, rows = [int(entry["id"]) for entry in entries], [_content_row(entry) for entry in entries]
    else:
        names = logprobs.get("tokens") or []
        tokens, rows = [token_id(name) for name in names], [_named_row(logprobs, t) for t in range(len(names))]
    return ids_array(tokens).tolist(), rows


def token_id(token: str) -> int:
    if not token.startswith(ID_PREFIX):
        raise TeacherError(f"the server names tokens by text ({token[:20]!r}), which cannot be mapped to ids exactly")
    return int(token.removeprefix(ID_PREFIX))


def _named_row(logprobs: dict[str, Any], t: int) -> Row:
    row = _row([(token_id(token), logprob) for token, logprob in (logprobs["top_logprobs"][t] or {}).items()])
    row.setdefault(token_id(logprobs["tokens"][t]), float(logprobs["token_logprobs"][t]))
    return row


def _content_row(entry: dict[str, Any]) -> Row:
    row = _row([(int(other["id"]), other["logprob"]) for other in entry["top_logprobs"]])
    row.setdefault(int(entry["id"]), float(entry["logprob"]))
    return row


def _row(entries: list[tuple[int, Any]]) -> Row:
    row = {token: float(logprob) for token, logprob in entries}
    if len(row) != len(entries):
        raise TeacherError("a duplicate id in one support")
    return row


def _check_length(entries: Any, sent: int) -> None:
    if not isinstance(entries, list) or len(entries) < sent:
        got = len(entries) if isinstance(entries, list) else "none"
        raise TeacherError(f"the server gave log-probs for {got} of {sent} prompt tokens")
