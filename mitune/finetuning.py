"""Fine-tuning of the denoiser, alone or with its text encoder, on a selected set: a DoRA (or LoRA) adapter by PEFT, by one process or several.

Table 8 of the paper gives the values: rank 32, alpha 32, AdamW, constant learning rate, gradients clipped to norm 1, t ~ U(500, 1000).
Latents and conditioning lie in memory; step i draws its images, timesteps and noise from generators seeded by (seed, i) alone, so an
interrupted run that resumes ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from mitune import processes
from mitune.denoisers import Conditioning
from mitune.dora import bfloat16_around, merged_forward, merged_once
from mitune.pipelines import LatentDiffusion
from mitune.recipes import Tuning

TARGETS = {
    "unet": {"attention": ("to_k", "to_out.0", "to_q", "to_v"), "ff": ("ff.net.0.proj", "ff.net.2")},
    "transformer": {
        "attention": ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"),
        "ff": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    },
    "text_encoder": {"attention": ("k_proj", "out_proj", "q_proj", "v_proj"), "ff": ("fc1", "fc2")},
}
"""Layers of a network's transformer blocks by the names that `target_modules` takes: the paper adapts "attention and fully connected layers"."""

ADAPTERS = {"dora": True, "lora": False}  # name -> LoraConfig.use_dora
WITHOUT_EFFECT = ("checkpoint_every", "save_dtype")  # of the configuration: what does not change the trained weights


def finetune(
    model: LatentDiffusion, latents: torch.Tensor, conditioning: Conditioning, config: Tuning, *,
    seed: int, folder_checkpoints: Path, progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train an adapter on the denoiser, and on the text encoder if `config.text_encoder`, to predict `latents` (N, C, H, W) from their captions (N).

    loss = mean over the batch and the latent entries of (target(z_0, noise, t) - predict(z_t, t, caption))^2,
    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, t uniform on low..high-1; no caption is dropped. Only the adapter is trained, and it
    stays attached: `model.save_adapter(folder)` writes it, `remove_adapter(model)` takes it off. After every `checkpoint_every` steps the
    adapter and the optimizer are written to `folder_checkpoints`, under a name that only the same data, settings and weights find again.
    Of several processes each takes its share of every batch, `micro_batch_size` images in a pass; all hold the mean of their gradients and so the same
    adapter. Neither changes the noise.

    Args:
        latents: scaled as the network sees them.
        conditioning: of the captions, by `read_captions`.
        progress: called with the number of steps done since its last call, as tqdm's `update`.

    Returns:
        One row a step: step (from 1), loss, grad_norm (before clipping).

    Raises:
        ValueError: an empty set, captions that do not fit it, an impossible setting, an adapter that is attached already, a loss that is not finite.
    """
    _check(latents, conditioning, config, model)
    if config.batch_size % processes.count():
        raise ValueError(f"finetune.batch_size is {config.batch_size}: it does not split into {processes.count()} processes; choose a multiple")
    file = Path(folder_checkpoints) / f"{_fingerprint(model, latents, conditioning, config, seed)}.pt"
    add_adapter(model, config, seed=seed)
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=tuple(config.betas), eps=config.epsilon, weight_decay=config.weight_decay)
    rows = _restore(file, trained, optimizer)
    if progress and rows:
        progress(len(rows))
    networks = model.adapted.values()
    for network in networks:
        network.train()
    with bfloat16_around(*networks) if config.mixed_precision == "bf16" else contextlib.nullcontext():
        for step in range(len(rows), config.steps):
            mean = _gradients(model, step_batch(latents, config, seed=seed, step=step), conditioning, config)
            processes.average([mean, *(parameter.grad for parameter in trained.values() if parameter.grad is not None)])
            loss = float(mean)
            if not loss < float("inf"):
                raise ValueError(f"the loss is {loss} at step {step + 1}; lower finetune.learning_rate or use float32")
            grad_norm = nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            rows.append({"step": step + 1, "loss": loss, "grad_norm": float(grad_norm)})
            if processes.is_first() and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
                _write(file, trained, optimizer, rows)
            if progress:
                progress(1)
    for network in networks:
        network.eval()
    return rows


def read_captions(model: LatentDiffusion, captions: Sequence[str], config: Tuning) -> Conditioning:
    """Captions as `finetune` takes them: token ids where the text encoder is trained, else its hidden states, computed once."""
    return model.tokenize(captions) if config.text_encoder else model.encode(captions)


def step_batch(latents: torch.Tensor, config: Tuning, *, seed: int, step: int) -> dict[str, torch.Tensor]:
    """What step `step` (from 0) trains on: `rows` (B,) of the set, `latents` and `noise` (B, C, H, W), `timesteps` (B,), noise of this step's own generator.

    The set is gone through in epochs, each in a new order; a batch larger than the set spans several.
    """
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = positions // len(latents)
    orders = {epoch: torch.randperm(len(latents), generator=_generator("epoch", seed, epoch)) for epoch in epochs.unique().tolist()}
    rows = torch.stack([orders[epoch][position % len(latents)] for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True)])
    generator = _generator("step", seed, step)
    timesteps = torch.randint(config.timesteps.low, config.timesteps.high, (config.batch_size,), generator=generator)
    noise = torch.randn((config.batch_size, *latents.shape[1:]), generator=generator)
    return {"rows": rows, "latents": latents[rows], "noise": noise, "timesteps": timesteps}


def add_adapter(model: LatentDiffusion, config: Tuning, *, seed: int) -> None:
    """Attach a new adapter to the networks that are trained and freeze everything else; with B = 0 the outputs do not change yet.

    W' = m (W + s B A) / ||W + s B A||, the norm over each row, s = lora_alpha / rank, m trained (DoRA); W' = W + s B A (LoRA).
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if model.adapted:
        raise ValueError("the model carries an adapter already; fuse it on loading, or call remove_adapter(model) first")
    networks = {name: network for name, network in model.networks.items() if config.text_encoder or network is model.network}
    names = {part: target_modules(network, config.target_modules, part) for part, network in networks.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A from the global generator
        for part, network in networks.items():
            network.requires_grad_(False)
            use_dora = ADAPTERS[config.adapter]
            adapter = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=names[part], use_dora=use_dora, init_lora_weights=True)
            network.add_adapter(adapter)
            network.peft_config["default"].target_modules = names[part]  # PEFT keeps a set, whose order differs from run to run
            cast_training_params(network, dtype=torch.float32)


def objective(model: LatentDiffusion, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The mean squared error of what the network predicts at z_t, a scalar in float32; differentiable."""
    noisy = model.add_noise(latents, noise, timesteps)
    error = model.predict(noisy, timesteps, conditioning).float() - model.target(latents, noise, timesteps).float()
    return error.square().mean()


def trained_parameters(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """The attached adapter's parameters by the names of their network and place."""
    networks = model.adapted.items()
    return {f"{part}.{name}": parameter for part, network in networks for name, parameter in network.named_parameters() if parameter.requires_grad}


def adapter_size(network: nn.Module, config: Tuning, part: str = "unet") -> int:
    """Parameters of the adapter that `add_adapter` would give a network: rank (inputs + outputs) a layer, and for DoRA its magnitudes, one an output."""
    endings = target_modules(network, config.target_modules, part)
    layers = [layer for name, layer in network.named_modules() if any(name == ending or name.endswith("." + ending) for ending in endings)]
    return sum(config.rank * (layer.in_features + layer.out_features) + ADAPTERS[config.adapter] * layer.out_features for layer in layers)


def remove_adapter(model: LatentDiffusion) -> None:
    """Take the adapter off; the base weights were never changed."""
    if not model.adapted:
        raise ValueError("the model carries no adapter to remove")
    model.pipeline.unload_lora_weights()


def target_modules(network: nn.Module, names: str | Iterable[str], part: str = "unet") -> list[str]:
    """Endings of the layers to adapt, sorted; `names` are keys of `TARGETS[part]` ("attention+ff" or a list) or endings themselves.

    Raises:
        ValueError: no layer of the network has one of the endings.
    """
    names = names.split("+") if isinstance(names, str) else names
    endings = sorted({ending for name in names for key in name.split("+") for ending in TARGETS[part].get(key, (key,))})
    layers = [name for name, _ in network.named_modules()]
    for ending in endings:
        if not any(layer == ending or layer.endswith("." + ending) for layer in layers):
            raise ValueError(f"finetune.target_modules: no layer is called {ending!r}; name {' or '.join(TARGETS[part])}, or the ending of a layer's name")
    return endings


# ---------------------------------------------------------------- parts


def _gradients(model: LatentDiffusion, batch: dict[str, torch.Tensor], conditioning: Conditioning, config: Tuning) -> torch.Tensor:
    """Leave in the adapter the gradients of the loss of this process's images, every n-th of the batch, and return it."""
    shares = [batch[name][processes.index() :: processes.count()] for name in ("rows", "latents", "noise", "timesteps")]
    passes = list(zip(*(share.split(config.micro_batch_size) for share in shares), strict=True))
    merged, losses = merged_forward if len(passes) == 1 else merged_once, []
    with merged(*model.adapted.values()):
        for rows, *tensors in passes:
            share = len(rows) / len(shares[0])
            loss = share * objective(model, *(tensor.to(model.device) for tensor in tensors), conditioning[rows])
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _generator(stream: str, seed: int, index: int) -> torch.Generator:
    """A generator of its own for each (stream, seed, index)."""
    digest = hashlib.sha256(f"{stream}\n{seed}\n{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _write(file: Path, trained: dict[str, nn.Parameter], optimizer, rows: list[dict[str, float]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save({"adapter": {name: p.detach() for name, p in trained.items()}, "optimizer": optimizer.state_dict(), "rows": rows}, part)
    part.replace(file)


def _restore(file: Path, trained: dict[str, nn.Parameter], optimizer) -> list[dict[str, float]]:
    """Put a checkpoint's state in place; the rows of the steps that it has done (none without a checkpoint)."""
    if not file.exists():
        return []
    state = torch.load(file, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["rows"]


def _fingerprint(model: LatentDiffusion, latents: torch.Tensor, conditioning: Conditioning, config: Tuning, seed: int) -> str:
    """A name for everything that the trained weights depend on."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    digest = hashlib.sha256(repr((sorted(settings.items()), seed, tuple(latents.shape))).encode())
    tensors = [latents, *(conditioning.tensors[name] for name in sorted(conditioning.tensors))]
    tensors += [weight for network in model.networks.values() for weight in network.state_dict().values()]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check(latents: torch.Tensor, conditioning: Conditioning, config: Tuning, model: LatentDiffusion) -> None:
    if not len(latents):
        raise ValueError("the fine-tuning set is empty; select at least one image (set.k, pool.n_prompts)")
    if len(conditioning) != len(latents):
        raise ValueError(f"{len(latents)} latents and {len(conditioning)} captions; give each image its own")
    if ("input_ids" in conditioning.tensors) != config.text_encoder:
        raise ValueError(f"finetune.text_encoder is {config.text_encoder}; read the captions with read_captions, by the same configuration")
    if config.adapter not in ADAPTERS:
        raise ValueError(f"finetune.adapter is {config.adapter!r}; choose {' or '.join(ADAPTERS)}")
    if not config.learning_rate > 0:
        raise ValueError(f"finetune.learning_rate is {config.learning_rate}; it must be above 0")
    low, high, n = config.timesteps.low, config.timesteps.high, len(model.alphas_cumprod)
    if not 0 <= low < high <= n:
        raise ValueError(f"finetune.timesteps {low}..{high} must satisfy 0 <= low < high <= {n}")
