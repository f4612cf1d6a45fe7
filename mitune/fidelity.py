"""FID, FD-DINOv2 and CMMD of a folder of images against reference images: `python -m mitune.fidelity IMAGES REFERENCE`.

Either is a folder of images, or what `mitune.images.captioned` reads: MS-COCO-2014, packed or not, WebDataset shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mitune import quality
from mitune.artifacts import read_tensors, write_tensors
from mitune.features import INCEPTION_FILE
from mitune.images import ENDINGS, Captioned, captioned
from mitune.judges import Features
from mitune.memo import shared
from mitune.models import device_of
from mitune.stages import path
from mitune.stages.judging import opened

MEASURES = {"fid": "inception", "fd-dinov2": "dinov2", "cmmd": "clip"}  # and whose features they take


def fidelity(measure: str, images: Path, reference: Path, *, weights: str | None = None, device: str = "cpu") -> float:
    """One of `MEASURES` of images; less is nearer to the reference.

    FID and FD-DINOv2 are `quality.frechet` and CMMD `quality.cmmd`, the published recipes but for CMMD's unbiased estimate. What is needed of the
    reference is computed once for its files, their contents and the weights.

    Raises:
        ValueError: too few images for the measure, a file that is no image, weights that cannot be read, or a device that is not here.
    """
    device_of(device)
    if measure == "fid" and weights is None:
        raise ValueError(f"fid takes the network of its file {INCEPTION_FILE}: give it as --weights (README, Judges of real images)")
    wanted, files, references = Features(kind=MEASURES[measure], weights=weights), _files(images), _files(reference)

    if measure != "cmmd":  # told by one image, not after hours of them
        fewest, needed = min(len(files), len(references)), quality.IMAGES_A_DIMENSION * _features(wanted, files[:1], device).shape[1]
        if fewest < needed:
            raise ValueError(f"{fewest} images are too few for {measure}, which takes {needed}, {quality.IMAGES_A_DIMENSION} a feature: give more, or use cmmd")

    def make(folder: Path) -> None:
        found = _features(wanted, references, device)
        moments = quality.Moments.of(found) if measure != "cmmd" else None
        kept = {"features": found} if moments is None else {"mean": moments.mean, "covariance": moments.covariance, "n": np.array([moments.n])}
        write_tensors({name: torch.from_numpy(values) for name, values in kept.items()}, folder / "reference.safetensors")

    stored = read_tensors(shared("fidelity", measure, wanted, weights and path(weights), references, make=make) / "reference.safetensors")
    known = {name: values.numpy() for name, values in stored.items()}
    ours = _features(wanted, files, device)
    if measure == "cmmd":
        return quality.cmmd(ours, known["features"])
    return quality.frechet_of(quality.Moments.of(ours), quality.Moments(known["mean"], known["covariance"], int(known["n"][0])))


def _files(source: Path) -> list[Captioned]:
    """The images in a folder, by name, without those in folders within it; where there are none, the captioned ones of a data set."""
    return [Captioned("", file) for file in sorted(source.glob("*")) if file.suffix.lower()[1:] in ENDINGS] or captioned(source)


def _features(wanted: Features, files: Sequence[Captioned], device: str) -> np.ndarray:
    """Of images (N, d)."""
    extractor, step = opened(wanted, device), wanted.batch_size
    return torch.cat([extractor.features([_read(file) for file in files[n : n + step]]).cpu() for n in range(0, len(files), step)]).numpy()


def _read(file: Captioned) -> torch.Tensor:
    """An image (3, H, W) in [-1, 1]. Raises ValueError for a file that is none."""
    pixels = np.array(file.open())
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mitune.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--measure", choices=MEASURES, default="cmmd")
    parser.add_argument("--weights", help=f"a folder, a file or a hub id in place of the published ones; fid takes {INCEPTION_FILE}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:<number> or mps")
    given = parser.parse_args(arguments)
    try:
        print(f"{given.measure} {fidelity(given.measure, given.images, given.reference, weights=given.weights, device=given.device):.4f}")
    except ValueError as error:
        sys.exit(f"mitune: {error}")


if __name__ == "__main__":
    main()
