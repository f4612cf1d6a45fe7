"""Oracle: files of known content behind file addresses; nothing here asks the network."""

import hashlib

import pytest

from mitune import downloads

FILES = {"color_train.txt": b"a red car\r\na caf\xc3\xa9", "color_val.txt": b"a blue bird\r\n"}
SHA256 = {name: hashlib.sha256(raw).hexdigest() for name, raw in FILES.items()}


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    for name, raw in FILES.items():
        (folder / name).write_bytes(raw)
    return folder


def test_the_files_arrive_byte_for_byte_and_once(origin, tmp_path):
    folder = tmp_path / "data" / "t2i-compbench"
    downloads.fetch(folder, origin.as_uri(), SHA256)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    for file in origin.iterdir():
        file.unlink()
    downloads.fetch(folder, origin.as_uri(), SHA256)
    assert [file.name for file in folder.parent.iterdir()] == ["t2i-compbench"]


def test_a_file_of_other_content_leaves_no_folder_and_the_rest_is_not_fetched_again(origin, tmp_path):
    folder = tmp_path / "data" / "t2i-compbench"
    (origin / "color_val.txt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"color_val\.txt has SHA-256 .*: it is not the pinned file"):
        downloads.fetch(folder, origin.as_uri(), SHA256)
    assert not folder.exists()
    (origin / "color_val.txt").write_bytes(FILES["color_val.txt"])
    (origin / "color_train.txt").unlink()
    downloads.fetch(folder, origin.as_uri(), SHA256)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    (folder / "color_val.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"color_val\.txt is missing or not the one of .*: move .*t2i-compbench away"):
        downloads.fetch(folder, origin.as_uri(), SHA256)


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    monkeypatch.setattr(downloads, "COMPBENCH", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert downloads.main(["t2i-compbench"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "http://127.0.0.1:9/color_train.txt cannot be reached" in said and "connect to the network" in said
    assert "or put the 12 files of http://127.0.0.1:9 into" in said
    assert not (tmp_path / "data" / "t2i-compbench").exists()


def test_twelve_files_are_pinned():
    splits = {name.rpartition("_")[::2] for name in downloads.SHA256}
    assert splits == {
        (category, f"{split}.txt") for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex") for split in ("train", "val")
    }
    assert all(len(sha) == 64 for sha in downloads.SHA256.values())
