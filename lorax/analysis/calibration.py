"""Estimators of rank and of intrinsic dimension compared with the known truth of a planted task.

Members of a planted task (`lorax.tasks.planted`) have the truth in members.jsonl: `planted`, the
singular values of every kernel's dW*, and `planted_dim`, the codimension d* of the solutions. Each
estimator runs as on any other task, and its estimate is compared with the planted value.
"""

from typing import Any

import numpy as np
import pandas as pd

from lorax import rundir, spectrum
from lorax.analysis import runs

SHARE = 0.99  # a rank is large enough if it reaches this share of the best improvement
#: fields that identify a planted task; a curve belongs to one task and one adapter seed
TASK = ("base", "planted_rank", "spectrum", "noise", "inputs", "data_seed")
#: estimator -> its function of singular values (k,); the numerical rank also needs the shape
RANKS = {
    "effective rank": spectrum.effective_rank,
    "energy rank 0.9": lambda sigma: spectrum.energy_rank(sigma, 0.9),
    "energy rank 0.99": lambda sigma: spectrum.energy_rank(sigma, 0.99),
    "stable rank": spectrum.stable_rank,
}
#: in display order
ESTIMATORS = ("knee", *RANKS, "numerical rank", "AdaLoRA", "d90 / 0.9", "search")

CAPTION = (
    "Estimate against planted truth. Dashed: where they agree. A point is one task and seed, and "
    "one matrix for estimators of single matrices. Noise levels are drawn side by side."
)
NOTE = (
    "Relative error against the planted r* or d*. A knee is the smallest rank with 99% of the best "
    "improvement. The ranks of an update are measured at the largest trained rank and estimate r* "
    "only if the spectrum is flat. d90 is divided by 0.9, because it is 0.9 of d*. "
    "analysis/calibration.csv has every estimate."
)


# ------------------------------------------------------------------------------------- estimators


def knee(settings: pd.DataFrame, base: float, share: float = SHARE) -> int:
    """The smallest rank with at least `share` of the best improvement over the base: the smallest
    with mean <= best + (1 - share) (base - best).

    settings: one row per rank: rank, mean (its eval loss). base: the unadapted base's eval loss.
    Raises ValueError if no rank has a loss below the base's.

    Why a share of the improvement, and no test of which ranks are as good (`compare.noninferior`)?
    A test says what the seeds can show: with few seeds of a hard task it says nothing. And without
    noise all ranks from r* on reach a loss of rounding errors, which any test of differences would
    still tell apart. A share of the improvement means the same in both cases, needs only one seed,
    and fits the loss of a planted update: what rank r can't learn is the energy of the singular
    values after the r-th. So the knee is r* if the smallest singular value holds more than 1 -
    share of the energy (a flat spectrum with r* < 100), and otherwise the energy rank at `share`.
    """
    usable = settings.dropna(subset=["mean"])
    best = usable["mean"].min()
    if not best < base:
        raise ValueError(f"knee: no rank is better than the base, {base:.4g}; the best has {best}")
    enough = usable[usable["mean"] <= best + (1 - share) * (base - best)]
    return int(enough["rank"].min())


def dimension(curve: pd.DataFrame, base: float, best: float = 0.0, share: float = 0.9) -> float:
    """d_t / t, the estimate of d* from the dimension d_t that reaches the share t of the possible
    improvement; NaN if no tested dimension does.

    curve: one row per dimension: dim, mean (its eval loss). base, best: losses of the base and of
    unrestricted training. d_t is interpolated linearly between the neighbouring tested dimensions.

    Why d_t / t: let the loss be |J (theta - theta*)|^2, where the rows of J (d*, D) are orthogonal
    and of equal length, as for one planted linear layer. In a random subspace theta_0 + P z with
    Gaussian P (D, d), J P (d*, d) is Gaussian too, and for d <= d* its columns span a random
    d-dimensional subspace of R^d*. The best z removes the projection of t = J (theta* - theta_0)
    onto that subspace. For any t, |projection|^2 / |t|^2 has the distribution
    Beta(d / 2, (d* - d) / 2), with mean d / d* and variance 2 (d / d*) (1 - d / d*) / (d* + 2). So
    the share reached is proportional to d, up to 1 at d*, and d90 of Li et al. 2018
    (arXiv:1804.08838) is 0.9 d*. For one seed at t = 0.9, the standard deviation of the estimate is
    0.47 / sqrt(d* + 2) of d*.
    """
    rows = curve.dropna(subset=["mean"]).sort_values("dim")
    dims = np.concatenate([[0.0], rows["dim"].to_numpy(float)])
    reached = np.concatenate([[0.0], (base - rows["mean"].to_numpy(float)) / (base - best)])
    above = np.flatnonzero(reached >= share)
    if not len(above):
        return float("nan")
    at = slice(above[0] - 1, above[0] + 1)
    return float(np.interp(share, reached[at], dims[at])) / share


# -------------------------------------------------------------------------------- against the truth


def tasks(table: pd.DataFrame) -> pd.DataFrame:
    """The planted tasks that members were trained on, one row each. table: from `runs.summary`."""
    return table[[name for name in TASK if name in table]].astype(str).drop_duplicates()


def estimates(
    run: runs.Run, table: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame
) -> pd.DataFrame:
    """One row per estimator, task, seed and, for estimators of single kernels, kernel.

    table: from `runs.summary`. sigmas, ranks: from `tables.spectra`; empty if no member has an
    update. Columns: estimator, quantity ("rank" or "dimension"), path ("" for all kernels), truth
    (the kernel's r*, or the largest r* if path is "", or d*), estimate, error (estimate - truth),
    relative (error / truth, NaN for a truth of 0), expected (the estimator applied to the planted
    update itself; it can differ from r*, e.g. the effective rank is lower unless the spectrum is
    flat), those of `TASK`, seed, method. Empty if the run's task is not planted.
    """
    if "planted" not in run.members:
        return pd.DataFrame()
    # A rate at which a seed diverged is not a choice for the others either.
    diverged = set(table.loc[table["status"] == "diverged", "setting"])
    usable = table[table["final_loss"].notna() & ~table["setting"].isin(diverged)].copy()
    usable["mean"], usable["seed"] = usable["final_loss"], run.members["seed"]
    # planted_dim holds for training all parameters; fewer would have another d*
    if {"parameters", "dim"} <= set(usable):
        usable = usable[usable["dim"].isna() | usable["parameters"].isin([np.nan, None, "all"])]
    task = [name for name in TASK if name in usable]
    rows: list[dict[str, Any]] = []
    for keys, members in usable.groupby([*task, "method", "seed"], sort=True, dropna=False):
        shared = dict(zip([*task, "method", "seed"], keys, strict=True))
        truth = _truth(run, members.index[0])
        if shared["method"] == "adalora":
            best = members.loc[members["mean"].idxmin()]
            rows += [shared | row for row in _allocation(truth, best.name, ranks)]
        elif "dim" in members and members["dim"].notna().any():
            rows += [shared | row for row in _dimension(run, members)]
        elif members["rank"].nunique() > 1:
            rows += [shared | row for row in _ranks(truth, members, sigmas, ranks)]
    rows += _search(run, table, task)
    if not rows:
        return pd.DataFrame()
    result = pd.DataFrame(rows)
    result["error"] = result["estimate"] - result["truth"]
    result["relative"] = result["error"] / result["truth"].where(result["truth"] > 0)
    first = ["estimator", "quantity", "path", "truth", "estimate", "error", "relative", "expected"]
    order = result["estimator"].map(ESTIMATORS.index)
    result = result.assign(order=order).sort_values("order", kind="stable")
    return result[[*first, *task, "seed", "method"]].reset_index(drop=True)


def _truth(run: runs.Run, member: int) -> dict[str, np.ndarray]:
    """{layer: singular values of its dW*}, (0,) if nothing is planted."""
    return {path: np.array(s, float) for path, s in run.members.loc[member, "planted"].items()}


def _ranks(truth, members: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame) -> list[dict]:
    """The knee of one curve, and the ranks of the update at its largest rank."""
    best = members.loc[members.groupby("rank")["mean"].idxmin()]  # over learning rates etc.
    largest = max(len(sigma) for sigma in truth.values())
    expected = max(int(spectrum.energy_rank(sigma, SHARE)) for sigma in truth.values())
    base = best["base_loss"].iloc[0]
    estimate = knee(best, base) if best["mean"].min() < base else np.nan
    rows = [_row("knee", "", largest, estimate, expected)]
    last = best.loc[best["rank"].idxmax()].name
    learned = sigmas[sigmas["member"] == last] if len(sigmas) else sigmas
    for path, of_path in learned.groupby("path", sort=False) if len(learned) else ():
        if path not in truth:
            continue
        sigma, r = of_path["sigma"].to_numpy(float), len(truth[path])
        for name, statistic in RANKS.items():
            rows.append(_row(name, path, r, float(statistic(sigma)), float(statistic(truth[path]))))
        of_kernel = ranks[(ranks["member"] == last) & (ranks["path"] == path)]
        rows.append(_row("numerical rank", path, r, int(of_kernel["numerical"].iloc[0]), r))
    return rows


def _allocation(truth, member: int, ranks: pd.DataFrame) -> list[dict]:
    """How many triplets AdaLoRA kept for every kernel. Pruned triplets are zero columns in the
    exported factors, so the numerical rank counts the others."""
    of_member = ranks[ranks["member"] == member] if len(ranks) else ranks
    triplets = (
        dict(zip(of_member["path"], of_member["numerical"], strict=True)) if len(of_member) else {}
    )
    if not triplets:
        return []
    return [_row("AdaLoRA", p, len(s), int(triplets.get(p, 0)), len(s)) for p, s in truth.items()]


def _dimension(run: runs.Run, members: pd.DataFrame) -> list[dict]:
    d = run.members["planted_dim"].get(members.index[0])
    if d is None or np.isnan(d):
        return []
    best = members.loc[members.groupby("dim")["mean"].idxmin()]
    estimate = dimension(best, best["base_loss"].iloc[0])
    return [_row("d90 / 0.9", "", int(d), estimate, int(d), "dimension")]


def _search(run: runs.Run, table: pd.DataFrame, task: list[str]) -> list[dict]:
    """The d_t that the search found (analysis/intrinsic.csv), divided by its threshold t. Its
    conditions name the members' axes: "inputs=9, noise=0.1"."""
    file, rows = rundir.table(run.directory, "intrinsic"), []
    if not file.exists() or run.members["planted_dim"].isna().all():
        return []
    conditions = pd.read_csv(file, keep_default_na=False)
    for _, condition in conditions[conditions["metric"] == "loss"].iterrows():
        same = table["planted_dim"].notna() if "planted_dim" in table else table["member"] >= 0
        for part in filter(None, str(condition["condition"]).split(", ")):
            axis, _, value = part.partition("=")
            if axis in table:
                same &= np.array([runs.in_words(x, axis) == value for x in table[axis]])
        size = pd.to_numeric(condition["d"], errors="coerce")
        if not same.any():
            continue
        first = table[same].iloc[0]
        shared = {name: first[name] for name in task} | {
            "method": condition["method"],
            "seed": None,
        }
        d = int(run.members.loc[first.name, "planted_dim"])
        estimate = size / pd.to_numeric(condition["threshold"])
        rows.append(shared | _row("search", "", d, estimate, d, "dimension"))
    return rows


def _row(estimator, path, truth, estimate, expected, quantity="rank") -> dict[str, Any]:
    names = "estimator", "quantity", "path", "truth", "estimate", "expected"
    values = estimator, quantity, path, truth, estimate, expected
    return dict(zip(names, values, strict=True))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """The errors of each estimator, by noise and spectrum: one row each.

    found: from `estimates`. Columns: estimator, method, spectrum, noise, n (estimates), missing
    (how many of them are NaN), exact (share that rounds to the truth), relative (median of
    |relative|), worst (largest |relative|), bias (mean of relative).
    """
    rows = []
    by = [name for name in ("estimator", "method", "spectrum", "noise") if name in found]
    for keys, group in found.groupby(by, sort=False, dropna=False):
        off = group["relative"].abs()
        rows.append(
            dict(zip(by, keys, strict=True))
            | {
                "n": len(group),
                "missing": int(group["estimate"].isna().sum()),
                "exact": float((group["error"].abs() < 0.5).mean()),
                "relative": off.median(),
                "worst": off.max(),
                "bias": group["relative"].mean(),
            }
        )
    return pd.DataFrame(rows)


def shown(summary: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
    """(headings, rows) of the report's table, with percentages as text. summary: from `summary`."""
    headings = ["estimator", "method", "spectrum", "noise", "estimates", "none found"]
    headings += ["rounds to the truth", "median error", "worst error", "mean signed error"]
    percent = lambda x: "–" if x != x else f"{x:+.1%}" if x < 0 else f"{x:.1%}"
    names = ("exact", "relative", "worst", "bias")
    rows = [
        [row["estimator"], row["method"], row["spectrum"], row["noise"], row["n"], row["missing"]]
        + [percent(row[name]) for name in names]
        for _, row in summary.iterrows()
    ]
    return headings, rows
