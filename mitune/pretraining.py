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
from mitune.networks import build_tokenizer
from mitune.parts import encode_texts, train_judge, train_similarity, train_text_encoder, train_unet, train_vae
from mitune.sampling import noise_generator, sample
from mitune.stages.base import knows

JUDGE_SHARES = {"color": 0.1, "shape": 0.05, "texture": 0.1, "spatial": 0.1, "non_spatial": 0.35, "complex": 0.25, "single": 0.05}
"""Of the judge's own scenes: more of those in which one object lies on another, the hardest to read."""


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
class Pretraining:
    """Sizes of every part (steps are optimizer steps); `shares` are the categories' shares of the captions."""

    seed: int
    device: str
    prediction_type: str
    noise: CaptionNoise
    shares: dict[str, float]
    clean_scenes: int  # rendered scenes with true captions: autoencoder, text encoder, judge, similarity model
    web_scenes: int  # rendered scenes with web captions: the denoiser
    unet_width: int
    vae_steps: int
    text_steps: int
    judge_steps: int
    similarity_steps: int
    unet_steps: int
    snapshots: int
    probe: Probe


def pretrain(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Train every part that is not finished yet and write the model to `folder`."""
    from diffusers import StableDiffusionPipeline

    scratch.mkdir(parents=True, exist_ok=True)
    if config.device == "cpu" and not (scratch / "log.jsonl").exists():
        tqdm.write("pretraining on the CPU: up to 150 minutes on two cores; an interruption costs at most 200 steps")
    options = {"scratch": scratch, "device": config.device}
    write_prompts(folder / "prompts", seed=config.seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    images, captions, _ = clean_scenes(config.clean_scenes, config.shares, seed=config.seed)
    torch.manual_seed(config.seed)
    vae = train_vae(images, steps=config.vae_steps, **options)
    torch.manual_seed(config.seed + 1)
    text_encoder = train_text_encoder(images, captions, tokenizer, steps=config.text_steps, **options)
    judge_images, _, drawn = clean_scenes(config.clean_scenes, JUDGE_SHARES, seed=config.seed + 2)
    judge = train_judge(judge_images, drawn, steps=config.judge_steps, seed=config.seed + 2, **options)
    judge.save(folder / "judge")
    similarity = train_similarity(images, captions, tokenizer, steps=config.similarity_steps, seed=config.seed + 3, **options)
    similarity.half().save_pretrained(folder / "similarity")
    tokenizer.save_pretrained(folder / "similarity")
    del images, captions, judge_images, drawn
    latents, texts = web_latents(config.web_scenes, config.shares, config.noise, vae, seed=config.seed + 1)
    distinct = sorted(set(texts))
    row = {text: n for n, text in enumerate(distinct)}
    hidden_states = encode_texts(text_encoder, tokenizer, [*distinct, ""], device=config.device)
    unet, scheduler = train_unet(
        latents, hidden_states, torch.tensor([row[text] for text in texts]), hidden_states[-1],
        steps=config.unet_steps, width=config.unet_width, prediction_type=config.prediction_type, snapshots=config.snapshots, **options,
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
    for file in tqdm(sorted(scratch.glob("unet-*.pt")), desc="learning curve"):
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
            step = int(file.stem.split("-")[1])
            frames.append(cases[["category", "case"]].assign(step=step, knows=cases["correct"], does=does))
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded model by the `pretrain` part of params.yaml; resumes where it stopped.")
    parser.add_argument("--to", type=Path, default=root() / "data" / "shapes", help="folder of the finished model (default: data/shapes)")
    parser.add_argument("--scratch", type=Path, default=root() / ".scratch" / "pretrain", help="checkpoints and log (default: .scratch/pretrain)")
    arguments = parser.parse_args()
    values = dict(load_params().pretrain)
    config = Pretraining(**values | {"noise": CaptionNoise(**values["noise"]), "probe": Probe(**values["probe"])})
    pretrain(config, folder=arguments.to, scratch=arguments.scratch)


if __name__ == "__main__":
    main()
