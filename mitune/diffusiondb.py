"""DiffusionDB's prompts (Wang et al. 2022) as a benchmark: a seeded sample of its metadata, with the images of the training prompts (Table 5, Appendix H.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mitune.artifacts import atomic
from mitune.images import PAIRS, SOURCES
from mitune.prompts import ranked

COLUMNS = pa.schema({"image_name": pa.string(), "prompt": pa.string(), "part_id": pa.int64(), "image_nsfw": pa.float64()})
BLURRED = 2.0  # image_nsfw of an image that Stable Diffusion's filter had blurred
PROMPTS = {"train": 1250, "val": 100, "test": 500}  # the paper's, and as many to tune on
IMAGES = 4  # a training prompt; the paper's 5 000 pairs


def build(folder: Path, prompts: Mapping[str, int] = PROMPTS, images: int = IMAGES, seed: int = 0) -> pd.DataFrame:
    """Write `diffusiondb.parquet`, the drawn prompts (id, prompt, split), which are returned, and `pairs.parquet`, the images of those of train.

    `folder` has the data set's metadata.parquet and parts of its images. Raises ValueError where it has none, or too few prompts.
    """
    folder = Path(folder)
    parts = sorted({int(part.stem.removeprefix("part-")) for part in (folder / "images").glob("part-*") if part.stem.removeprefix("part-").isdecimal()})
    if not parts:
        raise ValueError(f"{folder / 'images'} has no part-000001 or part-000001.zip: put some there, {SOURCES['diffusiondb']}")
    drawn, pairs = sample(metadata(folder / "metadata.parquet", parts), prompts, images, seed)
    for table, name in ((pairs, PAIRS), (drawn, "diffusiondb.parquet")):  # whoever finds the prompts has their images
        with atomic(folder / name) as part:
            pq.write_table(pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None), part)
    return drawn


def metadata(path: Path, parts: list[int]) -> pd.DataFrame:
    """The rows of these parts (image_name, prompt, part_id), `id` their number among all rows, without blurred images and empty prompts."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {SOURCES['diffusiondb']}")
    try:
        table = pq.read_table(path, columns=COLUMNS.names).cast(COLUMNS).to_pandas()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} is not DiffusionDB's metadata ({' '.join(str(error).split())}): fetch it again, {SOURCES['diffusiondb']}") from None
    table = table.assign(id=range(len(table)), prompt=table["prompt"].str.strip())
    return table[table["part_id"].isin(parts) & (table["image_nsfw"] < BLURRED) & (table["prompt"] != "")].drop(columns="image_nsfw")


def sample(table: pd.DataFrame, prompts: Mapping[str, int], images: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """So many prompts a split (id, prompt, split), disjoint, of those with at least `images` images, and these images of those of train (prompt, image_name,
    part_id); both the first in the order of `mitune.prompts.ranked`."""
    counts = table["prompt"].value_counts()
    left = ranked(counts[counts >= images].index, seed)
    if len(left) < sum(prompts.values()):
        raise ValueError(
            f"the parts have {len(left)} prompts with {images} images, {sum(prompts.values())} are asked for: add parts to images/, each has 1 000 images"
        )
    found = {}
    for split, n in prompts.items():
        found |= dict.fromkeys(left[:n], split)
        left = left[n:]
    rows = table[table["prompt"].isin(found)]
    first = rows.drop_duplicates("prompt")
    drawn = pd.DataFrame({"id": first["id"], "prompt": first["prompt"], "split": first["prompt"].map(found)}).reset_index(drop=True)
    names = {name: rank for rank, name in enumerate(ranked(rows["image_name"], seed))}
    kept = rows[rows["prompt"].map(found) == "train"].sort_values("image_name", key=lambda column: column.map(names)).groupby("prompt").head(images)
    return drawn, kept.sort_values(["prompt", "image_name"])[["prompt", "image_name", "part_id"]].reset_index(drop=True)
