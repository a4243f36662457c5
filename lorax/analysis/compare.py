"""Methods side by side: each at its own best learning rate."""

import pandas as pd

from lorax.analysis.runs import Axes


def methods(
    table: pd.DataFrame, settings: pd.DataFrame, by: Axes, ranks: pd.DataFrame
) -> pd.DataFrame:
    """A row a method, best first: what its best setting reached, and at what cost.

    Args:
      table: a row a member, of `runs.summary`.
      settings: of `runs.settings`, with the method as its main axis.
      by: the sweep's axes.
      ranks: of `updates.spectra`; empty where no member has an update of weights.

    Returns method, trainable_params, the other axes' best values, mean and se of the final eval
    loss (nats), n, diverged, optimizer_bytes and step_ms (a member's), effective (rank of dW, mean
    over its matrices; NaN where there is none). Diverged settings have no mean and are left out.
    """
    reached = settings.dropna(subset=["mean"])
    best = reached.loc[reached.groupby("method")["mean"].idxmin()]
    rows = []
    for _, setting in best.sort_values("mean").iterrows():
        same = table["method"] == setting["method"]
        for name in by.others:
            same &= table[name] == setting[name]
        members = table[same]
        of_members = ranks[ranks["member"].isin(members.index)] if len(ranks) else ranks
        rows.append(
            {
                "method": setting["method"],
                "trainable_params": setting["trainable_params"],
                **{name: setting[name] for name in by.others},
                **{name: setting[name] for name in ("mean", "se", "n", "diverged")},
                "optimizer_bytes": members["optimizer_bytes"].iloc[0],
                "step_ms": members["step_ms"].mean(),
                "effective": of_members["effective"].mean() if len(of_members) else float("nan"),
            }
        )
    return pd.DataFrame(rows)
