"""Answers of bounded size and time: no server decides how much of this machine's memory it takes."""

from collections.abc import AsyncIterator
from typing import Any

from bakery.errors import TeacherError

MOST_BYTES = 256 << 20  # 8 prompts of 4,096 tokens at k = 64 take 150 MB


async def bound(response: Any) -> None:
    """A response hook of the HTTP client: what is read of the body ends at MOST_BYTES, and nothing is unpacked."""
    if (coding := response.headers.get("content-encoding", "identity")) != "identity":
        raise TeacherError(f"the server packs its answer ({coding[:20]}), though it was asked not to")
    # The client's own base class, since openai is built on httpx in one version and on its successor in another.
    base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "AsyncByteStream")
    response.stream = type("Bounded", (_Bounded, base), {})(response.stream)


class _Bounded:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self.stream:
            size += len(part)
            if size > MOST_BYTES:
                raise TeacherError(
                    f"an answer of more than {MOST_BYTES:,} bytes; lower teacher.api.prompts_per_request or top_k"
                )
            yield part

    async def aclose(self) -> None:
        await self.stream.aclose()
