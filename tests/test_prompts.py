"""Oracle: files written byte by byte, and as the formats' own writers make them."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mitune.prompts import Prompt, read_prompts, read_rows

TWO = [Prompt(0, "a red circle"), Prompt(1, "a blue square")]


@pytest.mark.parametrize(
    "raw",
    [
        b"a red circle\na blue square\n",
        b"a red circle\na blue square",
        b"a red circle\r\na blue square\r\n",
        b"\xef\xbb\xbfa red circle\na blue square\n",
        b"a red circle\na blue square\na red circle\n\n",
        b"  a red circle \na blue square\n \n",
    ],
)
def test_forms_of_the_same_file(tmp_path, raw):
    (tmp_path / "p.txt").write_bytes(raw)
    assert read_prompts(tmp_path / "p.txt") == TWO


def test_the_id_is_the_line(tmp_path):
    (tmp_path / "p.txt").write_text("\na\n\na\nb\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [Prompt(1, "a"), Prompt(4, "b")]


def test_other_alphabets_are_kept(tmp_path):
    text = "café près d'une étoile ★ 圆"
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}), encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == [Prompt(0, text)]
    for name in ("p.txt", "p.csv", "p.jsonl"):
        (tmp_path / name).write_bytes("é".encode("latin-1"))
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(byte 0\): save it as UTF-8"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize("raw", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_an_empty_file_is_named(tmp_path, raw, ending):
    (tmp_path / f"p.{ending}").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"p\.{ending} has no prompt: write one prompt a (line|row)"):
        read_prompts(tmp_path / f"p.{ending}")


@pytest.mark.parametrize("column", ["prompt", "a caption"])
def test_tables_of_every_format_say_the_same(tmp_path, column):
    rows = [("a red circle", 4, "mine", "train"), ('a "blue" square, big', 2, "yours", None), ("  ", 9, None, None)]
    names = (column, "id", "category", "split")
    (tmp_path / "p.csv").write_bytes(
        f'{column},id,category,split,more\r\na red circle,4,mine,train,x\r\n"a ""blue"" square, big",2,yours,,\r\n  ,9,,,'.encode()
    )
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n\n")
    pq.write_table(pa.table({name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}), tmp_path / "p.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        found = read_rows(tmp_path / f"p.{ending}", column)
        assert [(row.prompt, row.category, row.split) for row in found] == [
            (Prompt(4, "a red circle"), "mine", "train"), (Prompt(2, 'a "blue" square, big'), "yours", None)
        ]  # fmt: skip


def test_without_the_column_id_the_row_is_the_id(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na\n\nb\n,\nc\n")
    assert read_prompts(tmp_path / "p.csv") == [Prompt(0, "a"), Prompt(1, "b"), Prompt(3, "c")]


@pytest.mark.parametrize(
    ("name", "raw", "named"),
    [
        ("p.csv", "text,id\na,1\n", "p.csv has no column 'prompt': it has text, id; name the column of prompts in `column`"),
        ("p.csv", 'prompt\n"a\n', "p.csv is not CSV"),
        ("p.csv", "prompt,id\na,x1\n", "p.csv row 0: id is 'x1': it must be a whole number"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl has no column 'prompt': it has text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "p.jsonl line 1 is no object"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl row 0: prompt is 3: a prompt is text"),
        ("p.jsonl", '{"prompt": "a", "split": 3}\n', "p.jsonl row 0: split is 3: it must be text"),
        ("p.parquet", "PAR1", "p.parquet is not a Parquet table"),
        ("p.xlsx", "a", "p.xlsx ends in '.xlsx': a file of prompts ends in .txt, .csv, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, raw, named):
    (tmp_path / name).write_text(raw)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt is missing"):
        read_prompts(tmp_path / "none.txt")
