"""Methods and runs side by side: each at its own best setting."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lorax.analysis import compare, runs
from lorax.analysis.runs import Axes

# x axes of the loss curves that compare runs
CURVES = ("rank", "alpha", "lr", "trainable_params")
# Fields whose values get separate lines: other methods, other networks, other tasks.
UNLIKE = ("method", "base", "n_train", "shuffle", "planted_rank", "noise", "inputs")


def methods(
    table: pd.DataFrame, settings: pd.DataFrame, by: Axes, ranks: pd.DataFrame
) -> pd.DataFrame:
    """One row per method, best first: the result and the cost of its best setting.

    Args:
      table: one row per member, from `runs.summary`.
      settings: from `runs.settings`, with the method as its main axis.
      by: the sweep's axes.
      ranks: from `tables.spectra`; empty if no member has a weight update.

    Returns method, trainable_params, the other axes' best values, mean and se of the final loss
    (nats; `on_test`), n, diverged, optimizer_bytes and step_ms (a member's), effective (rank of dW,
    mean over its matrices; NaN if there is none). Settings with a diverged seed are left out, and
    so are methods that have no other.
    """
    if "optimizer_bytes" not in table:  # an older run
        table = table.assign(optimizer_bytes=None)
    rows = []
    best = on_test(best_of_methods(settings).sort_values("mean"), table, by)
    for _, setting in best.iterrows():
        members = table[of_setting(table, setting, by)]
        of_members = ranks[ranks["member"].isin(members.index)] if len(ranks) else ranks
        rows.append(
            {
                "method": setting["method"],
                "trainable_params": setting["trainable_params"],
                **{name: setting[name] for name in (*by.others, *by.tuned)},
                **{name: setting[name] for name in ("mean", "se", "n", "diverged")},
                "optimizer_bytes": members["optimizer_bytes"].iloc[0],
                "step_ms": members["step_ms"].mean(),
                "effective": of_members["effective"].mean() if len(of_members) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def best_of_methods(settings: pd.DataFrame) -> pd.DataFrame:
    """The row of each method's lowest mean among those that are eligible (`runs.eligible`).
    settings: as in `methods`."""
    reached = runs.eligible(settings)
    return reached.loc[reached.groupby("method")["mean"].idxmin()]


def on_test(chosen: pd.DataFrame, table: pd.DataFrame, by: Axes) -> pd.DataFrame:
    """The chosen settings with mean, se and n on the test rows, if the run has any: they were
    chosen on the validation rows, whose lowest loss is too low.

    Args:
      chosen: rows of `runs.settings`.
      table: from `runs.summary`.
      by: the axes of the settings.
    """
    loss = runs.measured(table).loss
    if loss == "final_loss":
        return chosen
    found = [table.loc[of_setting(table, row, by), loss] for _, row in chosen.iterrows()]
    numbers = {"mean": [x.mean() for x in found], "se": [x.sem() for x in found]}
    return chosen.assign(**numbers, n=[x.count() for x in found])


def of_setting(table: pd.DataFrame, setting: pd.Series, by: Axes) -> pd.Series:
    """Which members (rows of `runs.summary`) have the setting, a row of `runs.settings`, at its
    best value of what was tuned: (members,) bool."""
    return runs.alike(table, setting, (by.main or "rank", *by.others, *by.tuned))


def curve(table: pd.DataFrame, by: Axes, x: str) -> pd.DataFrame:
    """The loss against one field of a run's members, with all other fields at their best.

    One row per value and part: part, x, mean and se of the final loss (`on_test`) over n seeds, and
    `line`, the best values of the other fields. Settings with a diverged seed are left out. Parts
    get separate lines: their members differ in a field of `UNLIKE`.

    Args:
      table: from `runs.summary`.
      by: the run's own axes.
      x: a numeric column. No rows if the members have no values. For trainable_params, a budget
        that need not be used up, only rows that are better than all with fewer parameters.
    """
    if x not in table or not pd.to_numeric(table[x], errors="coerce").notna().any():
        return pd.DataFrame(columns=["part", "x", "mean", "se", "n", "line"])
    axes = [name for name in by.names if name != x]
    tuned = tuple(name for name in by.tuned if name != x)
    separate, others = ([n for n in axes if (n in UNLIKE) == unlike] for unlike in (True, False))
    whole = runs.eligible(runs.settings(table, Axes(x, tuple(axes), tuned)))
    reached = whole.dropna(subset=[x]).copy()
    for name, names in (("part", separate), ("line", others)):
        reached[name] = [runs.fields(row, names) for _, row in reached.iterrows()]
    best = reached.loc[reached.groupby(["part", x], sort=False)["mean"].idxmin()]
    best = on_test(best, table, Axes(x, tuple(axes), tuned))
    best = best.rename(columns={x: "x"})[["part", "x", "mean", "se", "n", "line"]]
    best = best.sort_values(["part", "x"])
    if x != "trainable_params":
        return best
    return best[best["mean"] <= best.groupby("part")["mean"].cummin()]


def with_interval(settings: pd.DataFrame, level: float = compare.LEVEL) -> pd.DataFrame:
    """The table with low and high, the t interval of `mean` over n seeds, of which `se` is the
    standard error; NaN for one seed. settings: with columns mean, se and n."""
    half = compare.half_width(settings["se"], settings["n"], level)
    return settings.assign(low=settings["mean"] - half, high=settings["mean"] + half)


def differences(configs: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """How configs differ: one row per key ("method.alpha"), one column per config, values as JSON;
    "" if a config lacks the key."""
    flat = {name: _flat(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [{"key": key, **{n: values.get(key, "") for n, values in flat.items()}} for key in keys]
    different = [row for row in rows if len({row[name] for name in flat}) > 1]
    return pd.DataFrame(different, columns=["key", *flat])


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(config, dict) and config:
        parts = (_flat(value, f"{prefix}.{key}".strip(".")) for key, value in config.items())
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: json.dumps(config)}
