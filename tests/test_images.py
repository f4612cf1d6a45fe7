"""Oracle: pictures drawn by the test and stored in the real formats by other writers (PIL, tarfile, zipfile, json)."""

import io
import json
import tarfile
import zipfile

import pytest
import torch
from PIL import Image

from mitune import images

RED, BLUE = (200, 20, 40), (10, 30, 220)


def picture(color, size=(12, 8), kind="png", mode="RGB"):
    raw = io.BytesIO()
    Image.new(mode, size, color).save(raw, kind)
    return raw.getvalue()


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


FILES = {
    "000000000.png": picture(RED), "000000000.txt": "a café\n".encode(), "000000000.json": b'{"caption": "not this", "width": 12}',
    "000000001.webp": picture(BLUE, kind="webp"), "000000001.json": b'{"caption": "blue", "status": "success"}',
}  # fmt: skip


def colors(items):
    return [tuple(item.open().resize((1, 1)).getpixel((0, 0))) for item in items]


def test_a_folder_and_a_shard_say_the_same(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name, raw in FILES.items():
        (tmp_path / "folder" / "deep" / name).write_bytes(raw)
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "00000.tar", FILES)
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"")
    found = [images.captioned(source) for source in (tmp_path / "folder", tmp_path / "shards", tmp_path / "shards" / "00000.tar")]
    assert [item.caption for item in found[0]] == ["a café", "blue"]
    for items in found:
        assert [item.caption for item in items] == [item.caption for item in found[0]]
        assert colors(items)[0] == RED
        assert all(abs(a - b) < 4 for a, b in zip(colors(items)[1], BLUE, strict=True))


def test_the_key_of_a_shard_ends_at_the_first_dot_and_a_files_name_at_the_last(tmp_path):
    found = images.captioned(shard(tmp_path / "a.tar", {"x/0.b/1.png": picture(RED), "x/0.b/1.seg.png": b"a mask", "x/0.b/1.txt": b"red"}))
    assert [(item.member, item.caption) for item in found] == [("x/0.b/1.png", "red")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "my.photo.PNG").write_bytes(picture(RED))
    (tmp_path / "folder" / "my.photo.txt").write_text("red")
    assert [item.caption for item in images.captioned(tmp_path / "folder")] == ["red"]


def test_pixels_are_the_middle_at_the_size(tmp_path):
    wide = Image.new("RGB", (60, 20), BLUE)
    wide.paste(RED, (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    Image.new("L", (10, 30), 255).save(tmp_path / "gray.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    items = [images.Captioned("", tmp_path / f"{name}.png") for name in ("wide", "gray", "clear")]
    found = images.pixels(items, 20)
    assert found.shape == (3, 3, 20, 20)
    assert torch.equal(found[0], (torch.tensor(RED)[:, None, None].expand(3, 20, 20) / 127.5 - 1))
    assert (found[1] == 1).all() and (found[2] == 1).all()
    assert images.pixels(items, 16).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("raw", [b"<html>not found</html>", b"", picture(RED, (64, 64), "jpeg")[:300], picture(RED, (64, 64))[:60]])
def test_a_file_that_is_no_image_is_named(tmp_path, raw):
    (tmp_path / "0.jpg").write_bytes(raw)
    in_tar = images.captioned(shard(tmp_path / "00000.tar", {"0.jpg": raw, "0.txt": b"red"}))[0]
    for item, name in ((images.Captioned("red", tmp_path / "0.jpg"), r"/0\.jpg"), (in_tar, r"00000\.tar/0\.jpg")):
        with pytest.raises(ValueError, match=rf"{name} is not an image \(.*\): remove it, or fetch it again") as error:
            images.pixels([item], 8)
        assert "\n" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="none is missing: give a folder of images"):
        images.captioned(tmp_path / "none")
    with pytest.raises(ValueError, match="a has no image: give a folder"):
        images.captioned(tmp_path / "a")
    (tmp_path / "a" / "0.png").write_bytes(picture(RED))
    with pytest.raises(ValueError, match=r"a/0\.png has no caption: write it into 0\.txt or, as `caption`, into 0\.json"):
        images.captioned(tmp_path / "a")
    (tmp_path / "a" / "0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a/0\.json has no `caption`"):
        images.captioned(tmp_path / "a")
    (tmp_path / "a" / "0.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"a/0\.txt is not UTF-8"):
        images.captioned(tmp_path / "a")
    whole = shard(tmp_path / "00000.tar", FILES).read_bytes()
    for raw in (whole[:700], b"nothing", b"\x1f\x8b" + whole):
        (tmp_path / "00000.tar").write_bytes(raw)
        with pytest.raises(ValueError, match=r"00000\.tar is not a tar file \(.*\): fetch it again"):
            images.captioned(tmp_path / "00000.tar")


def test_two_images_of_one_name_in_two_folders_are_two(tmp_path):
    items = [images.Captioned(name, tmp_path / name / "0.png") for name in ("a", "b")]
    assert {item.caption for item in images.draw(items, 2, 0)} == {"a", "b"}


def test_draws_are_seeded_and_nested(tmp_path):
    items = [images.Captioned(str(n), tmp_path / f"{n}.png") for n in range(30)]
    few, more = images.draw(items, 5, 0), images.draw(items[::-1], 9, 0)
    assert more[:5] == few and len({item.caption for item in more}) == 9
    assert images.draw(items, 5, 1) != few
    with pytest.raises(ValueError, match="has 30 captioned images, 31 were asked for"):
        images.draw(items, 31, 0)


@pytest.fixture
def coco(tmp_path):
    """captions_val2014.json as the data set has it, and its images as a folder and as the zip file."""
    notes = [(42, 5, "A shoe rack."), (42, 3, "Shoes in a row. "), (73, 9, "A motorcycle."), (42, 4, "Rack.")]
    found = {
        "info": {"year": 2014}, "licenses": [],
        "images": [{"id": key, "file_name": f"COCO_val2014_{key:012d}.jpg", "width": 12, "height": 8} for key in (73, 42)],
        "annotations": [{"image_id": image, "id": key, "caption": text} for image, key, text in notes],
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps(found))
    (tmp_path / "val2014").mkdir()
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        for key, color in ((42, RED), (73, BLUE)):
            name = f"val2014/COCO_val2014_{key:012d}.jpg"
            (tmp_path / name).write_bytes(picture(color, kind="jpeg"))
            archive.write(tmp_path / name, name)
    return tmp_path


def test_coco_has_an_image_and_its_first_caption(coco):
    import shutil

    unpacked = images.coco(coco)
    assert [item.caption for item in unpacked] == ["Shoes in a row.", "A motorcycle."]
    before = colors(unpacked)
    assert all(abs(a - b) < 4 for a, b in zip(before[0], RED, strict=True))
    shutil.rmtree(coco / "val2014")
    packed = images.coco(coco)
    assert colors(packed) == before and packed[0].name.endswith("val2014.zip/val2014/COCO_val2014_000000000042.jpg")
    assert images.captioned(coco) == packed
    assert len(images.coco(coco, 1)) == 1
    (coco / "val2014.zip").unlink()
    with pytest.raises(ValueError, match=r"val2014 is missing, and val2014\.zip too: http://images\.cocodataset\.org"):
        images.coco(coco)


def test_a_coco_file_that_is_another_is_named(coco):
    named, note = '{"id": 1, "file_name": "a.jpg"}', '{"image_id": 1, "id": 1, "caption": %s}'
    for raw in ("{}", "[1", *(f'{{"images": [{image}], "annotations": [{note % caption}]}}' for image, caption in (("", '"a"'), (named, "3")))):
        (coco / "annotations" / "captions_val2014.json").write_text(raw)
        with pytest.raises(ValueError, match=r"captions_val2014\.json is no file of COCO captions \(.*fetch it again"):
            images.coco(coco)
    (coco / "annotations" / "captions_val2014.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="has no image: give"):
        images.captioned(coco)
    (coco / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(ValueError, match=r"captions_val2014\.json is missing"):
        images.coco(coco)
