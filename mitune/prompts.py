"""Files of prompts: text (one prompt a line), CSV, JSON lines and Parquet, the last three with a column of prompts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt and its home: `prompt_id` is the line or row of its file, counted from 0, or the number in the table's column `id`."""

    prompt_id: int
    text: str


@dataclass(frozen=True)
class Row:
    """A prompt of a file, and what the table's columns `category` and `split` say of it, if it has them."""

    prompt: Prompt
    category: str | None = None
    split: str | None = None


def read_rows(path: Path, column: str = "prompt") -> list[Row]:
    """The prompts of a file in its order, white space at their ends removed; rows without a prompt are passed over and counted.

    Raises ValueError for a file that is missing, of an unknown ending, not of its format, not UTF-8 or empty, a table without the column,
    and an `id` that is not a whole number.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}: a file of prompts ends in {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"{path} is missing: a file of prompts ends in {', '.join(READERS)}")
    rows = reader(path, column)
    if not rows:
        raise ValueError(f"{path} has no prompt: write one prompt a {'line' if path.suffix.lower() == '.txt' else 'row'}")
    return rows


def read_prompts(path: Path, column: str = "prompt") -> list[Prompt]:
    """The distinct prompts of a file. Raises ValueError as `read_rows` does."""
    return distinct(row.prompt for row in read_rows(path, column))


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts in their order, the first of those with the same text kept."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def ranked(texts: Iterable[str], seed: int) -> list[str]:
    """The distinct texts in the order of SHA-256 of "{seed} {text}": a random order that neither their own order nor a library's version changes, and of
    which more texts are only a finer one."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())


def decode(raw: bytes, where: object) -> str:
    """A UTF-8 text, with or without a byte-order mark, every line ended by a line feed. Raises ValueError that names `where` for other bytes."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path, column: str) -> list[Row]:
    stripped = (line.strip() for line in decode(path.read_bytes(), path).split("\n"))
    return [Row(Prompt(number, line)) for number, line in enumerate(stripped) if line]


def _csv(path: Path, column: str) -> list[Row]:
    try:
        table = csv.DictReader(io.StringIO(decode(path.read_bytes(), path)), strict=True)
        rows = list(table)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error}): save it with commas, and text that has commas in double quotes") from None
    return _rows(path, column, table.fieldnames or (), rows)


def _jsonl(path: Path, column: str) -> list[Row]:
    rows = []
    for number, line in enumerate(decode(path.read_bytes(), path).split("\n")):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number + 1} is not JSON ({error}): write one object a line") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f'{path} line {number + 1} is no object: write {{"{column}": "a prompt"}}')
    return _rows(path, column, list(dict.fromkeys(name for row in rows for name in row)), rows)


def _parquet(path: Path, column: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        rows = file.read([name for name in dict.fromkeys((column, "id", "category", "split")) if name in names]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet table ({' '.join(str(error).split())}): write it anew") from None
    return _rows(path, column, names, rows)


READERS: dict[str, Callable[[Path, str], list[Row]]] = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def _rows(path: Path, column: str, names: Iterable[str], rows: list[Mapping[str, Any]]) -> list[Row]:
    """The rows of a table with the columns `names` whose column of prompts is `column`."""
    named = [name for name in names if name.strip()]
    if named and column not in named:
        raise ValueError(f"{path} has no column {column!r}: it has {', '.join(named)}; name the column of prompts in `column`")
    found = []
    for number, row in enumerate(rows):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path} row {number}: {column} is {text!r}: a prompt is text")
        if text and text.strip():
            found.append(Row(Prompt(_id(path, number, row), text.strip()), *(_word(path, number, name, row.get(name)) for name in ("category", "split"))))
    return found


def _id(path: Path, number: int, row: Mapping[str, Any]) -> int:
    value = row.get("id")
    if value in (None, ""):
        return number
    if not str(value).strip().isdecimal():
        raise ValueError(f"{path} row {number}: id is {value!r}: it must be a whole number; without the column the row is the id")
    return int(value)


def _word(path: Path, number: int, name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path} row {number}: {name} is {value!r}: it must be text")
    return (value or "").strip() or None
