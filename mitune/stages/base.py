"""Stage `base`: what the base model knows, and how far its autoencoder and its judges can be trusted, of rendered scenes: of the embedded model alone."""

from __future__ import annotations

import math

import pandas as pd
import torch

from mitune import captions as grammar
from mitune import scenes
from mitune.artifacts import Results, no_rows, write_json, write_table
from mitune.config import embedded
from mitune.corpus import clean_scenes, judge_labels
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.shards import progress
from mitune.stages import open_model, read_prompts
from mitune.stages.judging import open_judges

FAR = 4.0  # px; below it a direction is not clear. Captions state one only of objects that do not touch


def build(params) -> tuple[pd.DataFrame, dict]:
    """Write `base/knows.parquet`, the cases in which the true caption was held against a wrong one, and `base/checks.json`; return both: without a row
    and an entry where nothing can be rendered."""
    results = Results(params.model)
    table, examined = _examined(params) if embedded(params) else (no_rows("knows"), {})
    write_table(table, results.base("knows.parquet"), "knows")
    write_json(examined, results.base("checks.json"))
    return table, examined


def _examined(params) -> tuple[pd.DataFrame, dict]:
    model, (judge, similarity), cases = open_model(params), open_judges(params), []
    with progress(len(params.categories), "knows", unit="category") as bar:
        for category in params.categories:
            texts = [item.text for item in read_prompts(params, category, "test")]
            cases.append(knows(model, category, texts, params.base, seed=params.seed))
            bar.update(1)
    return pd.concat(cases, ignore_index=True), checks(model, judge, similarity, params.base, seed=params.seed)


def knows(model, category: str, texts: list[str], config, *, seed: int) -> pd.DataFrame:
    """Cases, the texts in turn, in which a rendered scene's true caption meets one with an error: the margin is the difference of their standard MI, in nats.

    margin = mean_t kappa_t (||noise - eps_wrong||^2 - ||noise - eps_true||^2): the unconditional term is common to both and cancels.
    The error is a swap of attributes, a turned relation or an exchanged object, drawn among those that the caption admits.
    """
    generator = torch.Generator().manual_seed(seed)
    true = [grammar.parse(texts[i % len(texts)]) for i in range(config.cases)]
    drawn = (grammar.mistake(caption, generator, kinds=("swap", "layout", "object")) for caption in true)
    rows = [(kind, str(wrong)) for kind, wrong in drawn]
    latents = model.encode_images(scenes.render(scenes.sample_scenes(true, generator), generator))
    timesteps = renoised_timesteps(len(model.alphas_cumprod), config.timesteps)
    noise = torch.randn((len(true), len(timesteps), *model.latent_shape), generator=generator)
    said, wrong = model.encode([str(caption) for caption in true]), model.encode([text for _, text in rows])
    terms = renoised_terms(model, latents, said, wrong, timesteps=timesteps, noise=noise, batch_size=config.batch_size)["standard"]
    margin = estimate(terms, timesteps, model.alphas_cumprod, form="standard", t_min=config.t_min).value.numpy()
    frame = pd.DataFrame(rows, columns=["kind", "wrong"])
    return frame.assign(category=category, case=range(len(true)), prompt=[str(caption) for caption in true], margin=margin, correct=margin > 0)


@torch.inference_mode()
def checks(model, judge, similarity, config, *, seed: int) -> dict[str, dict[str, float]]:
    """On held-out rendered scenes: the autoencoder's PSNR in dB, and the judge's and the similarity model's accuracy, as rendered and as decoded.

    PSNR = 10 log10(4 / MSE) for images in [-1, 1], the mean over images.
    """
    images, captions, drawn = clean_scenes(config.scenes, dict.fromkeys((*grammar.CATEGORIES, "single"), 1.0), seed=seed + 1_000_003, plain=0.0)
    decoded = model.decode(model.encode_images(images[: config.decoded_scenes]))
    mse = (decoded - images[: config.decoded_scenes]).square().mean((1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    wrong = [str(grammar.corrupt(caption, generator, kinds=("swap", "layout", "object"))) for caption in captions]
    report = {"autoencoder": {"psnr_db": float((10 * torch.log10(4 / mse)).mean()), "n": len(mse)}}
    for name, pictures in {"rendered": images, "decoded": decoded}.items():
        n, texts = len(pictures), [str(caption) for caption in captions[: len(pictures)]]
        better = similarity.score(pictures, texts) > similarity.score(pictures, wrong[:n])
        report[name] = judge_accuracy(judge, pictures, drawn[:n]) | {"similarity_prefers_true": float(better.float().mean()), "n": n}
    return report


def judge_accuracy(judge, images: torch.Tensor, drawn: scenes.Scenes) -> dict[str, float]:
    """Share of right answers about presence (each shape of the world, and all of an image at once), colour, texture and size (each object),
    direction and contact (each clear pair).

    A direction is clear where the centres lie at least `FAR` px apart, within 30 degrees of an axis: of concentric objects neither is left of the other.
    """
    parts = [judge(part) for part in images.split(512)]
    answers = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    labels, rows = judge_labels(drawn), torch.arange(len(images))
    first, second = drawn.shape[:, 0], drawn.shape[:, 1]
    present = torch.zeros(len(images), len(grammar.SHAPES), dtype=torch.bool)
    right: dict[str, list[torch.Tensor]] = {name: [] for name in ("color", "texture", "size")}
    for i in (0, 1):
        here = drawn.shape[:, i] >= 0
        at = (rows[here], drawn.shape[here, i])
        present[at] = True
        for name, values in right.items():
            values.append(answers[name][at].argmax(-1) == labels[name][here, i])
    seen = (answers["present"][..., 0] > 0) == present
    accuracy = {"presence": float(seen.float().mean()), "presence of all shapes": float(seen.all(1).float().mean())}
    accuracy |= {name: float(torch.cat(values).float().mean()) for name, values in right.items()}
    pairs = second >= 0
    offset = (drawn.centre[:, 0] - drawn.centre[:, 1])[pairs]
    read = (answers["centre"][rows, first] - answers["centre"][rows, second.clamp(min=0)])[pairs]
    clear = (offset.norm(dim=-1) >= FAR) & (offset.abs().amin(-1) < offset.abs().amax(-1) * math.tan(math.pi / 6))
    accuracy["direction"] = float((_direction(read) == _direction(offset))[clear].float().mean())
    known = labels["contact"] >= 0
    contact = judge.contact(answers["feature"][known].to(images.device), first[known], second[known]).argmax(-1).cpu()
    return accuracy | {"contact": float((contact == labels["contact"][known]).float().mean())}


def _direction(offset: torch.Tensor) -> torch.Tensor:
    """0..3 for right, left, below, above: the dominant axis and its sign."""
    axis = offset.abs().argmax(-1)
    return 2 * axis + (offset.gather(1, axis[:, None])[:, 0] < 0)
