"""Fine-tuning of the denoiser, alone or with its text encoder, on a selected set: a DoRA (or LoRA) adapter by PEFT, trained through accelerate.

Table 8 of the paper gives the values: rank 32, alpha 32, AdamW, constant learning rate, gradients clipped to norm 1, t ~ U(500, 1000).
Latents and conditioning lie in memory; step i draws its images, timesteps and noise from generators seeded by (seed, i) alone, so an
interrupted run that resumes ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from mitune.denoisers import Conditioning
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
    seed: int, folder_checkpoints: Path, micro_batch_size: int | None = None, progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train an adapter on the denoiser, and on the text encoder if `config.text_encoder`, to predict `latents` (N, C, H, W) from their captions (N).

    loss = mean over the batch and the latent entries of (target(z_0, noise, t) - predict(z_t, t, caption))^2,
    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, t uniform on low..high-1; no caption is dropped. Only the adapter is trained, and it
    stays attached: `model.save_adapter(folder)` writes it, `remove_adapter(model)` takes it off. After every `checkpoint_every` steps the
    adapter and the optimizer are written to `folder_checkpoints`, under a name that only the same data, settings and weights find again.

    Args:
        latents: scaled as the network sees them.
        conditioning: of the captions, by `read_captions`.
        micro_batch_size: images in one pass of one process, a divisor of its share of the batch; gradients are accumulated. The noise does not depend on it.
        progress: called with the number of steps done since its last call, as tqdm's `update`.

    Returns:
        One row a step: step (from 1), loss, grad_norm (before clipping).

    Raises:
        ValueError: an empty set, captions that do not fit it, an impossible setting, an adapter that is attached already, a loss that is not finite.
    """
    _check(latents, conditioning, config, model)
    accelerator = Accelerator(cpu=torch.device(model.device).type == "cpu", mixed_precision="no")
    parts = _parts(config.batch_size, micro_batch_size, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = parts
    file = Path(folder_checkpoints) / f"{_fingerprint(model, latents, conditioning, config, seed, parts)}.pt"
    add_adapter(model, config, seed=seed)
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=tuple(config.betas), eps=config.epsilon, weight_decay=config.weight_decay)
    rows = _restore(file, trained, optimizer)
    objective, optimizer = accelerator.prepare(_Objective(model), optimizer)
    if progress and rows:
        progress(len(rows))
    objective.train()
    with merged_forward(*model.adapted.values()):
        for step in range(len(rows), config.steps):
            batch = step_batch(latents, config, seed=seed, step=step)
            loss, grad_norm = _step(accelerator, objective, optimizer, batch, conditioning, parts=parts, max_grad_norm=config.max_grad_norm)
            if not loss < float("inf"):
                raise ValueError(f"the loss is {loss} at step {step + 1}; lower finetune.learning_rate or use float32")
            rows.append({"step": step + 1, "loss": loss, "grad_norm": grad_norm})
            if accelerator.is_main_process and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
                _write(file, trained, optimizer, rows)
            if progress:
                progress(1)
    objective.eval()
    accelerator.free_memory()
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


def trained_parameters(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """The attached adapter's parameters by the names of their network and place."""
    networks = model.adapted.items()
    return {f"{part}.{name}": parameter for part, network in networks for name, parameter in network.named_parameters() if parameter.requires_grad}


def remove_adapter(model: LatentDiffusion) -> None:
    """Take the adapter off; the base weights were never changed."""
    if not model.adapted:
        raise ValueError("the model carries no adapter to remove")
    model.pipeline.unload_lora_weights()


@contextlib.contextmanager
def merged_forward(*networks: nn.Module) -> Iterator[None]:
    """Within the context adapted layers multiply by `merged_weight` once, instead of by W, A and B in turn: the same function and gradients,
    in 0.6 of PEFT's time for a step of a small network."""
    layers = [module for network in networks for module in network.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W' of an adapted linear layer (see `add_adapter`); the norm takes no gradient, as in DoRA (Liu et al. 2024, Section 4.3)."""
    weight = layer.base_layer.weight + layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    if not layer.use_dora["default"]:
        return weight
    return (layer.lora_magnitude_vector["default"].weight / weight.detach().norm(dim=1))[:, None] * weight


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


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, merged_weight(layer).to(x.dtype), layer.base_layer.bias)


class _Objective(nn.Module):
    """The loss as a module, so that accelerate can wrap it for several processes."""

    def __init__(self, model: LatentDiffusion):
        super().__init__()
        self.networks = nn.ModuleDict(model.adapted)
        self._model = model

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        noisy = self._model.add_noise(latents, noise, timesteps)
        error = self._model.predict(noisy, timesteps, conditioning).float() - self._model.target(latents, noise, timesteps).float()
        return error.square().mean()


def _step(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], conditioning: Conditioning, *,
    parts: int, max_grad_norm: float,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step over `parts` micro-batches of this process's share of the batch; its loss and its gradient's norm before clipping."""
    shares = (batch[name][accelerator.process_index :: accelerator.num_processes].chunk(parts) for name in ("rows", "latents", "noise", "timesteps"))
    losses = []
    for rows, *tensors in zip(*shares, strict=True):
        with accelerator.accumulate(objective):
            loss = objective(*(tensor.to(accelerator.device) for tensor in tensors), conditioning[rows])
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return float(accelerator.reduce(torch.stack(losses).mean(), "mean")), float(grad_norm)


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


def _fingerprint(model: LatentDiffusion, latents: torch.Tensor, conditioning: Conditioning, config: Tuning, seed: int, parts: int) -> str:
    """A name for everything that the trained weights depend on."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    digest = hashlib.sha256(repr((sorted(settings.items()), seed, parts, tuple(latents.shape))).encode())
    tensors = [latents, *(conditioning.tensors[name] for name in sorted(conditioning.tensors))]
    tensors += [weight for network in model.networks.values() for weight in network.state_dict().values()]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _parts(batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """Micro-batches that one process takes for one step."""
    share = batch_size // processes
    micro = share if micro_batch_size is None else micro_batch_size
    if batch_size % processes or micro < 1 or share % micro:
        raise ValueError(f"finetune.batch_size = {batch_size} does not split into {processes} processes x micro-batches of {micro_batch_size}; choose divisors")
    return share // micro


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
