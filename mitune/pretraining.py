"""Pretraining of the embedded model: autoencoder, text encoder, denoiser, judge and similarity model, from rendered scenes.

Run as `python -m mitune.pretraining` (`make pretrain`). Each part resumes from its last checkpoint in `scratch`, logs to
`scratch/log.jsonl`, and is skipped once finished; the diffusers pipeline folder, the judges, the prompt files and the learning curves
are written to `folder`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from mitune import captions as grammar
from mitune import prompts
from mitune.alignment import ShapesJudge
from mitune.artifacts import write_table
from mitune.config import load as load_params
from mitune.config import root
from mitune.corpus import CaptionNoise, clean_scenes, web_latents, write_prompts
from mitune.models import load
from mitune.networks import build_scheduler, build_tokenizer, build_unet, build_vae
from mitune.parts import encode_texts, reconstruct, train_judge, train_similarity, train_text_encoder, train_unet, train_vae, whiten
from mitune.sampling import noise_generator, sample
from mitune.schema import build
from mitune.stages.base import knows

JUDGE_SHARES = {"color": 0.1, "shape": 0.05, "texture": 0.1, "spatial": 0.1, "non_spatial": 0.35, "complex": 0.25, "single": 0.05}
"""Of the judge's own scenes: more of those in which one object lies on another, the hardest to read; and what is not said is drawn evenly."""


@dataclass(frozen=True)
class Probe:
    """Of the learning curve: cases a category, timesteps of the standard MI and those that count, and how the samples are drawn."""

    cases: int
    timesteps: int
    t_min: int
    guidance_scale: float
    num_inference_steps: int
    batch_size: int


@dataclass(frozen=True)
class Cycle:
    """One cycle of the denoiser's training: optimizer steps, and the categories' shares of its captions."""

    steps: int
    shares: dict[str, float]


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
        row = {text: i for i, text in enumerate(sorted({*texts, ""}))}
        hidden_states = encode_texts(text_encoder, tokenizer, list(row), device=config.device)
        rows = torch.tensor([row[text] for text in texts])
        train_unet(
            unet, scheduler, latents, hidden_states, rows, hidden_states[row[""]],
            name=f"unet_{n + 1}", steps=cycle.steps, seed=config.seed + n, snapshots=config.snapshots, **options,
        )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    shutil.rmtree(folder / "tokenizer")
    shutil.copy(scratch / "log.jsonl", folder / "log.jsonl")
    write_table(learning_curve(folder, scratch, config), folder / "snapshots.parquet", "snapshots")


def learning_curve(folder: Path, scratch: Path, config: Pretraining) -> pd.DataFrame:
    """What each snapshot of the denoiser knows (is a rendered scene's true caption preferred?) and does (the judge's score of a sample), a row a case."""
    judge, model = ShapesJudge.load(folder / "judge", device=config.device), load(folder / "pipeline", device=config.device)
    probe, frames = config.probe, []
    starts = [sum(cycle.steps for cycle in config.unet_cycles[:n]) for n in range(len(config.unet_cycles))]
    files = {start + int(file.stem.split("-")[1]): file for n, start in enumerate(starts) for file in sorted(scratch.glob(f"unet_{n + 1}-*.pt"))}
    for step, file in tqdm(files.items(), desc="learning curve"):
        weights = torch.load(file, map_location=config.device, weights_only=True)
        model.network.load_state_dict({name.removeprefix("unet."): value.float() for name, value in weights.items()})
        for category in grammar.CATEGORIES:
            cases = knows(model, category, [prompt.text for prompt in prompts.load(folder / "prompts", category, "val")], probe, seed=config.seed)
            texts = list(cases["prompt"])
            samples = sample(
                model, model.encode(texts), model.null, guidance_scale=probe.guidance_scale, num_inference_steps=probe.num_inference_steps,
                generators=[noise_generator(config.seed, text, case) for case, text in enumerate(texts)], batch_size=probe.batch_size,
            )  # fmt: skip
            does = judge.score(model.decode(samples.latents), texts).double().numpy()
            frames.append(cases[["category", "case"]].assign(step=step, knows=cases["correct"], does=does))
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded model by the `pretrain` part of params.yaml; resumes where it stopped.")
    parser.add_argument("--to", type=Path, default=root() / "data" / "shapes", help="folder of the finished model (default: data/shapes)")
    parser.add_argument("--scratch", type=Path, default=root() / ".scratch" / "pretrain", help="checkpoints and log (default: .scratch/pretrain)")
    arguments = parser.parse_args()
    config = build(Pretraining, load_params().pretrain, "pretrain")
    pretrain(config, folder=arguments.to, scratch=arguments.scratch)


if __name__ == "__main__":
    main()
