"""Pretraining of the embedded model: autoencoder, text encoder, denoiser, judge and similarity model, from rendered scenes.

Run as `python -m mitune.pretraining` (`make pretrain`). Each part resumes from its last checkpoint in `scratch`, logs to
`scratch/log.jsonl`, and is skipped once finished; the diffusers pipeline folder, the judges, the prompt files, the learning curve and
the denoisers of `caption_noise` are written to `folder`.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from mitune import captions as grammar
from mitune.alignment import ShapesJudge
from mitune.artifacts import read_table, write_table
from mitune.benchmarks import Benchmark
from mitune.config import Estimator, root
from mitune.config import load as load_params
from mitune.corpus import CaptionNoise, clean_scenes, misquoted, web_latents, write_prompts
from mitune.information import query, renoised_terms, renoised_timesteps
from mitune.memo import digest
from mitune.models import load
from mitune.networks import build_scheduler, build_tokenizer, build_unet, build_vae
from mitune.parts import encode_texts, reconstruct, train_judge, train_similarity, train_text_encoder, train_unet, train_vae, whiten
from mitune.pipelines import LatentDiffusion
from mitune.prompts import Prompt
from mitune.sampling import noise_generator, noises, sample
from mitune.schema import Share, build
from mitune.stages.base import knows
from mitune.stages.judging import image_rows, scene

JUDGE_SHARES = {"color": 0.1, "shape": 0.05, "texture": 0.1, "spatial": 0.1, "non_spatial": 0.35, "complex": 0.25, "single": 0.05}
"""Of the judge's own scenes: more of those in which one object lies on another, the hardest to read; and what is not said is drawn evenly."""


@dataclass(frozen=True)
class Probe:
    """Of the learning curve, for each snapshot and category; images in one call of the network."""

    cases: int  # rendered scenes, true against wrong caption
    prompts: int  # validation prompts whose candidates are ranked
    images: int  # candidates a prompt
    timesteps: int  # of the re-noised terms, of cases and candidates
    t_min: int  # in the cases only timesteps above it count
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    estimators: dict[str, Estimator]  # the columns of MI


@dataclass(frozen=True)
class Cycle:
    """One cycle of the denoiser's training: optimizer steps, and the categories' shares of its captions."""

    steps: int
    shares: dict[str, float]


@dataclass(frozen=True)
class NoisyCaptions:
    """Small denoisers of the model's own autoencoder and text encoder, trained alike but for how many of their captions are wrong."""

    width: int  # channels of the UNet's inner level
    true_steps: int  # with true captions, common to all
    steps: int  # from there on, of each with its own
    batch_size: int  # images a step
    scenes: int  # rendered scenes, common to all
    shares: dict[str, float]  # of the captions
    wrong: dict[str, Share]  # by the name of the denoiser: share of its captions of two objects that are wrong


@dataclass(frozen=True)
class Pretraining:
    """Sizes of every part (steps are optimizer steps); `shares` are the categories' shares of the captions.

    Autoencoder, judge and denoiser are trained in cycles: each from the averaged weights of the one before, with warm-up and linear decay
    anew; those of judge and denoiser on scenes of their own.
    """

    seed: int
    device: str
    prediction_type: str
    noise: CaptionNoise
    shares: dict[str, float]
    clean_scenes: int  # rendered scenes with true captions: autoencoder, text encoder, judge, similarity model
    web_scenes: int  # rendered scenes with web captions: the denoiser
    unet_width: int
    vae_cycles: tuple[int, ...]
    text_steps: int
    judge_cycles: tuple[int, ...]
    similarity_steps: int
    unet_cycles: tuple[Cycle, ...]
    snapshots: int  # of each cycle of the denoiser
    probe: Probe
    caption_noise: NoisyCaptions


def pretrain(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Train every part that is not finished yet and write the model to `folder`."""
    from diffusers import StableDiffusionPipeline

    scratch.mkdir(parents=True, exist_ok=True)
    if config.device == "cpu" and not (scratch / "log.jsonl").exists():
        tqdm.write("pretraining on the CPU takes hours (data/shapes/log.jsonl has each part's seconds); an interruption costs at most 200 steps")
    options = {"scratch": scratch, "device": config.device}
    write_prompts(folder / "prompts", seed=config.seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    images, captions, _ = clean_scenes(config.clean_scenes, config.shares, seed=config.seed)
    torch.manual_seed(config.seed)
    vae = build_vae().to(config.device)
    for n, steps in enumerate(config.vae_cycles):
        train_vae(vae, images, name=f"vae_{n + 1}", steps=steps, seed=config.seed + n, **options)
    whiten(vae, images[:2048])
    torch.manual_seed(config.seed + 1)
    text_encoder = train_text_encoder(images, captions, tokenizer, steps=config.text_steps, **options)
    similarity = train_similarity(images, captions, tokenizer, steps=config.similarity_steps, seed=config.seed + 3, **options)
    similarity.half().save_pretrained(folder / "similarity")
    tokenizer.save_pretrained(folder / "similarity")
    torch.manual_seed(config.seed + 2)
    judge = ShapesJudge().to(config.device)
    for n, steps in enumerate(config.judge_cycles):
        images, _, drawn = clean_scenes(config.clean_scenes, JUDGE_SHARES, seed=config.seed + 2 + 10 * n, plain=0.0)
        images[::2] = reconstruct(vae, images[::2])  # what it is to judge is decoded
        train_judge(judge, images, drawn, name=f"judge_{n + 1}", steps=steps, seed=config.seed + 2 + n, **options)
    judge.save(folder / "judge")
    del images, captions, drawn
    torch.manual_seed(config.seed)
    unet, scheduler = build_unet(config.unet_width).to(config.device), build_scheduler(config.prediction_type)
    for n, cycle in enumerate(config.unet_cycles):
        latents, texts = web_latents(config.web_scenes, cycle.shares, config.noise, vae, seed=config.seed + 1 + 10 * n)
        hidden_states, rows = _conditioned(texts, text_encoder, tokenizer, config.device)
        train_unet(
            unet, scheduler, latents, hidden_states, rows,
            name=f"unet_{n + 1}", steps=cycle.steps, seed=config.seed + n, snapshots=config.snapshots, **options,
        )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    shutil.rmtree(folder / "tokenizer")
    shutil.copy(scratch / "log.jsonl", folder / "log.jsonl")
    learning_curve(config, folder=folder, scratch=scratch)
    caption_noise(config, folder=folder, scratch=scratch)


def caption_noise(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Write the denoisers of `config.caption_noise` to `folder/caption_noise/{name}`, beside the log of their training, for the pipeline in `folder`.

    They have their first steps, with true captions, in common, and from there on see the same images in the same order with the same noise: only the
    captions differ.
    """
    settings, scratch, home = config.caption_noise, scratch / "caption_noise", folder / "caption_noise"
    scratch.mkdir(parents=True, exist_ok=True)
    pipeline = load(folder / "pipeline", device=config.device).pipeline
    latents, true = web_latents(settings.scenes, settings.shares, CaptionNoise(neglect=0.0, wrong=0.0), pipeline.vae, seed=config.seed)

    def train(unet, name: str, wrong: float, steps: int, seed: int) -> None:
        states, rows = _conditioned(misquoted(true, wrong, seed=config.seed), pipeline.text_encoder, pipeline.tokenizer, config.device)
        options = {"name": name, "steps": steps, "seed": seed, "batch_size": settings.batch_size, "scratch": scratch, "device": config.device}
        train_unet(unet, pipeline.scheduler, latents, states, rows, snapshots=0, **options)

    torch.manual_seed(config.seed)
    start = build_unet(settings.width).to(config.device)
    train(start, "true", 0.0, settings.true_steps, config.seed)
    for name, wrong in settings.wrong.items():
        unet = copy.deepcopy(start)
        train(unet, f"then_{name}", wrong, settings.steps, config.seed + 1)
        unet.half().save_pretrained(home / name)
    shutil.copy(scratch / "log.jsonl", home / "log.jsonl")


def _conditioned(texts: list[str], text_encoder, tokenizer, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a denoiser learns from is told: hidden states of the different texts, the empty one first, and each text's row of them."""
    row = {text: i for i, text in enumerate(sorted({*texts, ""}))}
    return encode_texts(text_encoder, tokenizer, list(row), device=device), torch.tensor([row[text] for text in texts])


def learning_curve(config: Pretraining, *, folder: Path, scratch: Path) -> dict[str, pd.DataFrame]:
    """Write what each snapshot of the denoiser knows and ranks: `snapshots.parquet`, a row a case, and `ranking.parquet`, a row a candidate; return both.

    Snapshots are `scratch/unet_{cycle}-{step of it}.pt`; `step` counts through all cycles. A finished one lies in `scratch/curve`, and is
    asked again only if its weights, the probe, the prompts, the judge or another part of the pipeline have changed.
    """
    judge, model = ShapesJudge.load(folder / "judge", device=config.device), load(folder / "pipeline", device=config.device)
    others = digest(config.probe, config.seed, *(folder / part for part in ("prompts", "judge", "pipeline/vae", "pipeline/text_encoder")))
    starts = [sum(cycle.steps for cycle in config.unet_cycles[:n]) for n in range(len(config.unet_cycles))]
    files = {start + int(file.stem.split("-")[1]): file for n, start in enumerate(starts) for file in sorted(scratch.glob(f"unet_{n + 1}-*.pt"))}
    found: dict[str, list[pd.DataFrame]] = {"snapshots": [], "ranking": []}
    for step, file in tqdm(files.items(), desc="learning curve"):
        home = scratch / "curve" / f"{step:06d}-{digest(file, others)}"
        if not all((home / f"{name}.parquet").exists() for name in found):
            weights = torch.load(file, map_location=config.device, weights_only=True)
            model.network.load_state_dict({name.removeprefix("unet."): value.float() for name, value in weights.items()})
            for name, table in _examined(model, judge, folder / "prompts", config.probe, config.seed).items():
                write_table(table.assign(step=step), home / f"{name}.parquet", name)
        for name, tables in found.items():
            tables.append(read_table(home / f"{name}.parquet", name))
    curve = {name: pd.concat(tables, ignore_index=True) for name, tables in found.items()}
    for name, table in curve.items():
        write_table(table, folder / f"{name}.parquet", name)
    return curve


def _examined(model: LatentDiffusion, judge: ShapesJudge, folder: Path, probe: Probe, seed: int) -> dict[str, pd.DataFrame]:
    """The tables of one state of the model, over all categories: `snapshots` and `ranking` but for their `step`."""
    cases, candidates = [], []
    for category in grammar.CATEGORIES:
        items = Benchmark(folder).load(category, "val")
        cases.append(knows(model, category, [item.text for item in items], probe, seed=seed).rename(columns={"correct": "knows"}))
        candidates.append(_candidates(model, judge, items[: probe.prompts], probe, seed).assign(category=category))
    known = pd.concat(cases, ignore_index=True)
    known = known.assign(scene=known["prompt"].map(scene))[["category", "case", "prompt", "scene", "knows"]]
    return {"snapshots": known, "ranking": pd.concat(candidates, ignore_index=True)}


def _candidates(model: LatentDiffusion, judge: ShapesJudge, items: list[Prompt], probe: Probe, seed: int) -> pd.DataFrame:
    """A row a candidate of each prompt: the judge's score and each estimator's MI in nats; re-noising noise is common to a prompt's candidates."""
    rows = image_rows(items, probe.images)
    texts, own = list(rows["prompt"]), torch.arange(len(items)).repeat_interleave(probe.images)
    said, at = model.encode(texts), renoised_timesteps(len(model.alphas_cumprod), probe.timesteps)
    samples = sample(
        model, said, model.null, guidance_scale=probe.guidance_scale, num_inference_steps=probe.num_inference_steps,
        generators=[noise_generator(seed, text, image) for text, image in zip(texts, rows["image"], strict=True)], terms=True, batch_size=probe.batch_size,
    )  # fmt: skip
    noise = noises([(item.text, 0) for item in items], len(at), model.latent_shape, seed=seed, stream="renoise")[own]
    renoised = renoised_terms(model, samples.latents, said, model.null, timesteps=at, noise=noise, batch_size=probe.batch_size)
    terms = {f"renoised_{form}": values for form, values in renoised.items()} | {"renoised_timesteps": at}
    terms |= {name: getattr(samples, name) for name in ("orthogonal", "path", "timesteps")}
    mi = {name: query(estimator, terms, model.alphas_cumprod).value.numpy() for name, estimator in probe.estimators.items()}
    return rows.assign(judge=judge.score(model.decode(samples.latents), texts).double().numpy(), **mi)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded model by the `pretrain` part of params.yaml; resumes where it stopped.")
    parser.add_argument("--to", type=Path, default=root() / "data" / "shapes", help="folder of the finished model (default: data/shapes)")
    parser.add_argument("--scratch", type=Path, default=root() / ".scratch" / "pretrain", help="checkpoints and log (default: .scratch/pretrain)")
    parser.add_argument("--only", choices=("caption_noise",), help="train this part alone, for the finished model in the folder")
    arguments = parser.parse_args()
    config = build(Pretraining, load_params().pretrain, "pretrain")
    make = caption_noise if arguments.only else pretrain
    make(config, folder=arguments.to, scratch=arguments.scratch)


if __name__ == "__main__":
    main()
