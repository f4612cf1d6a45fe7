"""Stage `pool`: M candidate images of each prompt and the MI terms of their trajectories (Algorithm 2)."""

from __future__ import annotations

import torch

from mitune.artifacts import Results, write_tensors
from mitune.memo import scratch
from mitune.sampling import noise_generator, sample
from mitune.shards import progress, shards
from mitune.stages import open_model, read_prompts, weights

TRAJECTORY = ("orthogonal", "path", "inner_product")  # forms of terms along it, those that the model and its sampler have


def build(params, category: str) -> dict[str, tuple[int, ...]]:
    """Write `pools/{category}/{split}.safetensors`: prompt_ids (n,), latents (n, M, C, H, W), each form's terms (n, M, S), timesteps (S,).

    Returns the shape of each split's latents.
    """
    model, pool, shapes = open_model(params), params.pool, {}
    for split, n in pool.n_prompts.items():
        items = read_prompts(params, category, split)[:n]
        compute = sampler(model, pool, pool.guidance_scale, params.seed)
        key = (pool, params.seed, params.dtype, [item.text for item in items], *weights(params).values())
        with scratch(f"pool-{category}-{split}", *key) as folder, progress(len(items), f"pool {category} {split}", unit="prompt") as bar:
            tensors = shards(folder, items, pool.shard_prompts, compute, device=params.device, progress=bar)
            tensors["timesteps"] = tensors["timesteps"][0]
            write_tensors(tensors, Results(params.model).pool(category, split))
        shapes[split] = tuple(tensors["latents"].shape)
    return shapes


def sampler(model, config, guidance_scale: float, seed: int, first: int = 0):
    """For prompts: latents (n, M, C, H, W), terms (n, M, S) and timesteps (n, S) of their candidates `first` to `first + M - 1`, of the same noise at every
    guidance scale.

    `config` has M, num_inference_steps and batch_size.
    """

    def compute(items) -> dict[str, torch.Tensor]:
        rows = [(item, image) for item in items for image in range(first, first + config.M)]
        conditioning = model.encode([item.text for item in items])[torch.arange(len(items)).repeat_interleave(config.M)]
        samples = sample(
            model, conditioning, model.null, guidance_scale=guidance_scale, num_inference_steps=config.num_inference_steps,
            generators=[noise_generator(seed, item.text, image) for item, image in rows], terms=True, inner_product=model.flow, variance=model.variance,
            batch_size=config.batch_size,
        )  # fmt: skip
        found = {name: getattr(samples, name) for name in ("latents", *TRAJECTORY)}
        shaped = {name: values.unflatten(0, (len(items), config.M)) for name, values in found.items() if values is not None}
        return shaped | {"prompt_ids": torch.tensor([item.prompt_id for item in items]), "timesteps": samples.timesteps.expand(len(items), -1)}

    return compute
