"""Pretraining of the embedded model: autoencoder, text encoder, denoiser, judge and similarity model, from rendered scenes.

Run as `python -m mitune.pretraining` (`make pretrain`). Each part resumes from its last checkpoint in `scratch`, logs to
`scratch/log.jsonl`, and is skipped once finished; `ship` writes the diffusers pipeline folder and the judges.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from mitune import captions as grammar
from mitune import scenes
from mitune.alignment import CONTACT_CLASSES, Block, ShapesJudge, image_features, text_features
from mitune.corpus import CaptionNoise, clean_scenes, web_latents, write_prompts
from mitune.geometry import IMAGE_SIZE

MAX_LENGTH = 20  # tokens: the longest caption has 16 words, and two marks stand around them


# ---------------------------------------------------------------- training


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss: Callable[[torch.Generator], dict[str, torch.Tensor]],
    *,
    scratch: Path,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 1e-2,
    warmup: int = 100,
    ema_decay: float | None = None,
    seed: int = 0,
    checkpoint_every: int = 200,
    snapshots: int = 0,
) -> nn.ModuleDict:
    """Minimise `loss(generator)["loss"]` by AdamW, warm-up then linear decay to 0; resumes from `scratch/name.pt`, byte-equal.

    Step i draws from a generator seeded by (seed, i). With `ema_decay` the averaged weights are returned, and with `snapshots`
    that many evenly spaced copies of them are kept in `scratch` for the learning curves.
    """
    device = next(modules.parameters()).device
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0) * max(1 - i / steps, 0.0))
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
    first, file = 0, scratch / f"{name}.pt"
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        modules.load_state_dict(state["modules"]), optimizer.load_state_dict(state["optimizer"]), schedule.load_state_dict(state["schedule"])
        average, first = state["average"], state["step"]
    modules.train()
    started, seen = time.time(), []
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5):
        terms = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (1 + step) / (10 + step)) if ema_decay else 0.0
        with torch.no_grad():
            for key, value in modules.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        seen.append({k: float(v.detach()) for k, v in terms.items()})
        done = step + 1
        if done % 50 == 0 or done == steps:
            mean = {k: sum(row[k] for row in seen) / len(seen) for k in seen[0]}
            with (scratch / "log.jsonl").open("a") as log:
                log.write(json.dumps({"part": name, "step": done, **mean, "seconds": time.time() - started}) + "\n")
            seen = []
        if done % checkpoint_every == 0 or done == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "average": average, "step": done}
            _save(state, file)
        if snapshots and (done * snapshots) // steps > (step * snapshots) // steps:
            _save({k: v.half() if v.is_floating_point() else v for k, v in average.items()}, scratch / f"{name}-{done:06d}.pt")
    modules.load_state_dict(average)
    return modules.eval()


def _save(state: dict, file: Path) -> None:
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


# ---------------------------------------------------------------- the parts


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(16, 32, 64, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=IMAGE_SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def train_vae(images: torch.Tensor, *, scratch: Path, device: str, steps: int, batch_size: int = 32):
    vae = build_vae().to(device)

    def loss(generator):
        x = images[torch.randint(len(images), (batch_size,), generator=generator)].to(device)
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)
        y = vae.decode(latents).sample
        mse = F.mse_loss(y, x)
        return {"loss": F.l1_loss(y, x) + 2 * mse + 1e-6 * posterior.kl().mean(), "mse": mse}

    fit("vae", nn.ModuleDict({"vae": vae}), loss, scratch=scratch, steps=steps, learning_rate=2e-3, ema_decay=0.995)
    with torch.inference_mode():
        means = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in images[:2048].split(256)])
    vae.register_to_config(scaling_factor=round(float(1 / means.std()), 5))
    return vae


def build_tokenizer(folder: Path):
    """A CLIPTokenizer whose byte-pair merges make one token of every word of the world; written to and read from `folder`."""
    from transformers import CLIPTokenizer

    words = [*grammar.SHAPES, *grammar.COLORS, *grammar.TEXTURES, *grammar.SIZES, "a", "and", *" ".join(grammar.RELATIONS.values()).split()]
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    vocabulary, merges = sorted({token for split in parts.values() for token in split}), []
    while any(len(split) > 1 for split in parts.values()):  # byte-pair encoding with ties broken by spelling, so that the files are always the same
        counts = Counter(pair for split in parts.values() for pair in zip(split, split[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        parts = {word: _merge(split, best) for word, split in parts.items()}
        merges.append(best), vocabulary.append("".join(best))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)


def _merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in split:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def text_config(tokenizer, width: int, layers: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


class _Contrast:
    """Image-caption batches with one hard negative a caption, and the contrastive loss (InfoNCE both ways) over them."""

    def __init__(self, images: torch.Tensor, captions: list[grammar.Caption], tokenizer, device: str):
        self.images, self.captions, self.tokenizer, self.device = images, captions, tokenizer, device

    def batch(self, batch_size: int, generator: torch.Generator):
        rows = torch.randint(len(self.images), (batch_size,), generator=generator).tolist()
        true = [self.captions[row] for row in rows]
        false = [grammar.corrupt(caption, generator, kinds=("swap", "replace", "layout", "object")) for caption in true]
        return self.images[rows].to(self.device), [str(caption) for caption in (*true, *false)]

    def tokens(self, texts: list[str]):
        return self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").to(self.device)


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """InfoNCE for images (B, d) and texts (2B, d), the second half being each image's own wrong caption."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = image @ text.T * log_scale.exp().clamp(max=100)
    rows = torch.arange(len(image), device=image.device)
    own = torch.stack([logits[rows, rows], logits[rows, rows + len(image)]], -1)
    loss = F.cross_entropy(logits, rows) + F.cross_entropy(logits[:, : len(image)].T, rows) + F.cross_entropy(own, torch.zeros_like(rows))
    return {"loss": loss, "hard_negative_accuracy": (own[:, 0] > own[:, 1]).float().mean()}


def train_text_encoder(images, captions, tokenizer, *, scratch: Path, device: str, steps: int, width: int = 96, batch_size: int = 192):
    """A causal CLIPTextModel trained against a small CNN, its tokens mean-pooled so that every token carries its bound meaning."""
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel(text_config(tokenizer, width, 3)).to(device)
    vision = nn.Sequential(Block(3, 24, 2), Block(24, 48, 2), Block(48, 96, 2), nn.Flatten(), nn.Linear(96 * (IMAGE_SIZE // 8) ** 2, 256))
    reader = nn.ModuleDict({"image": vision, "text": nn.Linear(width, 256)}).to(device)
    reader.register_parameter("log_scale", nn.Parameter(torch.tensor(2.6, device=device)))
    data = _Contrast(images, captions, tokenizer, device)

    def loss(generator):
        x, texts = data.batch(batch_size, generator)
        tokens = data.tokens(texts)
        hidden = text_encoder(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return contrastive_loss(reader["image"](x), reader["text"](pooled), reader.log_scale)

    fit("text_encoder", nn.ModuleDict({"text_encoder": text_encoder, "reader": reader}), loss, scratch=scratch, steps=steps, learning_rate=1e-3)
    return text_encoder


def train_similarity(images, captions, tokenizer, *, scratch: Path, device: str, steps: int, seed: int, batch_size: int = 192):
    """A CLIPModel of its own weights and seed: the independent second alignment score."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    torch.manual_seed(seed)
    text = text_config(tokenizer, 96, 2)
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, projection_dim=96, num_hidden_layers=4, num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=8
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=96)).to(device)
    data = _Contrast(images, captions, tokenizer, device)

    def loss(generator):
        x, texts = data.batch(batch_size, generator)
        return contrastive_loss(image_features(model, x), text_features(model, tokenizer, texts), model.logit_scale)

    fit("similarity", nn.ModuleDict({"model": model}), loss, scratch=scratch, steps=steps, learning_rate=1e-3, seed=seed)
    return model


def train_judge(images, drawn: scenes.Scenes, *, scratch: Path, device: str, steps: int, seed: int, batch_size: int = 128) -> ShapesJudge:
    """The judge, on rendered scenes with noise and blur, so that it also reads decoded images."""
    torch.manual_seed(seed)
    judge = ShapesJudge().to(device)
    labels = judge_labels(drawn)

    def loss(generator):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        x = blur(images[rows], generator).to(device)
        return judge_loss(judge, x, {name: value[rows].to(device) for name, value in labels.items()})

    fit("judge", nn.ModuleDict({"judge": judge}), loss, scratch=scratch, steps=steps, learning_rate=2e-3, ema_decay=0.995, seed=seed)
    return judge


def blur(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images blurred by a 3 x 3 binomial kernel, and noise of up to 0.08 on all of them."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    images = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, soft, images)
    return images + 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)


def judge_labels(drawn: scenes.Scenes) -> dict[str, torch.Tensor]:
    """The truth about N scenes: `shape`, `color`, `texture`, `size`, `centre` as drawn, and `contact` (N,), -1 where there is no clear margin."""
    names = [CONTACT_CLASSES.index(name) if name else -1 for start in range(0, len(drawn), 512) for name in scenes.contact(drawn[start : start + 512])]
    return {name: getattr(drawn, name) for name in ("shape", "color", "texture", "size", "centre")} | {"contact": torch.tensor(names)}


def judge_loss(judge: ShapesJudge, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    answers = judge(images)
    shape, rows = labels["shape"], torch.arange(len(images), device=images.device)
    present = torch.zeros(len(images), len(grammar.SHAPES), device=images.device)
    terms = []
    for i in (0, 1):
        here = shape[:, i] >= 0
        at = (rows[here], shape[here, i])
        present[at] = 1.0
        terms += [F.cross_entropy(answers[name][at], labels[name][here, i]) for name in ("color", "texture", "size")]
        terms.append(F.smooth_l1_loss(answers["centre"][at], labels["centre"][here, i]) * 0.2)
    known = labels["contact"] >= 0
    first, second = shape[known, 0], shape[known, 1]
    logits = torch.cat([judge.contact(answers["feature"][known], first, second), judge.contact(answers["feature"][known], second, first)])
    turned = torch.tensor([1, 0, 2, 3, 4], device=images.device)[labels["contact"][known]]  # inside <-> around
    terms.append(F.cross_entropy(logits, torch.cat([labels["contact"][known], turned])))
    terms.append(F.binary_cross_entropy_with_logits(answers["present"][..., 0], present) * 4)
    return {"loss": sum(terms)}


def build_unet(width: int = 96):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(width // 2, width), layers_per_block=1, cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def build_scheduler(prediction_type: str):
    """Stable Diffusion's schedule: scaled linear betas from 0.00085 to 0.012, T = 1000; DDPM sampling with sigma^2 = beta, as in the paper."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        variance_type="fixed_large", clip_sample=False, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip


def train_unet(
    latents,
    hidden_states,
    rows,
    null_state,
    *,
    scratch: Path,
    device: str,
    steps: int,
    width: int,
    prediction_type: str,
    batch_size: int = 128,
    snapshots: int = 8,
):
    """The denoiser: E ||target - unet(z_t, t, c)||^2 with 10 % of the captions dropped; `rows` maps an image to its caption's row of `hidden_states`."""
    torch.manual_seed(0)
    unet, scheduler = build_unet(width).to(device), build_scheduler(prediction_type)

    def loss(generator):
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        z = latents[index].to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        timesteps = torch.randint(1000, (batch_size,), generator=generator).to(device)
        condition = hidden_states[rows[index]].to(device)
        dropped = (torch.rand(batch_size, generator=generator) < 0.1).to(device)
        condition = torch.where(dropped[:, None, None], null_state.to(device), condition)
        target = scheduler.get_velocity(z, noise, timesteps) if prediction_type == "v_prediction" else noise
        return {"loss": F.mse_loss(unet(scheduler.add_noise(z, noise, timesteps), timesteps, condition).sample, target)}

    fit("unet", nn.ModuleDict({"unet": unet}), loss, scratch=scratch, steps=steps, learning_rate=1.2e-3, ema_decay=0.999, warmup=300, snapshots=snapshots)
    return unet, scheduler


@torch.inference_mode()
def encode_texts(text_encoder, tokenizer, texts: list[str], *, device: str, batch_size: int = 1024) -> torch.Tensor:
    """Last hidden states (N, MAX_LENGTH, width), padded with end tokens as in Stable Diffusion's pipeline (no mask)."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    return torch.cat([text_encoder(part.to(device)).last_hidden_state.cpu() for part in ids.split(batch_size)])


# ---------------------------------------------------------------- the whole


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


def pretrain(config: Pretraining, *, folder: Path, scratch: Path) -> None:
    """Train every part that is not finished yet and write the model to `folder`."""
    from diffusers import StableDiffusionPipeline

    scratch.mkdir(parents=True, exist_ok=True)
    options = {"scratch": scratch, "device": config.device}
    write_prompts(folder / "prompts", seed=config.seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    images, captions, drawn = clean_scenes(config.clean_scenes, config.shares, seed=config.seed)
    torch.manual_seed(config.seed)
    vae = train_vae(images, steps=config.vae_steps, **options)
    torch.manual_seed(config.seed + 1)
    text_encoder = train_text_encoder(images, captions, tokenizer, steps=config.text_steps, **options)
    judge = train_judge(images, drawn, steps=config.judge_steps, seed=config.seed + 2, **options)
    judge.save(folder / "judge")
    similarity = train_similarity(images, captions, tokenizer, steps=config.similarity_steps, seed=config.seed + 3, **options)
    similarity.half().save_pretrained(folder / "similarity")
    tokenizer.save_pretrained(folder / "similarity")
    del images, captions, drawn
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
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "pipeline")
