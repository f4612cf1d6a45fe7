"""Point-wise mutual information by a rectified flow, in nats, from differences of its conditional and unconditional velocities.

A rectified flow z_t = (1 - t) z_0 + t noise predicts v = E[noise - z_0 | z_t], so that eps_c - eps_u = (1 - t) (v_c - v_u), and
SNR = ((1 - t) / t)^2, d log SNR = -2 dt / (t (1 - t)). Put into I-MMSE (Guo et al. 2005), which is Eq. 2 in continuous time:

    1/2 int E ||eps_c - eps_u||^2 d log SNR = int (1 - t) / t E ||v_c - v_u||^2 dt,

over t from `low` to `high` the MI of z_low less that of z_high. Three terms have this weight (1 - t) / t; by form:

| form | term | mean |
|---|---|---|
| orthogonal | ||v_c - v_u||^2 | the MI, of each prompt by itself |
| standard | ||v - v_u||^2 - ||v - v_c||^2, v = noise - z_0 | likewise |
| inner_product | v_c . (v_c - v_u) (RFMI, Wang et al. 2025, in their code) | the MI, over all prompts: the mean of v_c over them given z_t is v_u |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mitune.denoisers import Conditioning, Flow, flow_signal_and_noise
from mitune.information import Estimate, average, both, must_fit, of_copies, of_rows, orthogonal_terms, standard_terms, summed


def flow_weight(times: torch.Tensor) -> torch.Tensor:
    """(1 - t) / t, (S,) float64, of a rectified flow: half of -d log SNR / dt, times (1 - t)^2 from eps to v.

    Raises:
        ValueError: times outside 0..1, or 0 itself, where the weight has no bound.
    """
    t = torch.as_tensor(times).double()
    if t.numel() and not 0 < float(t.min()) <= float(t.max()) <= 1:
        raise ValueError(f"times {float(t.min()):g}..{float(t.max()):g} must lie above 0, and at most at 1")
    return (1 - t) / t


def inner_product_terms(v_cond: torch.Tensor, v_null: torch.Tensor) -> torch.Tensor:
    """v_c . (v_c - v_u), (B,), of RFMI (Wang et al. 2025, in their code of the guided velocity): ||v_c - v_u||^2 + v_u . (v_c - v_u); signed.

    The second part depends on where the latents have their origin.
    """
    v_cond, v_null = v_cond.float(), v_null.float()
    return summed(v_cond * (v_cond - v_null))


def guided_inner_product(inner_product, orthogonal, guidance_scale: float):
    """v_w . (v_w - v_u) with v_w = v_u + w (v_c - v_u), as RFMI's code takes it: w inner_product + (w^2 - w) orthogonal, of terms or of estimates.

    Its mean is w^2 times the MI.
    """
    return guidance_scale * inner_product + (guidance_scale**2 - guidance_scale) * orthogonal


def flow_times(count: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Times (count,) at the middles of `count` equal parts of low..high, float64."""
    return low + (torch.arange(count).double() + 0.5) * (high - low) / count


@torch.inference_mode()
def flow_terms(
    flow: Flow, latents: torch.Tensor, conditioning: Conditioning, null: Conditioning, *,
    times: torch.Tensor, noise: torch.Tensor | Callable[[int], torch.Tensor], batch_size: int = 256, progress: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Terms of given images z_0 (N, C, H, W) at z_t = (1 - t) z_0 + t noise, without the weight; arguments as of `renoised_terms`, `times` (R,) in 0..1.

    Returns:
        {"orthogonal": (N, R), "standard": (N, R), "inner_product": (N, R)}, float32, on the CPU.
    """

    def terms(rows, z_0, t, n):
        signal, sigma = flow_signal_and_noise(t, n)
        v_cond, v_null = both(flow.velocity, signal * z_0 + sigma * n, t, conditioning[rows], of_rows(null, rows))
        forms = {"orthogonal": orthogonal_terms(v_cond, v_null), "standard": standard_terms(n - z_0, v_cond, v_null)}
        return forms | {"inner_product": inner_product_terms(v_cond, v_null)}

    must_fit(latents, conditioning, null)
    return of_copies(terms, latents, torch.as_tensor(times).float(), noise, flow.device, batch_size, progress)


def flow_estimate(terms: torch.Tensor, times: torch.Tensor, *, low: float = 0.0, high: float = 1.0) -> Estimate:
    """Point-wise MI of z_low less that of z_high, in nats, from any form's terms (..., S) at `times` (S,), evenly spaced or drawn uniformly in low..high.

    int_low^high (1 - t) / t term_t dt, by the mean over the times.

    Raises:
        ValueError: terms that do not fit the times, or times outside low..high.
    """
    times = torch.as_tensor(times).double()
    if terms.shape[-1] != len(times):
        raise ValueError(f"terms of shape {tuple(terms.shape)} do not fit {len(times)} times; the last axis must be theirs")
    if not low <= float(times.min()) <= float(times.max()) <= high:
        raise ValueError(f"times {float(times.min()):g}..{float(times.max()):g} must lie in {low:g}..{high:g}")
    return average(terms.double() * flow_weight(times) * (high - low), times)
