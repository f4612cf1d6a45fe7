"""How each part of the embedded model is trained; every function resumes from its checkpoint in `scratch` and is over at once if that is complete."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mitune import captions as grammar
from mitune import scenes
from mitune.alignment import Block, ShapesJudge, image_features, text_features
from mitune.corpus import judge_labels
from mitune.fitting import fit
from mitune.geometry import IMAGE_SIZE
from mitune.networks import MAX_LENGTH, build_similarity, text_config


def train_vae(vae, images: torch.Tensor, *, name: str, scratch: Path, device: str, steps: int, seed: int, batch_size: int = 32):
    """One cycle of the autoencoder, in place."""

    def loss(generator):
        x = images[torch.randint(len(images), (batch_size,), generator=generator)].to(device)
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)
        y = vae.decode(latents).sample
        mse = F.mse_loss(y, x)
        return {"loss": F.l1_loss(y, x) + 2 * mse + 1e-6 * posterior.kl().mean(), "mse": mse}

    fit(name, nn.ModuleDict({"vae": vae}), loss, scratch=scratch, steps=steps, learning_rate=2e-3, ema_decay=0.995, seed=seed)


@torch.no_grad()
def whiten(vae, images: torch.Tensor, *, floor: float = 0.1) -> torch.Tensor:
    """Give every direction of the latents the same variance, in place, and set the scaling factor to 1 over their standard deviation.

    W = U max(L, floor max(L))^(-1/2) U^T of their covariance U L U^T over images and places, folded into the 1 x 1 convolutions on either
    side of them: images and reconstructions stay as they are. What is small in the latents, such as a texture, is then not lost in noise
    long before what is large, such as a colour. Returns W (C, C).
    """
    latents = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in images.split(256)])
    values, vectors = torch.linalg.eigh(torch.cov(latents.transpose(0, 1).flatten(1)))
    w = vectors @ torch.diag(values.clamp(min=floor * values.max()).rsqrt()) @ vectors.T
    channels = len(w)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] = torch.einsum("ij,jkhw->ikhw", w.to(vae.device), before.weight[:channels])
    before.bias[:channels] = w.to(vae.device) @ before.bias[:channels]
    after.weight.copy_(torch.einsum("ijhw,jk->ikhw", after.weight, torch.linalg.inv(w).to(vae.device)))
    vae.register_to_config(scaling_factor=round(float(1 / torch.einsum("ij,njhw->nihw", w, latents).std()), 5))
    return w


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) as the autoencoder gives them back, on the CPU."""
    return torch.cat([vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.cpu() for part in images.split(128)])


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
    torch.manual_seed(seed)
    model = build_similarity(tokenizer).to(device)
    data = _Contrast(images, captions, tokenizer, device)

    def loss(generator):
        x, texts = data.batch(batch_size, generator)
        return contrastive_loss(image_features(model, x), text_features(model, tokenizer, texts), model.logit_scale)

    fit("similarity", nn.ModuleDict({"model": model}), loss, scratch=scratch, steps=steps, learning_rate=1e-3, seed=seed)
    return model


def train_judge(judge: ShapesJudge, images, drawn: scenes.Scenes, *, name: str, scratch: Path, device: str, steps: int, seed: int, batch_size: int = 128):
    """One cycle of `judge`, in place, on images of the scenes `drawn`, with noise and blur."""
    labels = judge_labels(drawn)

    def loss(generator):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        x = blur(images[rows], generator).to(device)
        return judge_loss(judge, x, {name: value[rows].to(device) for name, value in labels.items()})

    fit(name, nn.ModuleDict({"judge": judge}), loss, scratch=scratch, steps=steps, learning_rate=2e-3, ema_decay=0.995, seed=seed)


def blur(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images blurred by a 3 x 3 binomial kernel, and noise of up to 0.08 on all of them."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    images = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, soft, images)
    return images + 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)


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


def train_unet(
    unet,
    scheduler,
    latents,
    hidden_states,
    rows,
    *,
    name: str,
    scratch: Path,
    device: str,
    steps: int,
    seed: int,
    snapshots: int,
    batch_size: int = 128,
):
    """One cycle of the denoiser, in place: E ||target - unet(z_t, t, c)||^2 with 10 % of the captions dropped.

    `rows` maps an image to its caption's row of `hidden_states`, whose first is the empty caption.
    """
    null_state = hidden_states[0].to(device)

    def loss(generator):
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        z = latents[index].to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        timesteps = torch.randint(1000, (batch_size,), generator=generator).to(device)
        condition = hidden_states[rows[index]].to(device)
        dropped = (torch.rand(batch_size, generator=generator) < 0.1).to(device)
        condition = torch.where(dropped[:, None, None], null_state, condition)
        target = scheduler.get_velocity(z, noise, timesteps) if scheduler.config.prediction_type == "v_prediction" else noise
        return {"loss": F.mse_loss(unet(scheduler.add_noise(z, noise, timesteps), timesteps, condition).sample, target)}

    modules = nn.ModuleDict({"unet": unet})
    fit(name, modules, loss, scratch=scratch, steps=steps, learning_rate=1.2e-3, ema_decay=0.999, warmup=300, seed=seed, snapshots=snapshots)


@torch.inference_mode()
def encode_texts(text_encoder, tokenizer, texts: list[str], *, device: str, batch_size: int = 1024) -> torch.Tensor:
    """Last hidden states (N, MAX_LENGTH, width), padded with end tokens as in Stable Diffusion's pipeline (no mask)."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    return torch.cat([text_encoder(part.to(device)).last_hidden_state.cpu() for part in ids.split(batch_size)])
