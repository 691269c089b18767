"""A cache in a directory that goes away, for measuring what is written into one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bakery.records import Example, TeacherInfo
from bakery.shards.manifest import Identity
from bakery.shards.writer import CacheWriter, Window


@contextmanager
def scratch_cache(examples: list[Example], k: int, vocab_size: int) -> Iterator[tuple[CacheWriter, Window]]:
    """A writer, and the one window that all the examples are."""
    identity = Identity(
        k=k,
        top_mass=None,
        vocab_size=vocab_size,
        logprob_step=1 / 256,
        logprob_step_max=1 / 16,
        temperatures=(),
        teacher=TeacherInfo(backend="hf", name="measured", revision=None, dtype="float32", fingerprint=""),
        tokenizer_fingerprint="",
        template_sha="",
        prefix_sha="",
        prompts_sha="",
        sampling=None,
        validation_fraction=0.0,
        rows_per_shard=len(examples),
    )
    with TemporaryDirectory() as directory, CacheWriter.open_or_resume(Path(directory) / "c", identity, {}) as writer:
        [window] = writer.windows(examples)
        yield writer, window
