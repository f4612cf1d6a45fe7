"""Alignment against image quality and variety of a study's cells: views of their stored features, their measures with intervals, and choices among them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mitune import quality
from mitune.artifacts import Results, read_table
from mitune.reading import cell_features
from mitune.recipes import recipes
from mitune.statistics import Interval, jackknife

DIMENSIONS = 16  # at most, of the projection for the Frechet distance
MEASURES = {"cmmd": "CMMD", "frechet": "100 x Frechet distance", "vendi": "Vendi score"}  # of the first two less is better, of the last more


@dataclass(frozen=True)
class View:
    """Features (N, d) of images of some prompts, a row an image, and of reference images (P, K, d) of the P prompts, or none; `prompts` (N,) are rows of it.

    `scenes` and `seeds` (N,) are what is resampled. Two views are paired where these three are equal.
    """

    features: np.ndarray
    prompts: np.ndarray
    scenes: np.ndarray
    seeds: np.ndarray
    reference: np.ndarray | None

    def measure(self, name: str, rows: np.ndarray) -> float:
        """One of `MEASURES` of some rows, against the reference images of their prompts. The Frechet distance is taken in the directions in which all
        reference images vary most, as many as the fewest images that `value` ever takes allow."""
        if name == "vendi":
            return quality.vendi(self.features[rows])
        each = self.reference.shape[1]
        own = (np.unique(self.prompts[rows])[:, None] * each + np.arange(each)).ravel()
        if name == "cmmd":
            of_x, of_y, between = self._kernels
            return quality.cmmd_of(of_x[np.ix_(rows, rows)], of_y[np.ix_(own, own)], between[np.ix_(rows, own)])
        projected, projected_reference = self._projected
        return 100 * quality.frechet(projected[rows], projected_reference[own])

    @cached_property
    def _kernels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of `quality.cmmd_of` for all images."""
        x, y = quality.unit(self.features), quality.unit(self._whole)
        return quality.gaussian(x, x, quality.SIGMA), quality.gaussian(y, y, quality.SIGMA), quality.gaussian(x, y, quality.SIGMA)

    @cached_property
    def _projected(self) -> tuple[np.ndarray, np.ndarray]:
        directions = quality.principal(self._whole, self.dimensions)
        return self.features @ directions, self._whole @ directions

    @property
    def _whole(self) -> np.ndarray:
        """All reference images, (P K, d)."""
        return self.reference.reshape(-1, self.reference.shape[-1])

    @property
    def dimensions(self) -> int:
        """Of the projection: 0 where the images are too few for any."""
        fewest = min((self.seeds == seed).sum() for seed in np.unique(self.seeds))
        return min(DIMENSIONS, int(0.9 * fewest) // quality.IMAGES_A_DIMENSION, self.reference.shape[-1])

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of `MEASURES` that so many images allow: without a reference there is no distance."""
        if self.reference is None:
            return ("vendi",)
        return tuple(name for name in MEASURES if name != "frechet" or self.dimensions)


def view(params, study: str, key: str, scale: float, *, split: str = "test", of: str = "images") -> View:
    """Of a cell at a guidance scale: its images, with `of="base"` the base's of the same prompts and noise, with `of="decoded"` other images like those of
    the reference through the autoencoder, the nearest to it that the model could come."""
    table, found = read_table(Results(params.model).cell(study, key) / "images.parquet", "cell"), cell_features(params, study, key)
    at = np.flatnonzero((table["guidance_scale"] == scale) & (table["split"] == split))
    rows = table.iloc[at]
    order = {pair: n for n, pair in enumerate(dict.fromkeys(zip(rows["category"], rows["prompt_id"], strict=True)))}
    categories = recipes(params, study)[key].categories
    counts = rows.groupby("category", sort=False)["prompt_id"].nunique()
    of_category = {category: found.get(f"reference/{category}/{split}") for category in categories}
    there = all(part is not None for part in of_category.values())
    reference = np.concatenate([part.reshape(counts[category], -1, part.shape[1]) for category, part in of_category.items()]) if there else None
    prompts = np.array([order[pair] for pair in zip(rows["category"], rows["prompt_id"], strict=True)])
    scenes, seeds = (rows["category"] + " " + rows["scene"]).to_numpy(), rows["seed"].to_numpy()
    if of != "decoded":
        return View(found[of][at], prompts, scenes, seeds, reference)
    first = seeds == seeds[0]
    return View(np.concatenate([found[f"decoded/{category}/{split}"] for category in categories]), prompts[first], scenes[first], seeds[first], reference)


def value(seen: View, name: str) -> Interval:
    """A measure, the mean of the seeds; its interval resamples scenes and adds the spread of the seeds."""
    return jackknife(lambda rows: seen.measure(name, rows), seen.scenes, seen.seeds)


def point(seen: View, name: str) -> float:
    """A measure, the mean of the seeds, without its interval: of however few images."""
    return float(np.mean([seen.measure(name, np.flatnonzero(seen.seeds == seed)) for seed in np.unique(seen.seeds)]))


def difference(a: View, b: View, name: str, *, times: float = 1.0) -> Interval:
    """A measure of `a` minus `times` that of `b`, paired by scene and seed. With `times` = 1.1 its sign tells whether `a` lies more than a tenth above `b`,
    also where `b` is so near 0 that their ratio means nothing."""
    return _paired(a, b, lambda rows: a.measure(name, rows) - times * b.measure(name, rows))


def _paired(a: View, b: View, statistic: Callable[[np.ndarray], float]) -> Interval:
    for of_a, of_b in ((a.prompts, b.prompts), (a.scenes, b.scenes), (a.seeds, b.seeds)):
        if not np.array_equal(of_a, of_b):
            raise ValueError("two views that are compared must be of the same prompts and seeds; give the cells the same test_prompts and seeds")
    return jackknife(statistic, a.scenes, a.seeds)


# ---------------------------------------------------------------- choices


def front(points: Mapping[Hashable, tuple[float, float]]) -> list:
    """The keys of {key: (distance, alignment)} than which none is at least as good in both, less and more being better, and better in one; by distance."""
    kept = [key for key, (x, y) in points.items() if not any((a <= x and b >= y) and (a < x or b > y) for a, b in points.values())]
    return sorted(kept, key=lambda key: points[key])


def sweet_spot(points: Mapping[Hashable, tuple[float, float]], limit: float):
    """The key of {key: (distance, alignment)} with the highest alignment among those whose distance is at most `limit`; without any, the nearest."""
    allowed = [key for key, (distance, _) in points.items() if distance <= limit]
    return max(allowed, key=lambda key: points[key][1]) if allowed else min(points, key=lambda key: points[key][0])
