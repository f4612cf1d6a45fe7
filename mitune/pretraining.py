"""Pretraining of the embedded model: autoencoder, text encoder, denoiser, judge and similarity model, from rendered scenes.

Run as `python -m mitune.pretraining` (`make pretrain`). Each part resumes from its last checkpoint in `scratch`, logs to
`scratch/log.jsonl`, and is skipped once finished; the diffusers pipeline folder, the judges, the prompt files, the learning curve and
the denoisers of `caption_noise` are written to `folder`.
"""

from __future__ import annotations

import argparse
import copy
import copyreg
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm.auto import tqdm

from mitune.alignment import ShapesJudge
from mitune.config import load as load_params
from mitune.config import root
from mitune.corpus import CaptionNoise, clean_scenes, misquoted, web_latents, write_prompts
from mitune.curve import Probe, learning_curve
from mitune.models import load
from mitune.networks import build_scheduler, build_tokenizer, build_unet, build_vae
from mitune.parts import encode_texts, reconstruct, train_judge, train_similarity, train_text_encoder, train_unet, train_vae, whiten
from mitune.schema import Share, build

JUDGE_SHARES = {"color": 0.1, "shape": 0.05, "texture": 0.1, "spatial": 0.1, "non_spatial": 0.35, "complex": 0.25, "single": 0.05}
"""Of the judge's own scenes: more of those in which one object lies on another, the hardest to read; and what is not said is drawn evenly."""


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


def _frozen(mapping: dict) -> MappingProxyType:
    return MappingProxyType(mapping)


copyreg.pickle(MappingProxyType, lambda mapping: (_frozen, (dict(mapping),)))  # a configuration may go to another process


def pretrain(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Train every part that is not finished yet and write the model to `folder`."""
    from diffusers import StableDiffusionPipeline

    scratch.mkdir(parents=True, exist_ok=True)
    if config.device == "cpu" and not (scratch / "log.jsonl").exists():
        tqdm.write("pretraining on the CPU takes hours (data/shapes/log.jsonl has each part's seconds); an interruption costs at most 200 steps")
    places = {"folder": folder, "scratch": scratch}
    write_prompts(folder / "prompts", seed=config.seed)
    images, captions, _ = clean_scenes(config.clean_scenes, config.shares, seed=config.seed)
    vae, tokenizer = _autoencoder(config, images, scratch), build_tokenizer(scratch / "tokenizer")
    with beside(judges, config, **places):
        torch.manual_seed(config.seed + 1)
        text_encoder = train_text_encoder(images, captions, tokenizer, steps=config.text_steps, scratch=scratch, device=config.device)
        del images
        torch.manual_seed(config.seed)
        unet, scheduler = build_unet(config.unet_width).to(config.device), build_scheduler(config.prediction_type)
        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        *first, last = range(len(config.unet_cycles))
        for n in first:
            _denoiser(config, pipeline, n, scratch)
    pipeline.save_pretrained(folder / "pipeline")  # what the small denoisers share with it is finished
    with beside(caption_noise, config, **places):
        _denoiser(config, pipeline, last, scratch)
    unet.half()
    pipeline.save_pretrained(folder / "pipeline")
    shutil.copy(scratch / "log.jsonl", folder / "log.jsonl")
    learning_curve(config.probe, [cycle.steps for cycle in config.unet_cycles], seed=config.seed, device=config.device, **places)


@contextmanager
def beside(part: Callable[..., None], config: Pretraining, **places: Path) -> Iterator[None]:
    """Run `part(config, **places)` while the body runs: on a CPU of several cores in a process of its own, each with half of them, which two small networks use
    better than one does all; elsewhere before the body."""
    threads = torch.get_num_threads()
    if config.device != "cpu" or threads < 2:
        part(config, **places)
        yield
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:
        done = pool.submit(part, config, **places)
        torch.set_num_threads(threads - threads // 2)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        done.result()


def _autoencoder(config: Pretraining, images: torch.Tensor, scratch: Path):
    torch.manual_seed(config.seed)
    vae = build_vae().to(config.device)
    for n, steps in enumerate(config.vae_cycles):
        train_vae(vae, images, name=f"vae_{n + 1}", steps=steps, seed=config.seed + n, scratch=scratch, device=config.device)
    whiten(vae, images[:2048])
    return vae


def _denoiser(config: Pretraining, pipeline, n: int, scratch: Path) -> None:
    """Cycle `n` of the pipeline's denoiser, in place."""
    cycle = config.unet_cycles[n]
    latents, texts = web_latents(config.web_scenes, cycle.shares, config.noise, pipeline.vae, seed=config.seed + 1 + 10 * n)
    states, rows = _conditioned(texts, pipeline.text_encoder, pipeline.tokenizer, config.device)
    options = {"seed": config.seed + n, "snapshots": config.snapshots, "scratch": scratch, "device": config.device}
    train_unet(pipeline.unet, pipeline.scheduler, latents, states, rows, name=f"unet_{n + 1}", steps=cycle.steps, **options)


def judges(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Write the similarity model and the judge to `folder`; the autoencoder, whose images the judge is trained on too, is the finished one in `scratch`."""
    options, tokenizer = {"scratch": scratch, "device": config.device}, build_tokenizer(scratch / "tokenizer")
    images, captions, _ = clean_scenes(config.clean_scenes, config.shares, seed=config.seed)
    similarity = train_similarity(images, captions, tokenizer, steps=config.similarity_steps, seed=config.seed + 3, **options)
    similarity.half().save_pretrained(folder / "similarity")
    tokenizer.save_pretrained(folder / "similarity")
    vae = _autoencoder(config, images, scratch)
    torch.manual_seed(config.seed + 2)
    judge = ShapesJudge().to(config.device)
    for n, steps in enumerate(config.judge_cycles):
        images, _, drawn = clean_scenes(config.clean_scenes, JUDGE_SHARES, seed=config.seed + 2 + 10 * n, plain=0.0)
        images[::2] = reconstruct(vae, images[::2])  # what it is to judge is decoded
        train_judge(judge, images, drawn, name=f"judge_{n + 1}", steps=steps, seed=config.seed + 2 + n, **options)
    judge.save(folder / "judge")


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
