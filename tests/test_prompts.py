"""Oracle: files written byte by byte."""

import pytest

from mitune.prompts import Prompt, load, read_prompts


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
    assert read_prompts(tmp_path / "p.txt") == [Prompt(0, "a red circle"), Prompt(1, "a blue square")]


def test_the_id_is_the_line(tmp_path):
    (tmp_path / "p.txt").write_text("\na\n\na\nb\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [Prompt(1, "a"), Prompt(4, "b")]


def test_other_alphabets_are_kept(tmp_path):
    text = "café près d'une étoile ★ 圆"
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [Prompt(0, text)]
    (tmp_path / "p.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.txt is not UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("raw", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(tmp_path, raw):
    (tmp_path / "color_train.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"color_train\.txt has no prompt"):
        load(tmp_path, "color", "train")


def test_splits_and_counts(tmp_path):
    (tmp_path / "color_train.txt").write_text("a\nb\na\nc\n")
    assert [prompt.text for prompt in load(tmp_path, "color", "train", 2)] == ["a", "b"]
    assert len(load(tmp_path, "color", "train")) == 3
    with pytest.raises(ValueError, match=r"color_train\.txt has 3 distinct prompts, 4 were asked for"):
        load(tmp_path, "color", "train", 4)
    with pytest.raises(ValueError, match=r"category 'colour', split 'train': .* has color_train"):
        load(tmp_path, "colour", "train")
    with pytest.raises(ValueError, match="split 'dev'"):
        load(tmp_path, "color", "dev")
    with pytest.raises(ValueError, match="missing"):
        read_prompts(tmp_path / "none.txt")
