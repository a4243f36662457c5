"""Means of matrices' numbers over layers, with intervals.

The matrices of one layer, and of one layer in several members, are not independent: a layer counts
once, as its mean over members and matrices.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorax.analysis import compare


def over_layers(
    table: pd.DataFrame, by: Sequence[str], columns: Sequence[str], level: float = compare.LEVEL
) -> pd.DataFrame:
    """One row per group: its values of `by`, the means of the columns over layers, and for each
    "<column>_half", half the width of the mean's t interval over layers; NaN for one layer.

    table: one row per member and matrix, with a column `layer`. Infinite numbers and NaN are left
    out.
    """
    by, columns = list(by), list(columns)
    finite = table[columns].replace([np.inf, -np.inf], np.nan)
    layers = table[[*by, "layer"]].join(finite).groupby([*by, "layer"], sort=True, dropna=False)
    groups = layers[columns].mean().groupby(level=list(range(len(by))), sort=True, dropna=False)
    half = compare.half_width(groups.sem(), groups.count(), level).add_suffix("_half")
    return groups.mean().join(half).reset_index()
