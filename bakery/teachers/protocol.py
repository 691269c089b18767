"""What a teacher can do, as types. Example -> TopK; a capability is a protocol, not a flag."""

from typing import Literal, Protocol, runtime_checkable

from bakery.config import SamplingConfig
from bakery.records import Ids, Mask, TeacherInfo, TopK

Task = Literal["score", "generate"]


class Teacher(Protocol):
    """What is known before any weights are loaded or any server is asked, so that a wrong recipe costs seconds."""

    info: TeacherInfo
    vocab_size: int  # ids of real tokens are below it
    max_length: int | None  # tokens of context and response together
    calls_in_flight: int  # how many calls it takes at a time, from as many threads

    def plan(self, contexts: list[Ids], lengths: list[int], task: Task) -> list[list[int]]:
        """The calls that these rows are best asked in, as indices; a length is that of context and response together.

        A teacher may run once what planned contexts share. Before anything of another plan is asked, plan again.
        """
        ...

    def open(self) -> "Teacher":
        """Load the weights or reach the server; what comes back is a Scorer, a Generator, or both."""
        ...

    def close(self) -> None:
        """Let go of weights, engine or connections; nothing is asked of it any more."""
        ...


Written = tuple[Ids, TopK]  # a response and the distributions that its tokens were sampled from


@runtime_checkable
class Scorer(Teacher, Protocol):
    def score(self, contexts: list[Ids], responses: list[Ids], targets: list[Mask], k: int) -> list[TopK]:
        """The distribution that predicts each target of each response, given its context; `k` entries a target, or a
        sample of `k` draws where the teacher's recipe has `draws`. Equal rows give equal draws."""
        ...


@runtime_checkable
class Generator(Teacher, Protocol):
    def generate(self, contexts: list[Ids], sampling: SamplingConfig, k: int, seeds: list[int]) -> list[Written]:
        """A response to each context, through its end-of-turn token. The distributions are those at temperature 1,
        before top-p. Equal arguments give equal answers."""
        ...


@runtime_checkable
class ChatGenerator(Teacher, Protocol):
    def generate_chat(
        self,
        conversations: list[list[dict[str, str]]],
        contexts: list[Ids],
        sampling: SamplingConfig,
        k: int,
        seeds: list[int],
    ) -> list[Written]:
        """As a Generator, where the server takes messages and renders them itself; it should read `contexts`."""
        ...
