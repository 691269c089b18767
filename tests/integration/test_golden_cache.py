"""data/golden and data/golden-2, of formats 1 and 2, stay readable for ever, with the same numbers in them."""

from dataclasses import replace
from math import exp

import numpy as np
import pyarrow.parquet as pq
import pytest
from caches_by_hand import bits
from conftest import ROOT

from bakery.cache import cache_teacher
from bakery.config import load_recipe
from bakery.prompts.reading import prompts_sha, read_prompts
from bakery.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint
from bakery.shards.manifest import Identity
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.shards.versions import VERSIONS

GOLDEN = {1: ROOT / "data/golden", 2: ROOT / "data/golden-2"}
# Of the first target: log-probs as stored and as read; norms at temperature 2, which move with the grid.
STORED = {1: [-0.578125, -2.515625, -2.640625, -3.859375], 2: [-0.5859375, -2.5234375, -2.6484375, -3.859375]}
READ = {1: [-0.5846103, -2.5221102, -2.6471102], 2: [-0.5856238, -2.5231237, -2.6481237]}
NORMS = {1: [1.87828, 1.63774], 2: [1.87926, 1.63725]}


@pytest.fixture(scope="module", params=GOLDEN)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def golden(version):
    return CacheReader(GOLDEN[version])


def test_each_version_has_one():
    assert tuple(GOLDEN) == VERSIONS


def test_it_is_sound(golden, version):
    assert validate(GOLDEN[version]) == []
    counts = {split: [(e.rows, e.targets) for e in entries] for split, entries in golden.manifest.splits.items()}
    assert counts == {"train": [(4, 357), (4, 470), (2, 217)], "validation": [(1, 146), (1, 149)]}


def test_its_manifest_is_that_of_its_files(golden, version):
    assert prompts_sha(read_prompts("data/chats.jsonl")) == golden.manifest.prompts_sha
    assert tokenizer_fingerprint(load_tokenizer("data/golden-tokenizer")) == golden.manifest.tokenizer_fingerprint
    assert (golden.manifest.format_version, golden.manifest.k, golden.manifest.vocab_size) == (version, 16, 259)


def test_the_first_row(golden, version):
    record = golden.read("train", 0)
    example, topk = record.example, record.topk
    assert (example.id, record.origin) == ("a7f6519a114ea0c9b4e3503f6530fac6", "dataset")
    assert [len(x) for x in (example.student_context, example.teacher_context, example.response)] == [111, 137, 167]
    tokenizer = load_tokenizer("data/golden-tokenizer")
    assert tokenizer.decode(example.teacher_context).startswith(
        "<|im_start|>system\nAnswer as a baker would.\n\nYou are a calm kitchen helper."
    )
    assert tokenizer.decode(example.response).startswith(
        "About three minutes for black tea and two for green.<|im_end|>\n"
    )
    assert np.flatnonzero(~example.is_target)[:2].tolist() == [53, 54]  # the newline, and the user's turn

    assert topk.ids[:5].tolist() == [76, 102, 92, 151, 33]
    assert topk.tail_logprob[:2].tolist() == pytest.approx([-1.6802084, -1.9255626], abs=1e-6)
    assert topk.support_size[:4].tolist() == [9, 4, 6, 8]  # where 80 % of the mass is
    assert topk.token_logprob[:2].tolist() == pytest.approx([-7.6640239, -10.3139219], abs=1e-6)
    assert topk.log_norm[:2, 0].tolist() == pytest.approx(NORMS[version], abs=1e-4)
    # stored on the grid, and read with all the mass that the tail leaves
    stored = pq.read_table(GOLDEN[version] / "data/train-00000.parquet").column("topk_logprobs")[0].as_py()
    assert stored[:4] == STORED[version]
    assert topk.logprobs[:3].tolist() == pytest.approx(READ[version], abs=1e-6)
    assert np.exp(topk.logprobs[:9].astype(float)).sum() == pytest.approx(1 - exp(-1.6802084), abs=1e-6)


def test_the_last_row(golden):
    record = golden.read("validation", 1)
    assert record.example.id == "f4eb7dc78f1a35f3549510422913bfe6"
    assert [len(record.example.student_context), len(record.example.teacher_context)] == [
        58,
        212,
    ]  # a prefix of its own
    assert record.topk.token_logprob[:2].tolist() == pytest.approx([-4.0570288, -8.9490032], abs=1e-6)


def test_made_again_it_holds_the_same_records(golden, tmp_path):
    known = golden.manifest
    steps = [f"cache.logprob_step={known.logprob_step}", f"cache.logprob_step_max={known.logprob_step_max}"]
    recipe = load_recipe("data/golden.yaml", [f"cache.out={tmp_path / 'again'}", *steps])
    again = CacheReader(cache_teacher(recipe))
    own = {*Identity.model_fields}
    assert again.manifest.model_dump(include=own) == golden.manifest.model_dump(include=own)
    assert again.splits == golden.splits
    for split in golden.splits:
        for old, new in zip(golden.records(split), again.records(split), strict=True):
            # the libm of a machine may round the last bit of a logarithm otherwise
            for name in ("logprobs", "tail_logprob", "token_logprob", "log_norm"):
                assert getattr(new.topk, name) == pytest.approx(getattr(old.topk, name), abs=1e-5), name
            exact = {
                name: getattr(old.topk, name) for name in ("logprobs", "tail_logprob", "token_logprob", "log_norm")
            }
            assert bits(replace(new, topk=replace(new.topk, **exact))) == bits(old)
