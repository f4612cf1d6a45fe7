"""Captioned images that no model of the project made: a folder or WebDataset shards, MS-COCO-2014, DiffusionDB.

A loader lists images and opens none: `Captioned.open` does, from a file or from within a tar or zip archive, and `pixels` makes tensors.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mitune.prompts import decode, ranked

CAPTIONS = Path("annotations") / "captions_val2014.json"  # of MS-COCO-2014
PAIRS = Path("pairs.parquet")  # of DiffusionDB
ENDINGS = ("jpg", "jpeg", "png", "webp")
SOURCES = {
    "coco2014": "http://images.cocodataset.org: annotations/annotations_trainval2014.zip, unpacked, and zips/val2014.zip, unpacked or not",
    "diffusiondb": "https://huggingface.co/datasets/poloclub/diffusiondb: metadata.parquet, and files of images/, unpacked or not",
    "real": "a folder of images, each with its caption beside it (.txt, or .json with `caption`), or of WebDataset tar shards, as img2dataset writes both",
}
"""Where each data set comes from, and what of it must lie in its folder."""


@dataclass(frozen=True)
class Captioned:
    """An image and its caption. `place` is its file, or the archive that has it as `member`, in a tar at `span` (offset and length in bytes)."""

    caption: str
    place: Path
    member: str | None = None
    span: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.place}/{self.member}" if self.member else str(self.place)

    def open(self) -> Image.Image:
        """The picture in RGB, transparent parts white. Raises ValueError naming the file for bytes that are no whole image."""
        try:
            with Image.open(io.BytesIO(self._read())) as image:
                image.load()
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return image.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, KeyError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.name} is not an image ({_line(error)}): remove it, or fetch it again") from None

    def _read(self) -> bytes:
        if self.span:
            with self.place.open("rb") as file:
                file.seek(self.span[0])
                return file.read(self.span[1])
        return _zip(self.place).read(self.member) if self.member else self.place.read_bytes()


def pixels(items: Sequence[Captioned], size: int) -> torch.Tensor:
    """Images (N, 3, size, size) in [-1, 1]: the shorter side brought to `size` (Lanczos), the middle cut out."""
    found = []
    for item in items:
        image = item.open()
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        left, top = ((side - size) // 2 for side in image.size)
        found.append(torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


def draw(items: Sequence[Captioned], n: int, seed: int) -> list[Captioned]:
    """`n` of the images, the first in the order of `mitune.prompts.ranked` of their names. Raises ValueError where there are fewer."""
    if n > len(items):
        raise ValueError(f"{items[0].place.parent if items else 'the source'} has {len(items)} captioned images, {n} were asked for: ask for fewer or add some")
    home = os.path.commonpath([item.place.parent for item in items]) if items else ""
    by_name = {f"{item.place.relative_to(home).as_posix()} {item.member}": item for item in items}
    return [by_name[name] for name in ranked(by_name, seed)[:n]]


# ---------------------------------------------------------------- a folder, or WebDataset shards (CC12M as img2dataset writes it)


def captioned(source: Path) -> list[Captioned]:
    """The images of a folder, at any depth, or of its tar shards, or of one shard, in the order of their names; of a folder of a data set, its own.

    A caption lies beside its image under the same name, as .txt or as `caption` in .json; in a shard the name ends at the first dot (WebDataset's key).
    Raises ValueError for a source that is missing, has no image, or an image without a caption, and for a file that is no tar.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} is missing: give {SOURCES.get(source.name, SOURCES['real'])}")
    if (source / CAPTIONS).is_file():
        found = coco(source)
    elif (source / PAIRS).is_file():
        found = diffusiondb(source)
    else:
        shards = [source] if source.is_file() else sorted(source.glob("*.tar"))
        found = [item for shard in shards for item in _shard(shard)] if shards else _folder(source)
    if not found:
        raise ValueError(f"{source} has no image: give {SOURCES.get(source.name, SOURCES['real'])}")
    return found


def _folder(folder: Path) -> list[Captioned]:
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return [
        Captioned(_caption(name[: -len(file.suffix)], name, files, Path.read_bytes, folder), file)
        for name, file in files.items()
        if file.suffix.lower()[1:] in ENDINGS
    ]


def _shard(path: Path) -> list[Captioned]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar if member.isfile()}
            stems = {name: name[: len(name) - len(Path(name).name)] + Path(name).name.partition(".")[0] for name in members}
            return [
                Captioned(
                    _caption(stems[name], name, members, lambda member: tar.extractfile(member).read(), path), path, name, (member.offset_data, member.size)
                )
                for name, member in members.items()
                if name.removeprefix(stems[name]).lower()[1:] in ENDINGS
            ]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a tar file ({_line(error)}): fetch it again; a shard is not compressed") from None


def _caption(stem: str, name: str, files: Mapping[str, Any], read: Callable[[Any], bytes], source: Path) -> str:
    """The caption of the image `name` of `source`, among whose `files` it is that of `stem`."""
    text, fields = f"{stem}.txt", f"{stem}.json"
    if text in files:
        return decode(read(files[text]), f"{source}/{text}").strip()
    if fields not in files:
        raise ValueError(f"{source}/{name} has no caption: write it into {text} or, as `caption`, into {fields} beside it")
    try:
        return json.loads(decode(read(files[fields]), f"{source}/{fields}"))["caption"].strip()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{source}/{fields} has no `caption`: write one, or the caption into {text}") from None


# ---------------------------------------------------------------- data sets


def coco(folder: Path, n: int | None = None, seed: int = 0) -> list[Captioned]:
    """MS-COCO-2014's validation images (40 504; Lin et al. 2014), or `n` drawn ones, each with its first caption, the one of the lowest id.

    `folder` has annotations/captions_val2014.json, and the images in val2014 or val2014.zip.
    """
    file, images = Path(folder) / CAPTIONS, _images(Path(folder) / "val2014", "coco2014")
    if not file.is_file():
        raise ValueError(f"{file} is missing: {SOURCES['coco2014']}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in found["images"]}
        first = {note["image_id"]: note["caption"].strip() for note in sorted(found["annotations"], key=lambda note: -note["id"])}
        items = [_in(images, f"val2014/{names[key]}", first[key]) for key in sorted(first)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of COCO captions ({type(error).__name__}: {_line(error)}): fetch it again, {SOURCES['coco2014']}") from None
    return items if n is None else draw(items, n, seed)


def diffusiondb(folder: Path) -> list[Captioned]:
    """The images of the drawn training prompts (`mitune.diffusiondb`), whose parts lie in `images`, unpacked or as zip files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = Path(folder) / PAIRS
    if not pairs.is_file():
        raise ValueError(f"{pairs} is missing: `make data-diffusiondb` makes it")
    try:
        rows = pq.read_table(pairs, columns=["prompt", "image_name", "part_id"]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{pairs} is not the table of pairs ({_line(error)}): delete it, `make data-diffusiondb` makes it anew") from None
    return [_in(_images(Path(folder) / "images" / f"part-{row['part_id']:06d}", "diffusiondb"), row["image_name"], row["prompt"]) for row in rows]


def _images(folder: Path, of: str) -> Path:
    """The folder of images or, where there is none, the zip file of the same name."""
    if folder.is_dir():
        return folder
    archive = folder.with_name(f"{folder.name}.zip")
    if not archive.is_file():
        raise ValueError(f"{folder} is missing, and {archive.name} too: {SOURCES[of]}")
    _zip(archive)
    return archive


def _in(images: Path, member: str, caption: str) -> Captioned:
    """An image of `member`'s name in a zip file, or in the folder that was unpacked from it."""
    return Captioned(caption, images / Path(member).name) if images.is_dir() else Captioned(caption, images, member)


@functools.lru_cache(maxsize=64)
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a zip file ({_line(error)}): fetch it again") from None


def _line(error: BaseException) -> str:
    return re.sub(r"<_io\.BytesIO[^>]*>", "its bytes", " ".join(str(error).split()))
