"""Image-text cosines of pretrained CLIP models: CLIPScore and HPS v2.1."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from mitune.alignment import embedded, text_features
from mitune.loading import describe
from mitune.pixels import Recipe, prepared
from mitune.pretrained import companion, file, pretrained

HPS_FILE = "HPS_v2.1_compressed.pt"
HPS_BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the architecture and tokenizer that HPS v2.1 fine-tunes


class ClipScore:
    """max(cos, 0) of image and prompt in a CLIPModel's joint space, 0 to 1.

    CLIPScore is 100 of it in torchmetrics, and 2.5 of it in Hessel et al. 2021; T2I-CompBench has the plain cosine of ViT-B/32, HPS v2.1 that of its own
    ViT-H/14 (Wu et al. 2023; 27.5 for the paper's base is a score of 0.275).
    """

    FAILURES = ("unknown",)

    def __init__(self, model, tokenizer, *, fit: str = "crop", batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size, self._encoding = model, tokenizer, batch_size, threading.Lock()  # tokenizers take one thread at a time
        self.recipe = Recipe(model.config.vision_config.image_size, fit)

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 64) -> ClipScore:
        from transformers import CLIPModel, CLIPTokenizer

        return cls(pretrained(CLIPModel, source, device=device, dtype=dtype), companion(CLIPTokenizer, source), batch_size=batch_size)

    @torch.inference_mode()
    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,); each distinct prompt is encoded once, of at most the model's 77 tokens."""
        distinct = sorted(set(prompts))
        with self._encoding:
            texts = torch.cat([text_features(self.model, self.tokenizer, distinct[n : n + 256]) for n in range(0, len(distinct), 256)])
        text = F.normalize(texts.float(), dim=-1).cpu()
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return (self.features(images).cpu() * text[rows]).sum(-1).clamp(min=0)

    def assess(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and "unknown" of every image: a cosine does not say what is wrong."""
        return self.score(images, prompts), ["unknown"] * len(prompts)

    @torch.inference_mode()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The images' embeddings (N, d), of unit norm, float32."""
        parts = (prepared(part.to(self.model.device), self.recipe).to(self.model.dtype) for part in images.split(self.batch_size))
        return torch.cat([F.normalize(embedded(self.model, part).float(), dim=-1) for part in parts])


def load_hps(source: str | Path, base: str | Path = HPS_BASE, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 64) -> ClipScore:
    """HPS v2.1 as a `ClipScore`: its published file, or a repository or folder with it, in the shape of `base`; or a folder with a converted CLIPModel.

    Images are resized by the longer edge and padded, as its code does; of square ones nothing is padded. Raises ValueError for another file.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    if (Path(source) / "config.json").is_file():
        model, base = pretrained(CLIPModel, source, device=device, dtype=dtype), source
    else:
        path = file(source, HPS_FILE)
        model = CLIPModel(companion(CLIPConfig, base))
        model.load_state_dict(from_open_clip(_stored(path), model.state_dict()))
        model = model.to(device, getattr(torch, dtype)).requires_grad_(False).eval()
    return ClipScore(model, companion(CLIPTokenizer, base), fit="pad", batch_size=batch_size)


def _stored(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint, read without running any code in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of HPS: {describe(error)}; download it again") from error


def from_open_clip(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors by the names of a CLIPModel's `wanted`: attention's one input matrix is cut into those of query, key and value, and projections
    are turned. Raises ValueError where a tensor is missing, left over, or of another shape."""
    named = {}
    for key, value in state.items():
        named |= _renamed(key, value.float())
    different = sorted(named.keys() ^ wanted.keys()) or sorted(key for key in wanted if named[key].shape != wanted[key].shape)
    if different:
        raise ValueError(f"the open_clip checkpoint does not fit the model: {len(different)} tensors differ, {different[0]} for one; name its own base")
    return named


NAMES = (  # open_clip's, and transformers'
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)


def _renamed(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if key in ("visual.proj", "text_projection"):
        return {"visual_projection.weight" if key == "visual.proj" else "text_projection.weight": value.T.contiguous()}
    if key == "attn_mask":
        return {}
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    if ".attn.in_proj_" in key:
        before, ending = key.split(".attn.in_proj_")
        return {f"{before}.self_attn.{part}_proj.{ending}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
    return {key: value}
