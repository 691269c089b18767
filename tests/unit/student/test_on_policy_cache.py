"""The cache of an on-policy run: its shards are of a bounded size, wherever the run was broken off."""

import pytest
from caches_by_hand import bits, identity, record, write_cache

from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.shards.writer import CacheWriter
from bakery.student.on_policy_cache import DIRECTORY, OnPolicyCache
from bakery.student.on_policy_opening import _of_all

RECORDS = [record(n) for n in range(23)]
KEYS = [r.example.id for r in RECORDS]


def opened(out):
    return OnPolicyCache(out, identity(rows_per_shard=5), {})


def rows_of_shards(out):
    return {entry.file: entry.rows for entry in CacheReader(out / DIRECTORY).manifest.entries()}


def assert_whole(out):
    assert validate(out / DIRECTORY) == []
    assert [bits(r) for r in CacheReader(out / DIRECTORY).records()] == [bits(r) for r in RECORDS]


def test_a_checkpoint_publishes_shards_of_rows_per_shard_and_the_rest(tmp_path):
    with opened(tmp_path) as cache:
        cache.add(RECORDS[::-1])
        cache.publish(KEYS[:12])
        assert set(cache.writer.answered) == {*KEYS[12:]}
        cache.publish(KEYS[12:])
        cache.finish()
    assert list(rows_of_shards(tmp_path).values()) == [5, 5, 2, 5, 5, 1]
    assert [file[-13:-8] for file in rows_of_shards(tmp_path)] == [f"{n:05d}" for n in range(6)]
    assert_whole(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_crash_between_two_shards_leaves_no_row_twice(tmp_path, monkeypatch, shards):
    real, done = CacheWriter.publish, []

    def breaking(writer, *args):
        if len(done) == shards:
            raise KeyboardInterrupt
        done.append(real(writer, *args))

    with monkeypatch.context() as patch, opened(tmp_path) as cache:
        patch.setattr(CacheWriter, "publish", breaking)
        cache.add(RECORDS)
        with pytest.raises(KeyboardInterrupt):
            cache.publish(KEYS)
    with opened(tmp_path) as cache:
        assert len(cache.writer.answered) == len(KEYS) - 5 * shards
        assert all(key in cache and bits(cache.find(key)) == bits(r) for key, r in zip(KEYS, RECORDS, strict=True))
        cache.publish(KEYS)
        cache.finish()
    assert list(rows_of_shards(tmp_path).values()) == [5, 5, 5, 5, 3]
    assert_whole(tmp_path)


def test_the_turns_that_its_sources_chose_are_told_apart(tmp_path):
    """As their prompts are: None where all of them are at the defaults."""
    plain, other, users = (
        CacheReader(write_cache(tmp_path / str(n), RECORDS[:1], turns_sha=sha))
        for n, sha in enumerate((None, None, "u"))
    )
    chosen = [_of_all(readers, "turns_sha") for readers in ([plain], [plain, other], [users])]
    assert chosen == [None, None, "u"]
    mixed = {_of_all(readers, "turns_sha") for readers in ([plain, users], [users, plain], [users, users])}
    assert len(mixed) == 3
    assert None not in mixed
