"""Stage `sets`: which images of the training pool each arm keeps (Algorithm 1); references into the pool, never copies."""

from __future__ import annotations

import pandas as pd

from mitune.artifacts import Results, read_table, write_table
from mitune.selection import select, select_random


def build(params, category: str) -> pd.DataFrame:
    """Write `sets/{category}.parquet`: arms `random` (several draws), `mi_paper`, `mi_best` and `judge`, the ceiling."""
    results, chosen = Results(params.model), params.set
    scores = read_table(results.scores(category), "scores").query("split == 'train'")
    columns = {"mi_paper": chosen.paper, "mi_best": chosen.best, "judge": "judge"}
    picks = {("random", draw): select_random(scores, chosen.k, params.seed, draw) for draw in range(chosen.random_draws)}
    picks |= {(arm, 0): select(scores, column, chosen.k) for arm, column in columns.items()}
    table = pd.concat([rows.assign(arm=arm, draw=draw) for (arm, draw), rows in picks.items()], ignore_index=True)
    table["prompt"] = table["prompt_id"].map(scores.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"])
    table["category"] = category
    write_table(table, results.sets(category), "sets")
    return table
