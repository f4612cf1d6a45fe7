"""Algorithm 1's choice: of the M candidates of each prompt, the k that enter the fine-tuning set."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

COLUMNS = ["prompt_id", "image", "why"]


def select(table: pd.DataFrame, score_column: str, k: int) -> pd.DataFrame:
    """The k images of each prompt with the highest score; of equals the lower image index comes first.

    Args:
        table: one category and split, a row an image, with prompt_id, image and `score_column`; in any order.

    Returns:
        Rows (prompt_id, image, why), best first within a prompt.

    Raises:
        ValueError: an unknown column, a score that is not finite, an image listed twice, k < 1, or k above a prompt's M.
    """
    sizes = _sizes(table, score_column, k)
    ordered = table.sort_values(["prompt_id", score_column, "image"], ascending=[True, False, True], kind="stable")
    rank = ordered.groupby("prompt_id").cumcount() + 1
    chosen, rank = ordered[rank <= k], rank[rank <= k]
    why = [f"{score_column} {score:.6g}, rank {r} of {sizes[p]}" for score, r, p in zip(chosen[score_column], rank, chosen["prompt_id"], strict=True)]
    return chosen.assign(why=why)[COLUMNS].reset_index(drop=True)


def select_random(table: pd.DataFrame, k: int, seed: int, draw: int) -> pd.DataFrame:
    """k images of each prompt at random, in the form of `select`: the control.

    Each image gets a uniform number from (seed, draw, prompt, image) alone, so a choice depends neither on the other prompts
    nor on the table's order, and a larger pool changes it only where a new image wins.
    """
    prompts = table["prompt"] if "prompt" in table else table["prompt_id"]
    numbers = [_uniform(seed, draw, prompt, image) for prompt, image in zip(prompts, table["image"], strict=True)]
    chosen = select(table.assign(uniform=numbers), "uniform", k)
    return chosen.assign(why=f"random, seed {seed}, draw {draw}")


def successive_halving(values: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """The k best of M candidates by the sum of their R contributions, the worse half rejected early (Karnin et al. 2013).

    Round i of L = ceil(log2(M / k)) sums the first R (2^(i+1) - 1) / (2^L - 1) contributions, rounded, at least one, of the candidates
    that are left, and keeps the better half, or k; the last round sums all R.

    Args:
        values: (M, R), each candidate's contributions in the order in which they would be computed.

    Returns:
        The kept candidates (k,), best first, of equals the lower index, and how many contributions were needed (M R without rejection).

    Raises:
        ValueError: k outside 1..M.
    """
    if not 1 <= k <= len(values):
        raise ValueError(f"k = {k} must lie in 1..M, and there are M = {len(values)} candidates")
    alive, seen, needed, rounds = np.arange(len(values)), 0, 0, max((len(values) - 1) // k, 0).bit_length()
    for i in range(max(rounds, 1)):
        upto = values.shape[1] if i >= rounds - 1 else max(round(values.shape[1] * (2 ** (i + 1) - 1) / (2**rounds - 1)), 1)
        needed += len(alive) * (upto - seen)
        order = alive[np.argsort(-values[alive, :upto].sum(1), kind="stable")]
        alive, seen = np.sort(order[: k if i >= rounds - 1 else max(-(-len(alive) // 2), k)]), upto
    return alive[np.argsort(-values[alive].sum(1), kind="stable")], needed


def _sizes(table: pd.DataFrame, score_column: str, k: int) -> pd.Series:
    """M of each prompt, once the table and k are known to be sound."""
    missing = [name for name in ("prompt_id", "image", score_column) if name not in table]
    if missing:
        raise ValueError(f"the score table has no column {missing[0]!r}; it has {sorted(table.columns)}")
    if table.duplicated(["prompt_id", "image"]).any():
        raise ValueError("the score table lists an image of a prompt twice; pass one category and split at a time")
    bad = int((~np.isfinite(table[score_column])).sum())
    if bad:
        raise ValueError(f"{bad} values of {score_column!r} are not finite; recompute the scores before selecting")
    sizes = table.groupby("prompt_id").size()
    if k < 1 or (len(sizes) and k > sizes.min()):
        raise ValueError(f"k = {k} must lie in 1..M, and the smallest pool has M = {sizes.min() if len(sizes) else 0} images; lower set.k or raise pool.M")
    return sizes


def _uniform(seed: int, draw: int, prompt: object, image: int) -> float:
    """A number in [0, 1) from the SHA-256 of its arguments."""
    digest = hashlib.sha256(f"{seed}\n{draw}\n{prompt}\n{int(image)}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
