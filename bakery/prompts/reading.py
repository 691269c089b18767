"""Prompt files -> rows. A row keeps the place it came from, so that every later error can name it."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from bakery.errors import DataError, RecipeError, first_line

FORMS = ("text", "prompt", "messages")
FILES = (".jsonl", ".jsonl.zst", ".parquet")
LONGEST_LINE = 1 << 26  # bytes; a few kilobytes of zstd unpack to gigabytes


@dataclass(frozen=True)
class Row:
    where: str
    data: dict[str, Any]

    @property
    def form(self) -> str:
        return next(form for form in FORMS if self.data.get(form) is not None)


def read_prompts(path: str, split: str = "train") -> list[Row]:
    """Rows of a .jsonl, .jsonl.zst or .parquet file, or of a `datasets` directory or id.

    A row holds `text` (plain text), `prompt` with or without `response`, or chat `messages`; beside them it may hold
    `prefix_messages`. Other columns are left alone. Raises RecipeError for a missing file, DataError for a bad row.
    """
    rows = [_checked(where, data) for where, data in _raw_rows(path, split)]
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows


def prompts_sha(rows: list[Row]) -> str:
    """Of the content that bakery reads, in order: the same for the same rows in any file format."""
    digest = sha256()
    for row in rows:
        digest.update(_canonical(row.data) + b"\n")
    return digest.hexdigest()


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, ensure_ascii=False).encode()


def _raw_rows(path: str, split: str) -> Iterator[tuple[str, Any]]:
    file = Path(path)
    if path.endswith(FILES) and not file.is_file():
        raise RecipeError(f"prompts.path: {path} does not exist")
    if path.endswith(".jsonl"):
        with file.open("rb") as stream:
            yield from _json_lines(path, stream)
    elif path.endswith(".jsonl.zst"):
        import pyarrow as pa

        try:  # pyarrow's stream, because it tells a cut file from a short one
            with pa.input_stream(file, compression="zstd") as stream:
                yield from _json_lines(path, io.BufferedReader(stream))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole zstd file: {error}") from error
    elif path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist()))
    else:
        yield from ((f"{path}[{split}], row {i}", row) for i, row in enumerate(_dataset(path, split)))


def _json_lines(path: str, stream: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE + 1), b""), start=1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; each row takes a line")
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error


def _dataset(path: str, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(path, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(
            f"prompts.path: {path} is neither a file ({', '.join(FILES)}) nor a data set with split {split}: "
            f"{first_line(error)}"
        ) from error


def _checked(where: str, data: Any) -> Row:
    if not isinstance(data, dict):
        raise DataError(f"{where}: a row is an object, this is a {type(data).__name__}")
    forms = [form for form in FORMS if data.get(form) is not None]
    if len(forms) != 1:
        raise DataError(
            f"{where}: a row holds exactly one of {', '.join(FORMS)}; this one holds {forms or sorted(data)}"
        )
    kept = {key: data[key] for key in (forms[0], "response", "prefix_messages") if data.get(key)}
    if forms[0] == "messages" or isinstance(data[forms[0]], list):
        kept[forms[0]] = _messages(where, forms[0], data[forms[0]])
    elif not isinstance(data[forms[0]], str) or not data[forms[0]]:
        raise DataError(f"{where}: `{forms[0]}` is text with at least one character, not {data[forms[0]]!r}")
    if data.get("response") is not None and (forms[0] != "prompt" or not isinstance(data["response"], str)):
        raise DataError(f"{where}: `response` is text beside a `prompt`")
    if data.get("prefix_messages"):
        kept["prefix_messages"] = _messages(where, "prefix_messages", data["prefix_messages"])
    try:
        _canonical(kept)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{where}: {half!a} is half a character, whose other half is missing; mend the row or leave it out"
        ) from error
    return Row(where, kept)


def _messages(where: str, name: str, messages: Any) -> list[dict[str, str]]:
    """Roles and contents, all that a template is given: formats that fill other keys with nulls make no difference."""
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not good:
        raise DataError(f"{where}: `{name}` is a list of {{role, content}} with text in both")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
