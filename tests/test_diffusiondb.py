"""Oracle: a small metadata table with the data set's columns and types, and parts with an image a row, both made here."""

import io
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mitune import diffusiondb, images
from mitune.benchmarks import Benchmark

ASKED = {"train": 3, "val": 1, "test": 2}
TYPES = {"image_name": pa.string(), "prompt": pa.string(), "part_id": pa.uint16(), "seed": pa.uint32(), "step": pa.uint16(), "cfg": pa.float32(),
         "image_nsfw": pa.float32(), "prompt_nsfw": pa.float32()}  # fmt: skip


def rows():
    """Ten prompts of four images, one of three and one of a blurred fourth, in two parts; and a third part that is not there."""
    for n in range(12):
        for k in range(3 if n == 10 else 5):
            yield f"{n}-{k}.png", f"prompt {n}", 1 + n % 2, 2.0 if n == 11 and k > 2 else 0.1
    yield from ((f"x-{k}.png", "elsewhere", 3, 0.1) for k in range(4))
    yield from ((f"y-{k}.png", "  ", 1, 0.1) for k in range(4))


@pytest.fixture
def folder(tmp_path):
    names, prompts, parts, nsfw = zip(*rows(), strict=True)
    blank = [0] * len(names)
    columns = dict(zip(TYPES, (names, prompts, parts, blank, blank, blank, nsfw, blank), strict=True))
    pq.write_table(pa.table({name: pa.array(list(values), TYPES[name]) for name, values in columns.items()}), tmp_path / "metadata.parquet")
    (tmp_path / "images" / "part-000001").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images" / "part-000002.zip", "w") as archive:
        for row, (name, part) in enumerate(zip(names, parts, strict=True)):
            raw = io.BytesIO()
            Image.new("RGB", (4, 4), (row, 0, 0)).save(raw, "png")
            if part == 1:
                (tmp_path / "images" / "part-000001" / name).write_bytes(raw.getvalue())
            elif part == 2:
                archive.writestr(name, raw.getvalue())
    return tmp_path


def test_the_sample_is_a_benchmark_and_its_images_are_the_prompts(folder):
    diffusiondb.build(folder, ASKED)
    found = Benchmark(folder / "diffusiondb.parquet").prompts("diffusiondb")
    assert {split: len(items) for split, items in found.items()} == ASKED
    texts = {split: {item.text for item in items} for split, items in found.items()}
    assert len(set.union(*texts.values())) == 6
    assert set.union(*texts.values()) <= {f"prompt {n}" for n in range(10)}
    table = list(rows())
    assert all(table[item.prompt_id][1] == item.text for items in found.values() for item in items)
    items = images.captioned(folder)
    assert {item.caption for item in items} == texts["train"]
    assert pd.Series([item.caption for item in items]).value_counts().eq(4).all()
    for item in items:
        row = item.open().getpixel((0, 0))[0]
        assert table[row][1] == item.caption and item.name.endswith(table[row][0])


def test_the_sample_is_seeded_and_a_larger_train_keeps_a_smaller(folder):
    table = diffusiondb.metadata(folder / "metadata.parquet", [1, 2])
    drawn, pairs = diffusiondb.sample(table, ASKED, 4, 0)
    again, pairs_again = diffusiondb.sample(table.iloc[::-1], ASKED, 4, 0)
    assert set(zip(drawn["prompt"], drawn["split"], strict=True)) == set(zip(again["prompt"], again["split"], strict=True))
    assert pairs.equals(pairs_again)
    larger = diffusiondb.sample(table, ASKED | {"train": 5}, 4, 0)[0].query("split == 'train'")
    assert set(drawn.query("split == 'train'")["prompt"]) < set(larger["prompt"])
    assert any(set(diffusiondb.sample(table, ASKED, 4, seed)[0].query("split == 'train'")["prompt"]) != set(larger["prompt"][:3]) for seed in range(1, 4))


def test_what_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="the parts have 10 prompts with 4 images, 1850 are asked for: add parts"):
        diffusiondb.build(folder)
    assert not (folder / "diffusiondb.parquet").exists()
    with pytest.raises(ValueError, match=r"pairs\.parquet is missing: `make data-diffusiondb` makes it"):
        images.diffusiondb(folder)
    (folder / images.PAIRS).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pairs\.parquet is not the table of pairs \(.*\): delete it, `make data-diffusiondb` makes it anew"):
        images.diffusiondb(folder)
    with pytest.raises(ValueError, match=r"images has no part-000001 or part-000001\.zip: put some there, https://huggingface\.co"):
        diffusiondb.build(folder / "elsewhere")
    others = pq.read_table(folder / "metadata.parquet")
    for table in (others.drop(["prompt"]), others.set_column(1, "prompt", pa.array([["text"]] * len(others)))):
        pq.write_table(table, folder / "metadata.parquet")
        with pytest.raises(ValueError, match=r"metadata\.parquet is not DiffusionDB's metadata \(.*fetch it again"):
            diffusiondb.build(folder)
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"metadata\.parquet is not DiffusionDB's metadata \(.*fetch it again"):
        diffusiondb.build(folder)
    (folder / "metadata.parquet").unlink()
    with pytest.raises(ValueError, match=r"metadata\.parquet is missing"):
        diffusiondb.build(folder)
