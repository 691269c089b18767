"""The held-out rows are measured by batches of like length, and yet decoded once."""

import pytest
from builders import random_record, write_cache
from transformers import AutoModelForCausalLM

from bakery.reports.evaluate import evaluate
from bakery.shards.reader import CacheReader
from bakery.student.dataset import CacheDataset

ROWS = 200  # seven row groups


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    records = [random_record(f"r{i:03d}", response=2 + 7 * i % 31, k=4, seed=i) for i in range(ROWS)]
    return CacheReader(write_cache(tmp_path_factory.mktemp("held-out"), {"validation": records}, k=4))


def test_rows_larger_than_the_window_are_decoded_once_and_measured_as_ever(reader, tiny_model, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = evaluate(model, CacheDataset([(reader, 1.0)], "validation", 1.0))
    decoded, group = [], CacheReader.group
    monkeypatch.setattr(CacheReader, "group", lambda own, *asked: decoded.append(asked) or group(own, *asked))
    small = CacheDataset(
        [(reader, 1.0)], "validation", 1.0, window_bytes=int(reader.group_bytes("validation").sum() // 3)
    )
    assert evaluate(model, small) == pytest.approx(expected, rel=1e-6)
    assert len(small.windows()) == 3
    assert len(decoded) == len(set(decoded)) == len(reader.group_rows("validation")) == 7
