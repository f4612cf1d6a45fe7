"""Oracle: files in T2I-CompBench's format and with its quirks, and a user's own lists, whose rows the test knows."""

import hashlib

import pytest

from mitune import config, repro
from mitune.benchmarks import Benchmark
from mitune.prompts import Prompt

SPLITS = {"train": "train", "test": "val"}


def test_a_run_without_its_prompts_stops_before_its_first_stage(tmp_path, monkeypatch):
    text = (config.root() / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("prompts: data/shapes/prompts", "prompts: data/t2i-compbench"), encoding="utf-8")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"data/t2i-compbench is missing: `make data-t2i-compbench` makes it"):
        repro.repro([])


@pytest.fixture
def compbench(tmp_path):
    """Small files as the benchmark has them: CRLF, no last newline, duplicates, letters that are not ASCII, a licence beside them."""
    train = [f"a green bench and a blue bowl {n % 20}" for n in range(22)] + ["a café table", "a piñata"]
    (tmp_path / "color_train.txt").write_bytes("\r\n".join(train).encode())
    (tmp_path / "color_val.txt").write_bytes(b"a red car\r\na blue bird\r\n")
    (tmp_path / "LICENSE.txt").write_text("MIT License\n")
    return tmp_path


def test_compbench_splits_keep_their_lines(compbench):
    found = Benchmark(compbench, splits=SPLITS).prompts("color")
    assert list(found) == ["train", "test"]
    assert [item.prompt_id for item in found["train"]] == [*range(20), 22, 23]
    assert found["train"][-2:] == [Prompt(22, "a café table"), Prompt(23, "a piñata")]
    assert found["test"] == [Prompt(0, "a red car"), Prompt(1, "a blue bird")]


def test_a_file_without_a_split_beside_files_with_one_is_passed_over(compbench):
    """As the benchmark's own folder has them: `color.txt` is train and test together."""
    (compbench / "color.txt").write_text("a red car\nanother\n")
    benchmark = Benchmark(compbench, splits=SPLITS)
    assert benchmark.categories() == ["color"]
    assert "another" not in {item.text for items in benchmark.prompts("color").values() for item in items}


def test_the_held_out_are_the_first_by_hash(compbench):
    whole = Benchmark(compbench, splits=SPLITS).load("color", "train")
    first = sorted(whole, key=lambda item: hashlib.sha256(f"3 {item.text}".encode()).hexdigest())[:6]
    some = Benchmark(compbench, splits=SPLITS, holdout={"val": 6}, seed=3)
    val, train = some.load("color", "val"), some.load("color", "train")
    assert set(val) == set(first)
    assert val == [item for item in whole if item in first] and train == [item for item in whole if item not in first]
    assert some.load("color", "test") == Benchmark(compbench, splits=SPLITS).load("color", "test")
    assert set(Benchmark(compbench, splits=SPLITS, holdout={"val": 4}, seed=3).load("color", "val")) < set(val)
    assert set(Benchmark(compbench, splits=SPLITS, holdout={"val": 6}, seed=4).load("color", "val")) != set(val)


def test_the_order_of_a_file_does_not_change_what_is_held_out(compbench):
    held_out = Benchmark(compbench, splits=SPLITS, holdout={"val": 6})
    before = {item.text for item in held_out.load("color", "val")}
    lines = (compbench / "color_train.txt").read_bytes().split(b"\r\n")
    (compbench / "color_train.txt").write_bytes(b"\r\n".join(lines[::-1]))
    assert {item.text for item in held_out.load("color", "val")} == before


def test_splits_and_counts(tmp_path):
    (tmp_path / "color_train.txt").write_text("a\nb\na\nc\n")
    (tmp_path / "non_spatial_test.txt").write_text("a\n")
    benchmark = Benchmark(tmp_path)
    assert [prompt.text for prompt in benchmark.load("color", "train", 2)] == ["a", "b"]
    assert len(benchmark.load("color", "train")) == 3
    assert benchmark.categories() == ["color", "non_spatial"]
    with pytest.raises(ValueError, match="has 3 distinct prompts of color train, 4 were asked for"):
        benchmark.load("color", "train", 4)
    with pytest.raises(ValueError, match=r"category 'colour', split 'train', .* it has color, non_spatial"):
        benchmark.load("colour", "train")
    with pytest.raises(ValueError, match=r"split 'dev', .* category 'color' has train \(3\)"):
        benchmark.load("color", "dev")


def test_one_file_is_a_benchmark_whose_category_is_its_name(tmp_path):
    (tmp_path / "animals.txt").write_text("\n".join(f"animal {n}" for n in range(10)))
    found = Benchmark(tmp_path / "animals.txt", holdout={"val": 2, "test": 3}).prompts("animals")
    assert {split: len(items) for split, items in found.items()} == {"train": 5, "val": 2, "test": 3}
    assert sorted(item.prompt_id for items in found.values() for item in items) == list(range(10))
    with pytest.raises(ValueError, match="it has animals"):
        Benchmark(tmp_path / "animals.txt").load("color", "train")


def test_columns_take_the_place_of_the_name(tmp_path):
    (tmp_path / "mine.csv").write_text("caption,category,split\na,cats,train\nb,dogs,validation\nc,cats,validation\na,cats,train\nd,,\n")
    benchmark = Benchmark(tmp_path / "mine.csv", column="caption", splits={"train": "train", "val": "validation"})
    assert benchmark.categories() == ["cats", "dogs", "mine"]
    assert benchmark.prompts("cats") == {"train": [Prompt(0, "a")], "val": [Prompt(2, "c")]}
    assert benchmark.prompts("dogs") == {"val": [Prompt(1, "b")]}
    assert benchmark.load("mine", "train") == [Prompt(4, "d")]
    with pytest.raises(ValueError, match=r"mine\.csv, prompt \d: split is 'validation': it must be one of train, val, test, comp, or `splits` must name it"):
        Benchmark(tmp_path / "mine.csv", column="caption").load("cats", "train")


def test_what_does_not_fit_is_named(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,id\na,1\nb,1\n")
    with pytest.raises(ValueError, match="id 1 stands for two prompts of mine train: 'a', 'b'"):
        Benchmark(tmp_path / "mine.csv").load("mine", "train")
    (tmp_path / "x_train.txt").write_text("a\nb\n")
    (tmp_path / "x_val.txt").write_text("c\n")
    with pytest.raises(ValueError, match=r"holdout\.val is 1: .* has a split val of x already"):
        Benchmark(tmp_path, holdout={"val": 1}).load("x", "train")
    with pytest.raises(ValueError, match=r"holdout asks for 2 prompts of x, and .* has 2 in train: lower it"):
        Benchmark(tmp_path, holdout={"test": 2}).load("x", "train")
    with pytest.raises(ValueError, match=r"t2i-compbench is missing: `make data-t2i-compbench` makes it"):
        Benchmark(tmp_path / "t2i-compbench").load("color", "train")
    with pytest.raises(ValueError, match=r"none\.csv is missing: a benchmark is a file or a folder of prompts"):
        Benchmark(tmp_path / "none.csv").load("color", "train")


@pytest.mark.skipif(not (config.root() / "data" / "t2i-compbench").is_dir(), reason="`make data-t2i-compbench` has not been run")
def test_the_real_compbench_has_its_distinct_prompts_at_their_lines():
    """Oracle: the lines themselves; of three categories some stand twice."""
    folder, train = config.root() / "data" / "t2i-compbench", {"color": 679, "shape": 685, "texture": 695}
    for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        found = Benchmark(folder, splits=SPLITS).prompts(category)
        assert {split: len(items) for split, items in found.items()} == {"train": train.get(category, 700), "test": 300}
        for split, items in found.items():
            lines = (folder / f"{category}_{SPLITS[split]}.txt").read_bytes().decode("utf-8").split("\n")
            assert all(item.text == lines[item.prompt_id].strip() != "" for item in items)
