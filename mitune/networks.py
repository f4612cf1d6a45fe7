"""The embedded model's parts, untrained, in diffusers' and transformers' own classes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from mitune import captions as grammar
from mitune.geometry import IMAGE_SIZE

MAX_LENGTH = 20  # tokens: the longest caption has 16 words, and two marks stand around them


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(16, 32, 64, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=IMAGE_SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def build_tokenizer(folder: Path):
    """A CLIPTokenizer whose byte-pair merges make one token of every word of the world; written to and read from `folder`."""
    from transformers import CLIPTokenizer

    words = [*grammar.SHAPES, *grammar.COLORS, *grammar.TEXTURES, *grammar.SIZES, "a", "and", *" ".join(grammar.RELATIONS.values()).split()]
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    vocabulary, merges = sorted({token for split in parts.values() for token in split}), []
    while any(len(split) > 1 for split in parts.values()):  # byte-pair encoding with ties broken by spelling, so that the files are always the same
        counts = Counter(pair for split in parts.values() for pair in itertools.pairwise(split))
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


def build_similarity(tokenizer):
    """A CLIPModel of 64 x 64 images: the second alignment score."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, projection_dim=96, num_hidden_layers=4, num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=8
    )
    return CLIPModel(CLIPConfig(text_config=text_config(tokenizer, 96, 2).to_dict(), vision_config=vision.to_dict(), projection_dim=96))
