"""Prompt files in every format, and what is said of a bad one: always the place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bakery.errors import DataError, RecipeError
from bakery.prompts import reading
from bakery.prompts.reading import prompts_sha, read_prompts

SYSTEM = [{"role": "system", "content": "Sois bref."}]
TALK = [{"role": "user", "content": "Grüße, 你好 🍞"}, {"role": "assistant", "content": 'Ja\n  \\ "so"'}]
ROWS = [
    {"messages": TALK, "prefix_messages": None, "source": "a"},
    {"messages": TALK[:1], "prefix_messages": SYSTEM, "source": "b"},
    {"messages": [*SYSTEM, *TALK], "prefix_messages": None, "source": "c"},
]


def lines(rows=ROWS) -> bytes:
    """As people write them: a key without a value is left out."""
    trees = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return "".join(json.dumps(tree, ensure_ascii=False) + "\n" for tree in trees).encode()


def write(path, rows=ROWS):
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines(rows))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines(rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def no_shared_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.zst", "p.parquet"])
def test_each_format_gives_the_rows_in_order(tmp_path, name):
    rows = read_prompts(write(tmp_path / name))
    assert [row.data["messages"] for row in rows] == [row["messages"] for row in ROWS]
    assert [row.data.get("prefix_messages") for row in rows] == [None, SYSTEM, None]
    assert [row.form for row in rows] == ["messages"] * 3


def test_a_row_keeps_the_place_it_came_from(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\n{"text": "a"}\n   \n{"text": "b"}')  # empty lines count
    rows = read_prompts(str(tmp_path / "p.jsonl"))
    assert [(row.where, row.data["text"]) for row in rows] == [
        (f"{tmp_path}/p.jsonl:2", "a"),
        (f"{tmp_path}/p.jsonl:4", "b"),
    ]
    assert read_prompts(write(tmp_path / "p.parquet"))[2].where == f"{tmp_path}/p.parquet, row 2"


@pytest.mark.usefixtures("no_shared_cache")
def test_the_same_rows_have_one_sha_in_every_format(tmp_path):
    from datasets import Dataset, DatasetDict

    shas = {name: prompts_sha(read_prompts(write(tmp_path / name))) for name in ("a.jsonl", "a.jsonl.zst", "a.parquet")}
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(ROWS[:1]), held_out=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dict")
    shas["saved"] = prompts_sha(read_prompts(str(tmp_path / "saved")))
    shas["dict"] = prompts_sha(read_prompts(str(tmp_path / "dict"), split="held_out"))
    for kind in ("jsonl", "parquet"):
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / f"train.{kind}")
        shas[f"directory of {kind}"] = prompts_sha(read_prompts(str(tmp_path / kind)))
    assert set(shas.values()) == {shas["a.jsonl"]}, shas


def test_a_key_that_one_message_has_leaves_the_sha_alone(tmp_path):
    """Parquet gives every message of a column the same keys, with null where a message has none."""
    rows = [{"messages": [{**TALK[0], "name": "Ann"}, TALK[1]]}]
    assert prompts_sha(read_prompts(write(tmp_path / "p.jsonl", rows))) == prompts_sha(
        read_prompts(write(tmp_path / "p.parquet", rows))
    )


def test_the_sha_is_of_content_and_order(tmp_path):
    def sha(rows):
        return prompts_sha(read_prompts(write(tmp_path / "p.jsonl", rows)))

    base = [{"prompt": "a", "response": "b"}, {"prompt": "c"}]
    assert sha([{**base[0], "source": "x"}, base[1]]) == sha(base)  # a column that bakery does not read
    assert sha([dict(reversed(base[0].items())), base[1]]) == sha(base)
    others = [
        base[::-1],
        base[:1],
        [{"prompt": "a", "response": "B"}, base[1]],
        [{"prompt": "ab"}, base[1]],
        [{**base[0], "prefix_messages": SYSTEM}, base[1]],
        [base[0], {"text": "c"}],
    ]
    assert len({sha(rows) for rows in [base, *others]}) == 7


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', r"p.jsonl:2: not JSON"),
        (b'{"text": "\xff"}', r"p.jsonl:2: not JSON"),
        (b"[" * 200_000, r"p.jsonl:2: not JSON"),
        (rb'{"prompt": "a \ud83d b"}', r"p.jsonl:2: '\\ud83d' is half a character"),
        (rb'{"messages": [{"role": "user", "content": "\ude00"}]}', r"p.jsonl:2: '\\ude00' is half a character"),
        (b"[1, 2]", r"p.jsonl:2: a row is an object, this is a list"),
        (b'{"source": 1}', r"p.jsonl:2: a row holds exactly one of text, prompt, messages.*source"),
        (b'{"text": null}', r"p.jsonl:2: a row holds exactly one of"),
        (b'{"text": "a", "prompt": "b"}', r"p.jsonl:2: a row holds exactly one of .*'text', 'prompt'"),
        (b'{"text": ""}', r"p.jsonl:2: `text` is text with at least one character"),
        (b'{"text": 3}', r"p.jsonl:2: `text` is text .*not 3"),
        (b'{"prompt": {"a": 1}}', r"p.jsonl:2: `prompt` is text"),
        (b'{"prompt": []}', r"p.jsonl:2: `prompt` is a list of \{role, content\}"),
        (b'{"messages": "hi"}', r"p.jsonl:2: `messages` is a list of \{role, content\}"),
        (b'{"messages": []}', r"p.jsonl:2: `messages` is a list"),
        (b'{"messages": [{"role": "user"}]}', r"p.jsonl:2: `messages` is a list"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', r"p.jsonl:2: `messages` is a list"),
        (b'{"prompt": "a", "response": 4}', r"p.jsonl:2: `response` is text beside a `prompt`"),
        (b'{"text": "a", "response": "b"}', r"p.jsonl:2: `response` is text beside a `prompt`"),
        (b'{"text": "a", "prefix_messages": "b"}', r"p.jsonl:2: `prefix_messages` is a list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, says):
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=says):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_an_empty_file(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"p.jsonl holds no prompts"):
        read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.zst", "p.parquet"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(RecipeError, match=rf"prompts.path: .*{name} does not exist"):
        read_prompts(str(tmp_path / name))


@pytest.mark.usefixtures("no_shared_cache")
def test_a_directory_without_the_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dict")
    for path, split in ((tmp_path / "dict", "tests"), (tmp_path / "absent", "train")):
        with pytest.raises(RecipeError, match=rf"{path} is neither a file .* nor a data set with split {split}"):
            read_prompts(str(path), split)


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "p.parquet").write_bytes(lines())
    with pytest.raises(DataError, match=r"p.parquet: not a Parquet file"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_a_zst_file_that_is_none(tmp_path):
    (tmp_path / "p.jsonl.zst").write_bytes(lines())
    with pytest.raises(DataError, match=r"p.jsonl.zst: not a whole zstd file"):
        read_prompts(str(tmp_path / "p.jsonl.zst"))


def test_a_truncated_zst_file_is_never_read_as_a_shorter_one(tmp_path):
    """A compressor that flushes now and then leaves whole lines in front of the cut."""
    packer = zstandard.ZstdCompressor().compressobj()
    head = packer.compress(lines(ROWS[:1])) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    whole = head + packer.compress(lines(ROWS[1:])) + packer.flush()
    for size in (len(head), len(head) + 20, len(whole) - 1):
        (tmp_path / "p.jsonl.zst").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"p.jsonl.zst"):
            read_prompts(str(tmp_path / "p.jsonl.zst"))


def test_every_frame_of_a_zst_file_is_read(tmp_path):
    """`cat a.zst b.zst` and parallel compressors make files of several frames."""
    (tmp_path / "p.jsonl.zst").write_bytes(b"".join(zstandard.compress(lines([row])) for row in ROWS))
    assert len(read_prompts(str(tmp_path / "p.jsonl.zst"))) == 3


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.zst"])
def test_a_line_without_end_is_not_read_to_its_end(tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1 << 16)
    data = b'{"prompt": "' + b"a" * (1 << 20) + b'"}\n'
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    with pytest.raises(DataError, match=r":1: a line of more than 65,536 bytes"):
        read_prompts(str(tmp_path / name))
