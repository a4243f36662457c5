"""The intrinsic dimension: the smallest random subspace in which training is nearly as good.

Li et al. 2018 (arXiv:1804.08838, section 2) train theta = theta_0 + P theta_d and call d_int90 the
smallest d whose validation accuracy is 90% of the best direct baseline's; Aghajanyan et al. 2020
(arXiv:2012.13255, section 3) apply it to fine-tuning, as d90. Both tested a grid of d. Here the
curve between the tested d is made monotone and interpolated, which gives a d90 with an interval;
"the smallest tested d" is reported too.

The functions turn tables into tables. A table of points has one row per member:

    member     its number
    kind       "subspace", "full" (the baseline) or "lora"
    condition  "base=..., shuffle=True": which d90 it belongs to; "" if there is only one
    shared     the part of the condition that the baseline shares
    method, dim (NaN if there is none), lr, seed
    params     trainable parameters
    status     "finished" or "diverged"
    start      the metric before training
    value      the metric after training; `start` for a diverged member, as if it learned nothing

A lower loss is better; for any other metric, higher is better.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import compare, runs
from lorax.config import shared_axes, swept


class Crossing(NamedTuple):
    """Where a curve reaches a level. verdict: "reached", "below" (already the smallest size reaches
    it) or "not reached" (the largest does not). size: the size at which it does; NaN unless
    "reached"."""

    verdict: str
    size: float


def points(run: runs.Run) -> pd.DataFrame:
    """The table of points of a search's run directory, without members that are still running."""
    config = run.config["config"]
    metric = config["search"]["metric"]
    table = runs.summary(run)
    axes = conditions(run, table)
    shared = shared_axes(axes)
    dims = table["dim"] if "dim" in table else pd.Series(np.nan, table.index)
    kind = table["method"].where(table["method"] == "full", "lora").where(dims.isna(), "subspace")
    labels = [runs.fields(row, axes if k == "subspace" else shared)
              for k, (_, row) in zip(kind, table.iterrows(), strict=True)]  # fmt: skip
    table_of_points = pd.DataFrame(
        {
            "member": table["member"],
            "kind": kind,
            "condition": labels,
            "shared": [runs.fields(row, shared) for _, row in table.iterrows()],
            "method": table["method"],
            "dim": dims.astype(float),
            "lr": table["lr"].astype(float),
            "seed": table["seed"],
            "params": table["trainable_params"],
            "status": table["status"],
        }
    )
    if metric == "loss":
        table_of_points["start"], table_of_points["value"] = table["base_loss"], table["final_loss"]
    else:
        table_of_points["start"] = _at_start(run, metric).reindex(table.index).fillna(0.0)
        table_of_points["value"] = table[metric].astype(float) if metric in table else np.nan
    table_of_points["value"] = table_of_points["value"].fillna(table_of_points["start"])
    return table_of_points[table["status"] != "running"]


def conditions(run: runs.Run, table: pd.DataFrame) -> list[str]:
    """The axes that separate one d90 from another, among those in `table` (from `runs.summary`)."""
    axes = swept(run.config["config"]["sweep"])
    return [axis for axis in axes if axis in table and axis not in ("dim", "lr", "seed")]


def _at_start(run: runs.Run, metric: str) -> pd.Series:
    """{member: score at step 0}; text scores are not measured then."""
    if metric not in run.metrics:
        return pd.Series(dtype=float)
    first = run.metrics[(run.metrics["split"] == "eval") & (run.metrics["step"] == 0)]
    return first.groupby("member")[metric].last()


# ---------------------------------------------------------------------------------------- estimate


def needed(start: float, full: float, threshold: float, metric: str) -> float:
    """The value to reach, if full fine-tuning improves from `start` to `full`.

    For a score it is the share `threshold` of `full` (Li et al., section 2). A loss has no natural
    zero, so there it is `start` - `threshold` (`start` - `full`), the same share of the
    improvement. That is our reading, in the spirit of Li et al.'s rewards, which they shift so that
    the worst is 0.
    """
    return start - threshold * (start - full) if metric == "loss" else threshold * full


def points_of(table: pd.DataFrame, condition: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(points of a condition's subspaces, points of LoRA with the same baseline). table: of
    points."""
    subspaces = table[(table["kind"] == "subspace") & (table["condition"] == condition)]
    shared = subspaces["shared"].iloc[0]
    return subspaces, table[(table["kind"] == "lora") & (table["shared"] == shared)]


def rates(rows: pd.DataFrame, metric: str) -> list[float]:
    """The learning rates of points of one size, best first: rates with the most seeds come before
    the others, which one lucky seed might favour; then by the mean over seeds."""
    by = rows.groupby("lr")["value"].agg(["mean", "size"]).reset_index()
    by["mean"] *= _sign(metric)
    return by.sort_values(["size", "mean", "lr"], ascending=[False, False, True])["lr"].tolist()


def tuned(rows: pd.DataFrame, by: str, metric: str) -> pd.DataFrame:
    """The points at the best learning rate of each size. by: "dim" or "params"."""
    best = {size: rates(group, metric)[0] for size, group in rows.groupby(by)}
    return rows[rows["lr"] == rows[by].map(best)].sort_values([by, "seed"])


def crossing(sizes, values, level: float, metric: str) -> Crossing:
    """Where values (n,) at ascending sizes (n,) reach a level.

    The values are made monotone in size by isotonic regression, since a larger subspace can do no
    worse, and interpolated linearly in log(size).
    """
    from sklearn.isotonic import IsotonicRegression  # a run need not wait for it

    x, sign = np.log(np.asarray(sizes, float)), _sign(metric)
    y = IsotonicRegression().fit_transform(x, sign * np.asarray(values, float))
    reached = np.flatnonzero(y >= sign * level)
    if not len(reached):
        return Crossing("not reached", np.nan)
    i = reached[0]
    if i == 0:
        return Crossing("below", np.nan)
    t = (sign * level - y[i - 1]) / (y[i] - y[i - 1])
    return Crossing("reached", float(np.exp(x[i - 1] + t * (x[i] - x[i - 1]))))


def interval(sizes, moved: float = 0.0, seeds: int = 0) -> tuple[float, float, float]:
    """Geometric mean of sizes (n,) with its 95% confidence interval on log(size). The interval is
    NaN for n = 1.

    moved: the standard error of log(size) that comes from the level, whose own estimate is from
    `seeds` seeds; NaN (not known) gives no interval. The two parts of the variance have n - 1 and
    seeds - 1 degrees of freedom (`compare.quantile`); without the second it is Student's t.
    """
    logs = np.log(np.asarray(sizes, float))
    n, mean, half = len(logs), logs.mean(), np.nan
    if n > 1:
        parts = logs.var(ddof=1) / n, moved**2
        share = parts[0] / sum(parts) if sum(parts) > 0 else 1.0
        half = float(compare.quantile(0.025, share, n, seeds or n)) * np.sqrt(sum(parts))
    return tuple(float(np.exp(x)) for x in (mean, mean - half, mean + half))


def _moved(means: pd.Series, level: float, error: float, metric: str) -> float:
    """By how much log(size) of the crossing moves if the level moves by its standard error, mean of
    both directions (of one, if the other is outside the curve); NaN if it isn't known."""
    if error == 0:
        return 0.0
    middle, *ends = (
        np.log(crossing(means.index, means, level + d, metric).size) for d in (0, -error, error)
    )
    moves = [abs(end - middle) for end in ends if np.isfinite(end)]
    return float(np.mean(moves)) if moves else np.nan


def crossings(
    rows: pd.DataFrame, by: str, level: float, metric: str, error: float = 0.0, seeds: int = 0
) -> dict[str, Any]:
    """The size that reaches a level, estimated from points at their best learning rates.

    error: the level's standard error, from `seeds` seeds of the baseline: it is part of the
    interval. NaN (one seed) gives no interval.

    If every seed's curve crosses the level, the estimate is the geometric mean of the crossings. If
    only some do, it is where the curve of the means crosses, without an interval, and the verdict
    is "partly reached". Returns verdict, size, low and high (95%; NaN for one seed), n (how many
    seeds cross), seeds (how many there are), by_seed (in words), smallest (smallest tested size
    whose mean reaches the level, the published definition; NaN if none does), tested_min,
    tested_max.
    """
    means = rows.groupby(by)["value"].mean()
    passing = means.index[reaches(means, level, metric)]
    of_means = crossing(means.index, means, level, metric)
    by_seed = {
        seed: crossing(rows_of_seed[by], rows_of_seed["value"], level, metric)
        for seed, rows_of_seed in rows.groupby("seed")
    }
    crossed = [c.size for c in by_seed.values() if c.verdict == "reached"]
    verdict, size, low, high = of_means.verdict, of_means.size, np.nan, np.nan
    if len(crossed) == len(by_seed):
        moved = _moved(means, level, error, metric)
        verdict, (size, low, high) = "reached", interval(crossed, moved, seeds)
    elif verdict == "reached":
        verdict = "partly reached"
    words = lambda c: f"{c.size:.4g}" if c.verdict == "reached" else c.verdict
    return {
        "verdict": verdict,
        "size": size,
        "low": low,
        "high": high,
        "n": len(crossed),
        "seeds": len(by_seed),
        "by_seed": "; ".join(f"seed {seed}: {words(c)}" for seed, c in by_seed.items()),
        "smallest": passing.min() if len(passing) else np.nan,
        "tested_min": means.index.min(),
        "tested_max": means.index.max(),
    }


def baseline(table: pd.DataFrame, shared: str, metric: str) -> dict[str, float]:
    """The result of full fine-tuning: start, baseline (best over learning rates of the mean over
    seeds), its standard error baseline_se (NaN for one seed), its baseline_lr, baseline_n (seeds),
    full_params. NaN if there is none."""
    full = table[(table["kind"] == "full") & (table["shared"] == shared)]
    names = ("start", "baseline", "baseline_se", "baseline_lr", "baseline_n", "full_params")
    if full.empty:
        return dict.fromkeys(names, np.nan)
    best = tuned(full, "params", metric)
    row, error = best.iloc[0], best["value"].sem(ddof=1)
    values = best["start"].mean(), best["value"].mean(), error, row["lr"], len(best), row["params"]
    return dict(zip(names, values, strict=True))


def gain(reference: dict[str, float], metric: str) -> float:
    """How much better full fine-tuning is than no training. reference: from `baseline`."""
    return _sign(metric) * (reference["baseline"] - reference["start"])


def reaches(values, level: float, metric: str):
    """Whether values (an array or a column) are at least as good as `level`."""
    return _sign(metric) * values >= _sign(metric) * level


def estimate(table: pd.DataFrame, threshold: float, metric: str) -> pd.DataFrame:
    """The intrinsic dimension of every condition, one row each.

    table: of points. Columns: condition, method, metric, threshold; those of `baseline`; needed;
    those of `crossings` over dim, with `size` called d; full_over_d = full_params / d; and the
    trainable parameters with which LoRA reaches the same: lora_params, lora_low, lora_high,
    lora_verdict ("" if LoRA was not run). The verdict is "no baseline" if full fine-tuning is
    missing or no better than no training.
    """
    rows = []
    for condition in table.loc[table["kind"] == "subspace", "condition"].unique():
        of_condition, lora = points_of(table, condition)
        shared = of_condition["shared"].iloc[0]
        reference = baseline(table, shared, metric)
        level = needed(reference["start"], reference["baseline"], threshold, metric)
        # The base is one model; full fine-tuning varies between seeds.
        error = threshold * reference["baseline_se"], reference["baseline_n"]
        crossed = crossings(tuned(of_condition, "dim", metric), "dim", level, metric, *error)
        improves = gain(reference, metric) > 0
        if not improves:
            crossed |= dict.fromkeys(("size", "low", "high", "smallest"), np.nan)
            crossed |= {"verdict": "no baseline", "n": 0, "by_seed": ""}
        lora_crossed = {"verdict": "", "size": np.nan, "low": np.nan, "high": np.nan}
        if len(lora) and improves:
            of_lora = tuned(lora, "params", metric)
            lora_crossed = crossings(of_lora, "params", level, metric, *error)
        d = crossed.pop("size")
        rows.append(
            {
                "condition": condition,
                "method": of_condition["method"].iloc[0],
                "metric": metric,
                "threshold": threshold,
                **reference,
                "needed": level,
                "d": d,
                **crossed,
                "full_over_d": reference["full_params"] / d,
                "lora_params": lora_crossed["size"],
                "lora_low": lora_crossed["low"],
                "lora_high": lora_crossed["high"],
                "lora_verdict": lora_crossed["verdict"],
            }
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- words


def name(threshold: float) -> str:
    """ "d90" for 0.9."""
    return f"d{100 * threshold:g}"


def brief(row: pd.Series) -> str:
    """ "d90 = 612", "d90 > 1,000"... row: from `estimate`."""
    called = name(row["threshold"])
    return {
        "reached": f"{called} = {count(row['d'])}",
        "partly reached": f"{called} ≈ {count(row['d'])}",
        "below": f"{called} ≤ {count(row['tested_min'])}",
        "not reached": f"{called} > {count(row['tested_max'])}",
        "no baseline": f"{called} unknown",
    }[row["verdict"]]


def headline(row: pd.Series) -> str:
    """One sentence on a condition. row: from `estimate`."""
    of_all = f"of D = {count(row['full_params'])}"
    share = f"{of_all}: {100 / row['full_over_d']:.2g}% of the parameters"
    spread = f"95% CI {count(row['low'])} to {count(row['high'])}, {row['n']} seeds"
    if row["low"] != row["low"]:
        which = "" if row["n"] == 1 else " of full fine-tuning"
        spread = f"one seed{which}, so no interval"
    partly = f"where the mean's curve crosses; {row['n']} of {row['seeds']} seeds do, no interval"
    return (
        f"{brief(row)}"
        + {
            "reached": f" ({spread}) {share}.",
            "partly reached": f" ({partly}) {share}.",
            "below": f" {of_all}: the smallest d tested reaches it.",
            "not reached": f" {of_all}: no curve over the d tested reaches it.",
            "no baseline": ": full fine-tuning is missing or no better than no training.",
        }[row["verdict"]]
    )


def shown(row: pd.Series) -> dict[str, str]:
    """The cells of a condition in a table, by heading. row: from `estimate`."""
    called, known = name(row["threshold"]), row["verdict"] != "no baseline"
    seeds = f" ({row['n']} of {row['seeds']} seeds)" if row["seeds"] > 1 else " (one seed)"
    both = f"{count(row['low'])} to {count(row['high'])}" if row["low"] == row["low"] else "–"
    lora = count(row["lora_params"])
    return {
        "condition": row["condition"] or row["method"],
        f"{row['metric']} of full fine-tuning": f"{row['baseline']:.4f}" if known else "–",
        "needed": f"{row['needed']:.4f}" if known else "–",
        called: brief(row).removeprefix(called).removeprefix(" = ").strip(),
        "95% interval": both,
        "smallest d tested": count(row["smallest"]),
        "verdict": row["verdict"] + seeds * row["verdict"].endswith("reached") * (row["n"] > 0),
        "D": count(row["full_params"]),
        f"D/{called}": count(row["full_over_d"]),
        "LoRA parameters": (row["lora_verdict"] or "–") if lora == "–" else lora,
    }


def count(size: float) -> str:
    """A number of dimensions: "1,234", "3.27", "–" for NaN."""
    if size != size:
        return "–"
    return f"{size:,.0f}" if size >= 100 or size == round(size) else f"{size:.3g}"


def _sign(metric: str) -> int:
    return -1 if metric == "loss" else 1
