"""Images of many prompts as files (`python -m mitune.generate PROMPTS FOLDER`), of the base or with adapters: to look at, or for `mitune.fidelity`.

PROMPTS is a file of prompts, or a data set of captioned images (`mitune.images.captioned`: MS-COCO-2014 for one), of which the captions are taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mitune import config
from mitune.artifacts import atomic, read_json, write_json
from mitune.images import captioned
from mitune.memo import digest
from mitune.pixels import eight_bit
from mitune.prompts import READERS, Prompt, distinct, ranked, read_prompts
from mitune.sampling import noise_generator, sample
from mitune.shards import progress
from mitune.stages import open_model, weights
from mitune.threads import side_by_side

SETTINGS = "generate.json"  # in the folder, what its images were made by


def asked(source: Path, column: str, n: int | None, seed: int) -> list[Prompt]:
    """The distinct prompts of a file or data set, or `n` of them, the first in the order of `mitune.prompts.ranked`.

    Raises ValueError where there are fewer, and as `mitune.prompts.read_prompts` and `mitune.images.captioned` do.
    """
    if source.suffix.lower() in READERS or (source.is_file() and source.suffix.lower() != ".tar"):
        items = read_prompts(source, column)
    else:
        items = distinct(Prompt(number, item.caption) for number, item in enumerate(captioned(source)))
    if n is None:
        return items
    if not 1 <= n <= len(items):
        raise ValueError(f"n is {n}: {source} has {len(items)} distinct prompts; ask for 1 to {len(items)}")
    chosen = set(ranked((item.text for item in items), seed)[:n])
    return [item for item in items if item.text in chosen]


def generate(
    params, items: Sequence[Prompt], folder: Path, *, images: int, guidance_scale: float, num_inference_steps: int, adapter: Sequence[Path] = ()
) -> int:
    """Write `images` of each prompt to `folder`, `{prompt_id}-{image}.png` with the prompt beside it (.txt), by the model of the parameters, the adapters
    fused into it in turn. Those that are there are kept; how many are made is returned. Noise is of (seed, prompt, image), as in the pipeline.

    Raises ValueError for a folder whose images were made by other settings, and as `open_model` and `sample` do.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    settings = {"model": params.model, "weights": digest(weights(params), *adapter), "dtype": params.dtype, "seed": params.seed}
    settings |= {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    _check(folder, settings)
    rows = [(item, image) for item in items for image in range(images)]
    missing = [(item, image) for item, image in rows if not _file(folder, item, image).exists()]
    if not missing:
        return 0
    model, size = open_model(params, adapter=tuple(adapter) or None), params.evaluate.batch_size

    def made(start: int) -> tuple[list[tuple[Prompt, int]], torch.Tensor]:
        part = missing[start : start + size]
        samples = sample(
            model, model.encode([item.text for item, _ in part]), model.null, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps,
            generators=[noise_generator(params.seed, item.text, image) for item, image in part], variance=model.variance, batch_size=size,
        )  # fmt: skip
        return part, eight_bit(model.decode(samples.latents))

    with progress(len(rows), "generate", unit="image") as bar, side_by_side(params.device) as each:
        bar.update(len(rows) - len(missing))
        for part, pictures in each(made, range(0, len(missing), size)):
            write_json(settings, folder / SETTINGS)
            for (item, image), picture in zip(part, pictures, strict=True):
                _save(picture, item.text, _file(folder, item, image))
            bar.update(len(part))
    return len(missing)


def _file(folder: Path, item: Prompt, image: int) -> Path:
    return folder / f"{item.prompt_id:06d}-{image}.png"


def _save(picture: torch.Tensor, text: str, file: Path) -> None:
    """The prompt first, then the image (3, H, W), whole."""
    file.with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    with atomic(file) as part:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(part, format="PNG")


def _check(folder: Path, settings: dict) -> None:
    """Raises ValueError for a folder that has other files than this command's of these settings."""
    file = folder / SETTINGS
    if file.exists():
        if read_json(file) != settings:
            raise ValueError(f"{folder} holds images of other settings, those in its {SETTINGS}: give another folder, or delete it")
    elif folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is no empty folder, nor one of this command: give another folder")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mitune.generate", description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a file of prompts (.txt, .csv, .jsonl, .parquet), or a data set of captioned images")
    parser.add_argument("folder", type=Path, help="where the images go; what is there already is kept, so that an interrupted run goes on")
    parser.add_argument("--adapter", type=Path, nargs="+", default=(), metavar="FOLDER", help="fused into the model in turn (default: none, the base)")
    parser.add_argument("--guidance-scale", type=float, help="1 is none (default: the first of evaluate.guidance_scales)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: evaluate.num_inference_steps)")
    parser.add_argument("--images", type=int, default=1, help="of each prompt (default: 1)")
    parser.add_argument("--n", type=int, help="so many of the prompts, drawn by the seed (default: all)")
    parser.add_argument("--column", default="prompt", help="of a table's prompts (default: prompt)")
    given = parser.parse_args(arguments)
    try:
        params = config.load()
        items = asked(given.prompts, given.column, given.n, params.seed)
        scale = params.evaluate.guidance_scales[0] if given.guidance_scale is None else given.guidance_scale
        steps = params.evaluate.num_inference_steps if given.steps is None else given.steps
        chosen = {"images": given.images, "guidance_scale": scale, "num_inference_steps": steps, "adapter": given.adapter}
        made = generate(params, items, given.folder, **chosen)
    except (ValueError, OSError) as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    print(f"{given.folder}: {made} images made, {len(items) * given.images - made} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
