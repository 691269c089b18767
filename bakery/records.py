"""What flows from the teacher to the student: an example, the teacher's top-k for it, and both as a record.

Legend: S, C, R tokens of student context, teacher context, response; N targets; M all support entries; T temperatures.
Convention: row n of a TopK *predicts* target n. Natural logarithm, temperature 1, normalised over the full vocabulary.
"""

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bakery.errors import DataError, TeacherError

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Origin = Literal["dataset", "teacher", "student"]

# A float32 log-softmax can land this far above log 1.
LOGPROB_SLACK = 1e-4
# Of log(count / draws) as float32; neighbouring counts of 4,096 draws are 2e-4 apart.
COUNT_SLACK = 1e-5


def ids_array(ids: Any) -> Ids:
    return np.ascontiguousarray(ids, dtype=np.int32)


def content_id(*parts: Any) -> str:
    """A stable 128-bit hex key of token ids, numbers and strings: equal on every machine and in every process."""
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.astype("<i4").tobytes() if isinstance(part, np.ndarray) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Example:
    """Two contexts and one response, as token ids. An empty response is one that the teacher has yet to write."""

    id: str
    student_context: Ids  # [S]
    teacher_context: Ids  # [C]
    response: Ids  # [R]
    is_target: Mask  # [R]

    def __post_init__(self) -> None:
        if len(self.response) != len(self.is_target):
            raise DataError(
                f"example {self.id}: {len(self.response)} response tokens but {len(self.is_target)} target flags"
            )
        if len(self.student_context) == 0 or len(self.teacher_context) == 0:
            raise DataError(f"example {self.id}: an empty context predicts nothing; give the row at least one token")
        if len(self.response) and not self.is_target.any():
            raise DataError(f"example {self.id}: no token of the response is a target, so there is nothing to learn")

    @property
    def targets(self) -> int:
        return int(self.is_target.sum())

    def answered(self, response: Ids) -> Self:
        """This example with a response of which every token is a target."""
        return replace(self, response=response, is_target=np.ones(len(response), dtype=bool))


def predicting_positions(context_length: int, is_target: Mask) -> NDArray[np.int64]:
    """Positions [N] in `context + response` whose outputs predict the targets: the one place of the shift by one."""
    return context_length + np.flatnonzero(is_target) - 1


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's most likely tokens at each target, descending, and the log of the mass outside them.

    Or a sample of N draws: the ids that came up, the logs of their shares of the draws, descending, and as
    `tail_logprob`, since a sample has no outside, the mean log-prob of the draws.
    """

    ids: Ids  # [M]
    logprobs: Floats  # [M]
    support_size: Ids  # [N], sums to M
    tail_logprob: Floats  # [N]; -inf where the support is the whole vocabulary
    token_logprob: Floats  # [N]; of the token that was really there, inside the support or not
    log_norm: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # [N, T], see cache.temperatures

    def __post_init__(self) -> None:
        if (self.support_size < 0).any():
            raise TeacherError(f"a support of {int(self.support_size.min())} entries")
        if len(self.ids) != len(self.logprobs) or len(self.ids) != int(self.support_size.sum()):
            raise TeacherError(
                f"{len(self.ids)} ids and {len(self.logprobs)} log-probs for supports of {int(self.support_size.sum())}"
            )
        if not (len(self.tail_logprob) == len(self.token_logprob) == len(self)):
            raise TeacherError(
                f"{len(self)} supports, {len(self.tail_logprob)} tails, {len(self.token_logprob)} tokens"
            )

    def __len__(self) -> int:
        return len(self.support_size)

    @classmethod
    def empty(cls) -> "TopK":
        """Of a prompt without a response."""
        return cls.from_rows(np.zeros((0, 1)), np.zeros((0, 1)), [], [])

    @classmethod
    def from_rows(cls, ids_NK: Any, logprobs_NK: Any, tail_N: Any, token_N: Any, log_norm_NT: Any = None) -> "TopK":
        """From rectangles: K entries at every target."""
        ids_NK = np.asarray(ids_NK)
        size = np.full(len(ids_NK), ids_NK.shape[1], np.int32)
        with np.errstate(over="ignore"):  # too large is an infinity, which `check` refuses
            floats = [np.ascontiguousarray(x, np.float32) for x in (logprobs_NK, tail_N, token_N)]
        norm = np.zeros((len(ids_NK), 0), np.float32) if log_norm_NT is None else np.asarray(log_norm_NT, np.float32)
        return cls(ids_array(ids_NK).reshape(-1), floats[0].reshape(-1), size, floats[1], floats[2], norm)

    def row_of_entry(self) -> NDArray[np.int64]:
        """For each of the M entries, the target it belongs to."""
        return np.repeat(np.arange(len(self)), self.support_size)

    def sum_over_support(self, values_M: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums [N] of one value an entry; each the same to the bit whatever stands beside it."""
        sums, some = np.zeros(len(self)), self.support_size > 0
        if some.any():  # reduceat takes an empty stretch for one of a single value
            sums[some] = np.add.reduceat(values_M, self._starts()[some])
        return sums

    def keep_mass(self, top_mass: float) -> "TopK":
        """The shortest head of each support that holds `top_mass` of the probability; the rest joins the tail."""
        before = np.concatenate([[0.0], np.cumsum(np.exp(self.logprobs.astype(np.float64)))])
        keep = before[:-1] - before[self._starts()][self.row_of_entry()] < top_mass
        keep[self._starts()] = True
        return self._cut(keep)

    def keep_entries(self, k: int) -> "TopK":
        """The first `k` entries of each support; the rest joins the tail."""
        return self._cut(np.arange(len(self.ids)) - self._starts()[self.row_of_entry()] < k)

    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.support_size, dtype=np.int64) - self.support_size

    def _cut(self, keep: Mask) -> "TopK":
        dropped = self.sum_over_support(np.where(keep, 0.0, np.exp(self.logprobs.astype(np.float64))))
        # Where nothing was dropped the tail stays to the bit.
        with np.errstate(divide="ignore"):
            tail = np.where(dropped > 0, np.logaddexp(self.tail_logprob, np.log(dropped)), self.tail_logprob)
        return replace(
            self,
            ids=self.ids[keep],
            logprobs=self.logprobs[keep],
            support_size=np.bincount(self.row_of_entry()[keep], minlength=len(self)).astype(np.int32),
            tail_logprob=tail.astype(np.float32),
        )


def topk_problem(topk: TopK, vocab_size: int, draws: int | None = None) -> tuple[int, str] | None:
    """The first target whose top-k is no distribution (no sample of `draws`), and what is wrong with it; None when all
    is well."""
    row = topk.row_of_entry()
    same_row = row[1:] == row[:-1]
    # Row and id in one number, as numpy sorts those several times faster than by two keys.
    entries = np.sort((row << 32) | topk.ids.view(np.uint32))
    twice = entries[1:] == entries[:-1]
    checks = [
        ("an empty support", np.flatnonzero(topk.support_size < 1)),
        ("a log-prob that is not finite", row[~np.isfinite(topk.logprobs)]),
        ("a positive log-prob", row[topk.logprobs > LOGPROB_SLACK]),
        ("log-probs that do not descend", row[1:][same_row & (np.diff(topk.logprobs) > 0)]),
        ("a duplicate id", entries[1:][twice] >> 32),
        (f"an id outside the vocabulary of {vocab_size}", row[(topk.ids < 0) | (topk.ids >= vocab_size)]),
        ("a tail that is no log-prob", np.flatnonzero(~(topk.tail_logprob <= LOGPROB_SLACK))),
        ("a token log-prob that is none", np.flatnonzero(~(topk.token_logprob <= LOGPROB_SLACK))),
        ("a log_norm that is not finite", np.flatnonzero(~np.isfinite(topk.log_norm).all(axis=1))),
        *(_sample_checks(topk, draws) if draws else []),
    ]
    for what, rows in checks:
        if len(rows):
            return int(rows.min()), what
    return None


def _sample_checks(topk: TopK, draws: int) -> list[tuple[str, NDArray[np.int64]]]:
    with np.errstate(all="ignore"):  # what is no number has been found already
        counts_M = np.round(np.exp(topk.logprobs.astype(np.float64)) * draws)
        off_M = np.abs(np.log(counts_M / draws) - topk.logprobs)
        total_N = topk.sum_over_support(counts_M)
    return [
        (f"a log-prob that is of no count of {draws} draws", topk.row_of_entry()[~(off_M < COUNT_SLACK)]),
        (f"counts that do not add up to {draws} draws", np.flatnonzero(total_N != draws)),
        ("a mean log-prob of draws that is not finite", np.flatnonzero(~np.isfinite(topk.tail_logprob))),
    ]


@dataclass(frozen=True, eq=False)
class Record:
    """One example as the teacher answered it: what a cache is made of."""

    example: Example
    topk: TopK
    origin: Origin

    def __post_init__(self) -> None:
        if len(self.topk) != self.example.targets:
            raise TeacherError(
                f"example {self.example.id}: the teacher gave {len(self.topk)} distributions "
                f"for {self.example.targets} targets"
            )

    def check(self, vocab_size: int, k: int | None = None, draws: int | None = None) -> Self:
        """Raise a TeacherError naming the example unless every row is a distribution of exactly `k` entries, or a
        sample of `draws`."""
        response = self.example.response
        if len(response) and not (response.min() >= 0 and response.max() < vocab_size):
            raise TeacherError(
                f"example {self.example.id}: a response with an id outside the vocabulary of {vocab_size}"
            )
        problem = topk_problem(self.topk, vocab_size, draws)
        if problem is None and k is not None and (short := np.flatnonzero(self.topk.support_size != k)).size:
            problem = int(short[0]), f"{self.topk.support_size[short[0]]} entries where {k} were asked for"
        if problem:
            raise TeacherError(
                f"example {self.example.id}: the teacher's answer for target {problem[0]} has {problem[1]}"
            )
        return self


class TeacherInfo(BaseModel):
    """Who answered: two caches agree on all of this exactly when the same teacher filled them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    name: str
    revision: str | None
    dtype: str
    fingerprint: str
