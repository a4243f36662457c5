"""Means of matrices' numbers over layers, with intervals.

The matrices of one layer, and of one layer in several members, are not independent: a layer counts
once, as its mean over members and matrices.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95  # of the intervals


def over_layers(
    table: pd.DataFrame, by: Sequence[str], columns: Sequence[str], level: float = LEVEL
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
    mean, sd, n = groups.mean(), groups.std(), groups.count()
    t = stats.t.ppf(0.5 + level / 2, np.maximum(n - 1, 1))
    half = (t * sd / np.sqrt(n.where(n > 0))).add_suffix("_half")
    return mean.join(half).reset_index()
