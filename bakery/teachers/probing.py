"""What a served teacher can do, found out by asking it: a few short requests, no claim taken on trust."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bakery.errors import TeacherError
from bakery.teachers.openai_client import Client
from bakery.teachers.wire import Row, quoted, refuse_other_forms, scored_rows, topk_from_rows, written_rows

ScoreBy = Literal["prompt_logprobs", "echo"]

# A served model computes in its own precision, and batches differently each time: two askings of one distribution
# differ by this much at most (bfloat16 against itself: 0.87 at the worst of thousands, 0.07 on average).
SAME = 0.5
KS = (1, 5, 20, 50, 64, 100, 128, 200, 256, 512, 1024)


@dataclass(frozen=True)
class Capabilities:
    """Found so far; None is unknown or impossible, with the reason in `notes`."""

    models: list[str]
    max_length: int | None
    generates: bool = False  # top-k of sampled tokens, with exact ids
    score_by: ScoreBy | None = None  # how log-probs of given tokens are had
    aligned: bool | None = None  # a generated token's own log-prob is the scored one, and no shift fits better
    raw: bool | None = None  # log-probs do not follow the sampling temperature
    largest_k: int | None = None  # this and the next: only a full probe looks for them
    whole_vocabulary: bool | None = None  # it takes the tokenizer's last id
    notes: dict[str, str] = field(default_factory=dict)


def ask_score(client: Client, sequences: list[list[int]], k: int, by: ScoreBy) -> list[dict[str, Any]]:
    """Choices with the log-probs of the sequences' own tokens."""
    common = {"prompt": sequences, "temperature": 0, "return_tokens_as_token_ids": True}
    if by == "prompt_logprobs":
        return client.complete(**common, max_tokens=1, prompt_logprobs=k)
    return client.complete(**common, max_tokens=0, echo=True, logprobs=k)


def probe(client: Client, tokens: list[int], k: int, vocab_size: int, full: bool = False) -> Capabilities:
    """`tokens` is a short sentence of at least three tokens. Raises TeacherError when the server cannot be reached or
    serves another model; anything else it cannot do is told in the answer."""
    found = reached(client)
    found, written = _probe_generation(client, found, tokens, k)
    found = _probe_scoring(client, found, tokens, k)
    if written is not None and found.score_by:
        found = _probe_alignment(client, found, tokens, written, k)
    if not full:
        return found
    largest, whole = _largest_k(client, found, tokens, k), _takes(client, vocab_size - 1)
    return replace(found, largest_k=largest, whole_vocabulary=whole)


@refuse_other_forms()
def reached(client: Client) -> Capabilities:
    """Which models are there. Raises TeacherError when the recipe's is not among them, or nobody answers."""
    served = client.models()
    names = [str(model.get("id")) for model in served]
    if client.config.model not in names:
        served_here = quoted(", ".join(names)) or "nothing"
        raise TeacherError(
            f"{client.config.base_url} serves {served_here}, not {client.config.model}; name one of them as "
            f"teacher.api.model"
        )
    mine = served[names.index(client.config.model)]
    return Capabilities(names, mine.get("max_model_len") or (mine.get("meta") or {}).get("n_ctx"))


def _takes(client: Client, token: int) -> bool:
    try:
        client.complete(prompt=[[token]], max_tokens=1, temperature=0, seed=0, logprobs=1)
    except TeacherError:
        return False
    return True


def _probe_generation(client: Client, found: Capabilities, tokens: list[int], k: int) -> tuple[Capabilities, Any]:
    """One greedy token, and whether another temperature changes its log-prob."""
    answers = {}
    try:
        for temperature in (0.0, 2.0):
            [choice] = client.complete(
                prompt=[tokens],
                max_tokens=1,
                temperature=temperature,
                seed=0,
                logprobs=k,
                return_tokens_as_token_ids=True,
            )
            ids, rows = written_rows(choice)
            topk_from_rows(rows, ids, k)
            if len(ids) != 1:
                raise TeacherError(f"asked for one token, the server gave log-probs for {len(ids)}")
            answers[temperature] = ids[0], rows[0]
    except TeacherError as error:
        return replace(found, notes={**found.notes, "generates": _with_cure(str(error))}), None
    token, row = answers[0.0]
    raw = abs(answers[2.0][1].get(token, -1e9) - row[token]) < SAME
    return replace(found, generates=True, raw=raw), (token, row)


def _probe_scoring(client: Client, found: Capabilities, tokens: list[int], k: int) -> Capabilities:
    reasons = []
    ways: tuple[ScoreBy, ...] = ("prompt_logprobs", "echo")
    for by in ways:
        try:
            [choice] = ask_score(client, [tokens], k, by)
            where = list(range(1, len(tokens)))
            topk_from_rows(scored_rows(choice, tokens, where), tokens[1:], k)
        except TeacherError as error:
            reasons.append(f"{by}: {error}")
        else:
            return replace(found, score_by=by)
    return replace(found, notes={**found.notes, "score_by": _with_cure("; ".join(reasons))})


def _probe_alignment(
    client: Client, found: Capabilities, tokens: list[int], written: tuple[int, Row], k: int
) -> Capabilities:
    """The generated token's own distribution against the scored one, at its place and one to either side."""
    token, row = written
    assert found.score_by is not None
    sequence = [*tokens, token, tokens[-1]]
    [choice] = ask_score(client, [sequence], k, found.score_by)
    places = {shift: scored_rows(choice, sequence, [len(tokens) + shift])[0] for shift in (-1, 0, 1)}
    distance = {shift: _distance(row, scored) for shift, scored in places.items()}
    aligned = distance[0] < SAME and distance[0] <= min(distance.values())
    if aligned:
        return replace(found, aligned=True)
    told = ", ".join(f"{shift:+d}: {value:.2f}" for shift, value in distance.items())
    note = f"a generated token's distribution is not the scored one (distance in nats by shift {told})"
    return replace(found, aligned=False, notes={**found.notes, "aligned": note})


def _distance(one: Row, other: Row) -> float:
    """The largest difference over the likely tokens of `one`; what `other` does not hold is far away."""
    likely = sorted(one, key=lambda i: -one[i])[:3]
    return max(abs(one[i] - other.get(i, -30.0)) for i in likely)


def _largest_k(client: Client, found: Capabilities, tokens: list[int], k: int) -> int | None:
    largest = None
    for candidate in sorted({*KS, k}):
        try:
            if found.score_by:
                ask_score(client, [tokens], candidate, found.score_by)
            else:
                [choice] = client.complete(
                    prompt=[tokens], max_tokens=1, logprobs=candidate, return_tokens_as_token_ids=True
                )
                ids, rows = written_rows(choice)
                topk_from_rows(rows, ids, candidate)
        except TeacherError:
            break
        largest = candidate
    return largest


def _with_cure(reason: str) -> str:
    if "max allowed" in reason:
        return f"{reason}; start the server with a larger --max-logprobs, or lower teacher.top_k"
    return reason
