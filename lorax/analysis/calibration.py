"""Estimators of rank and of intrinsic dimension against the truth that a planted task has.

Members of a planted task (`lorax.tasks.planted`) carry the truth in members.jsonl: `planted`, the
singular values of every kernel's dW*, and `planted_dim`, the codimension d* of the solutions. Here
each estimator is run as on any other task, and its estimate is compared with the planted value.
"""

from typing import Any

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.measures import spectrum

SHARE = 0.99  # of the best improvement over the base, that makes a rank large enough
#: what tells one planted task from another; a curve is of one task and one seed of the adapter
TASK = ("base", "planted_rank", "spectrum", "noise", "inputs", "data_seed")
#: estimator -> what it says of singular values (k,); the numerical rank depends on the shape too
RANKS = {
    "effective rank": spectrum.effective_rank,
    "energy rank 0.9": lambda sigma: spectrum.energy_rank(sigma, 0.9),
    "energy rank 0.99": lambda sigma: spectrum.energy_rank(sigma, 0.99),
    "stable rank": spectrum.stable_rank,
}
#: in the order in which they are shown
ESTIMATORS = ("knee", *RANKS, "numerical rank", "AdaLoRA", "d90 / 0.9", "search")

CAPTION = (
    "Estimate against planted truth. Dashed: where they agree. A point is one task and seed, and "
    "one matrix for what looks at single ones; levels of noise stand side by side."
)
NOTE = (
    "Relative error against the planted r* or d*. A knee is the smallest rank with 99% of the best "
    "improvement; the ranks of an update are those of the largest rank that was trained, and mean "
    "r* only where the spectrum is flat; d90 is divided by 0.9, the share of d* that it is. "
    "analysis/calibration.csv has every estimate."
)


# ------------------------------------------------------------------------------------- estimators


def knee(settings: pd.DataFrame, base: float, share: float = SHARE) -> int:
    """The smallest rank with at least `share` of the best improvement over the base: the smallest
    with mean <= best + (1 - share) (base - best).

    settings: a row a rank: rank, mean (its eval loss). base: the unadapted base's eval loss.
    Raises ValueError where no rank has a loss below the base's.

    Why not the one-standard-error rule (Breiman et al. 1984, section 3.4.3; `runs.answer`)? That
    rule asks which rank can't be told from the best, so its yardstick is the spread between seeds,
    and that says how well the loss is known, not how much of it is left. Without noise all ranks
    from r* on reach nothing but rounding: the standard error is 1e-9 of the loss, and which of them
    has the least is chance. With few seeds of a hard task it is so wide that ranks far below pass.
    A share of the improvement has the same meaning in both, needs one seed, and is what the loss
    of a planted update is made of: rank r leaves the energy of the singular values after the r-th.
    So it finds r* where the smallest of them holds more than 1 - share of the energy (a flat
    spectrum: r* < 100), and else the energy rank at `share`.
    """
    usable = settings.dropna(subset=["mean"])
    best = usable["mean"].min()
    if not best < base:
        raise ValueError(f"knee: no rank is better than the base, {base:.4g}; the best has {best}")
    enough = usable[usable["mean"] <= best + (1 - share) * (base - best)]
    return int(enough["rank"].min())


def dimension(curve: pd.DataFrame, base: float, best: float = 0.0, share: float = 0.9) -> float:
    """d_t / t, the estimate of d* from the dimension d_t that reaches the share t of what there is
    to improve; NaN where no tested dimension does.

    curve: a row a dimension: dim, mean (its eval loss). base, best: losses of the base and of
    training without restriction. d_t is where the line through the neighbours crosses t.

    Why d_t / t. Let the loss be |J (theta - theta*)|^2 with J (d*, D) of orthogonal rows of one
    length, as it is for one planted linear layer. In a random subspace theta_0 + P z, P (D, d)
    Gaussian, J P (d*, d) is Gaussian as well, and for d <= d* its columns span a random
    d-dimensional subspace of R^d*. The best z takes from t = J (theta* - theta_0) its projection
    there. |projection|^2 / |t|^2 has, whatever t, the distribution Beta(d / 2, (d* - d) / 2): mean
    d / d*, variance 2 (d / d*) (1 - d / d*) / (d* + 2). So the share that is reached rises in
    proportion to d, to 1 at d*, and d90 of Li et al. 2018 (arXiv:1804.08838) is 0.9 d*. One seed
    at t = 0.9 is off by a standard deviation of 0.47 / sqrt(d* + 2) of d*.
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
    """The planted tasks that members were trained on, a row each. table: of `runs.summary`."""
    return table[[name for name in TASK if name in table]].astype(str).drop_duplicates()


def estimates(
    run: runs.Run, table: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame
) -> pd.DataFrame:
    """A row an estimator, task, seed and, where it looks at one, kernel.

    table: of `runs.summary`. sigmas, ranks: of `tables.spectra`; empty where no member has left an
    update. Columns: estimator, quantity ("rank" or "dimension"), path ("" for all kernels), truth
    (r* of the kernel, the largest of all where path is "", or d*), estimate, error (estimate -
    truth), relative (error / truth, NaN for a truth of 0), expected (what the estimator says of the
    planted update itself, which need not be r*: the effective rank of a spectrum that is not flat
    is below), those of `TASK`, seed, method. Empty where the run's task is not planted.
    """
    if "planted" not in run.members:
        return pd.DataFrame()
    usable = table[table["final_loss"].notna()].copy()
    usable["mean"] = usable["final_loss"]
    # planted_dim counts every parameter; of fewer it is another
    if {"parameters", "dim"} <= set(usable):
        usable = usable[usable["dim"].isna() | usable["parameters"].isin([np.nan, None, "all"])]
    task = [name for name in TASK if name in usable]
    rows: list[dict[str, Any]] = []
    for keys, members in usable.groupby([*task, "method", "seed"], sort=True, dropna=False):
        about = dict(zip([*task, "method", "seed"], keys, strict=True))
        truth = _truth(run, members.index[0])
        if about["method"] == "adalora":
            best = members.loc[members["mean"].idxmin()]
            rows += [about | row for row in _allocation(truth, best.name, ranks)]
        elif "dim" in members and members["dim"].notna().any():
            rows += [about | row for row in _dimension(run, members)]
        elif members["rank"].nunique() > 1:
            rows += [about | row for row in _ranks(truth, members, sigmas, ranks)]
    rows += _search(run, table, task)
    if not rows:
        return pd.DataFrame()
    found = pd.DataFrame(rows)
    found["error"] = found["estimate"] - found["truth"]
    found["relative"] = found["error"] / found["truth"].where(found["truth"] > 0)
    first = ["estimator", "quantity", "path", "truth", "estimate", "error", "relative", "expected"]
    order = found["estimator"].map(ESTIMATORS.index)
    found = found.assign(order=order).sort_values("order", kind="stable")
    return found[[*first, *task, "seed", "method"]].reset_index(drop=True)


def _truth(run: runs.Run, member: int) -> dict[str, np.ndarray]:
    """{layer: singular values of its dW*}, (0,) where nothing is planted."""
    return {path: np.array(s, float) for path, s in run.members.loc[member, "planted"].items()}


def _ranks(truth, members: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame) -> list[dict]:
    """The knee of one curve, and the ranks of the update at its largest rank."""
    best = members.loc[members.groupby("rank")["mean"].idxmin()]  # over learning rates and the like
    largest = max(len(sigma) for sigma in truth.values())
    expected = max(int(spectrum.energy_rank(sigma, SHARE)) for sigma in truth.values())
    base = best["base_loss"].iloc[0]
    found = knee(best, base) if best["mean"].min() < base else np.nan
    rows = [_row("knee", "", largest, found, expected)]
    last = best.loc[best["rank"].idxmax()].name
    learned = sigmas[sigmas["member"] == last] if len(sigmas) else sigmas
    for path, of_path in learned.groupby("path", sort=False) if len(learned) else ():
        if path not in truth:
            continue
        sigma, r = of_path["sigma"].to_numpy(float), len(truth[path])
        for name, statistic in RANKS.items():
            rows.append(_row(name, path, r, float(statistic(sigma)), float(statistic(truth[path]))))
        own = ranks[(ranks["member"] == last) & (ranks["path"] == path)]
        rows.append(_row("numerical rank", path, r, int(own["numerical"].iloc[0]), r))
    return rows


def _allocation(truth, member: int, ranks: pd.DataFrame) -> list[dict]:
    """The triplets that AdaLoRA has kept of every kernel. Pruned ones are zero columns of the
    factors that it exports, so that the numerical rank counts the others."""
    own = ranks[ranks["member"] == member] if len(ranks) else ranks
    kept = dict(zip(own["path"], own["numerical"], strict=True)) if len(own) else {}
    if not kept:
        return []
    return [_row("AdaLoRA", p, len(s), int(kept.get(p, 0)), len(s)) for p, s in truth.items()]


def _dimension(run: runs.Run, members: pd.DataFrame) -> list[dict]:
    d = run.members["planted_dim"].get(members.index[0])
    if d is None or np.isnan(d):
        return []
    best = members.loc[members.groupby("dim")["mean"].idxmin()]
    found = dimension(best, best["base_loss"].iloc[0])
    return [_row("d90 / 0.9", "", int(d), found, int(d), "dimension")]


def _search(run: runs.Run, table: pd.DataFrame, task: list[str]) -> list[dict]:
    """What the search for d_t found (analysis/intrinsic.csv), over its threshold t. Its conditions
    name the members' axes: "inputs=9, noise=0.1"."""
    file, rows = rundir.table(run.directory, "intrinsic"), []
    if not file.exists() or run.members["planted_dim"].isna().all():
        return []
    found = pd.read_csv(file, keep_default_na=False)
    for _, of in found[found["metric"] == "loss"].iterrows():
        same = table["planted_dim"].notna() if "planted_dim" in table else table["member"] >= 0
        for part in filter(None, str(of["condition"]).split(", ")):
            axis, _, value = part.partition("=")
            if axis in table:
                same &= np.array([runs.in_words(x, axis) == value for x in table[axis]])
        size = pd.to_numeric(of["d"], errors="coerce")
        if not same.any():
            continue
        first = table[same].iloc[0]
        about = {name: first[name] for name in task} | {"method": of["method"], "seed": None}
        d = int(run.members.loc[first.name, "planted_dim"])
        estimate = size / pd.to_numeric(of["threshold"])
        rows.append(about | _row("search", "", d, estimate, d, "dimension"))
    return rows


def _row(estimator, path, truth, estimate, expected, quantity="rank") -> dict[str, Any]:
    names = "estimator", "quantity", "path", "truth", "estimate", "expected"
    values = estimator, quantity, path, truth, estimate, expected
    return dict(zip(names, values, strict=True))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """How far each estimator is off, by noise and spectrum: a row each.

    found: of `estimates`. Columns: estimator, method, spectrum, noise, n (estimates), missing (how
    many of them are NaN), exact (share that rounds to the truth), relative (median of |relative|),
    worst (largest |relative|), bias (mean of relative).
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
    """(headings, rows) of the report's table, percentages in words. summary: of `summary`."""
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
