"""Which members, layers and targets a figure or table shows, and the words that say so."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax.analysis import runs


def label(rows: pd.DataFrame, shown: pd.DataFrame, main: str) -> pd.DataFrame:
    """The rows of the shown members, with their value of `main` as a column."""
    shown_rows = rows[rows["member"].isin(shown.index)].drop(columns=[main], errors="ignore")
    labelled = shown_rows.merge(shown[["member", main]], on="member")
    if labelled[main].isna().any():
        labelled[main] = [
            runs.in_words(value, main) if runs.is_missing(value) else value
            for value in labelled[main].astype(object)
        ]
    return labelled


def unchanged(ranks: pd.DataFrame) -> str:
    """Which members' matrices have no update, in a sentence; "" if all have one.

    ranks: one row per member and matrix, with norm = ||dW||_F.
    """
    unchanged_rows = ranks[ranks["norm"] == 0]
    if not len(unchanged_rows):
        return ""
    if len(unchanged_rows) == len(ranks):
        return f"No update: ΔW = 0 in all {len(ranks)} matrices."
    counts = unchanged_rows.groupby("member", sort=False).size()
    totals = ranks.groupby("member", sort=False).size()
    listed = "; ".join(
        f"{n} of {totals[member]} of member {member}" for member, n in counts.items()
    )
    return f"No update: ΔW = 0 in {len(unchanged_rows)} of {len(ranks)} matrices ({listed})."


def unmeasured(missing: Mapping[tuple, str], count: int) -> str:
    """How many of `count` matrices a statistic has no number for, and why, in a sentence.

    missing: {(member, path): reason}.
    """
    reasons: dict[str, list] = {}
    for key, why in missing.items():
        reasons.setdefault(why, []).append(key)
    parts = []
    for why, keys in list(reasons.items())[:3]:
        member, path = keys[0]
        others = f" and {len(keys) - 1} more" * (len(keys) > 1)
        parts.append(f"{path} of member {member}{others}: {why}")
    rest = f"; and {len(reasons) - 3} other reasons" * (len(reasons) > 3)
    return f"No number for {len(missing)} of {count} matrices. {'; '.join(parts)}{rest}."


def pages(values: Sequence, size: int) -> list[list]:
    """The values in lists of at most `size`, as many in each as possible."""
    count = -(-len(values) // size)
    ends = [round(n * len(values) / count) for n in range(count + 1)] if count else [0]
    return [list(values[start:end]) for start, end in itertools.pairwise(ends)]


def layers_in_words(layers: Sequence[int]) -> str:
    """ "layers 0 to 3", "layer 2": consecutive layers, for the title of a page; with "what is
    outside all layers" if -1 is among them."""
    inside = sorted({layer for layer in layers if layer >= 0})
    words = f"layers {inside[0]} to {inside[-1]}" if len(inside) > 1 else ""
    words = f"layer {inside[0]}" if len(inside) == 1 else words
    outside = "what is outside all layers" if min(layers) < 0 else ""
    return " and ".join(filter(None, [words, outside]))


def spread(values: Sequence, most: int) -> list:
    """At most `most` of the values: evenly spaced, including both ends; the middle one for 1."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[len(values) // 2]]
    return [values[round(x)] for x in np.linspace(0, len(values) - 1, most)]
