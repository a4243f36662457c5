"""alpha / r or alpha / sqrt(r): do the first steps coincide over ranks?"""

from pathlib import Path

import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    Verdict,
    by_interval,
    commands,
    complete,
    means_only,
    numbers,
    shown,
    write,
)
from lorax.analysis import compare

CLAIM = "with alpha / r the first steps coincide over ranks, with alpha / sqrt(r) they part"
SOURCE = "Thinking Machines 2025; rsLoRA (arXiv:2312.03732)"
FIRST, TENTH, TWICE = 20, 0.1, 2.0
RULE = """\
Four ranks at one learning rate. At each evaluation of the first 20 steps, the spread is the highest
less the lowest validation loss over ranks, as a share of how far their mean has fallen; a seed's
spread is the mean over these. With alpha / r the steps coincide if the 95% interval of the spread,
over seeds, lies below a tenth, and do not if it lies above. With alpha / sqrt(r) they part if the
interval of its spread over that of alpha / r, seed by seed, lies above 2, and do not if below."""
STUDY = "rslora_vs_lora"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
PARTS = ("alpha / r: within a tenth of the fall", "alpha / sqrt(r): twice as far apart")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes curves.csv: the validation loss of every member at every evaluation."""
    tables = []
    for base, (directory,) in runs.items():
        curves = sweeps.evals(sweeps.load(directory, STUDY))
        tables.append(curves[["scaling", "rank", "seed", "step", "loss"]].assign(base=base))
    write(pd.concat(tables), folder, "curves.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found, bases = [], dict(list(numbers(folder, "curves.csv").groupby("base", sort=False)))
    for base, curves in bases.items():
        share = shares(curves)
        one = compare.interval(share["lora"])
        found.append(Verdict(PARTS[0], base, by_interval(one, "below", TENTH), shown(one), one))
        times = compare.interval(share["rslora"] / share["lora"])
        verdict = by_interval(times, "above", TWICE)
        found.append(Verdict(PARTS[1], base, verdict, f"{shown(times, 1)} times", times))
    found += means_only(folder, "scaling.csv", PARTS, bases)
    return complete(found, PARTS)


def shares(curves: pd.DataFrame) -> pd.DataFrame:
    """A row a seed, a column a scaling: the spread over ranks as a share of the fall, the mean over
    the first steps' evaluations."""
    at = ["scaling", "seed", "step"]
    wide = curves.pivot(index=at, columns="rank", values="loss")
    start = wide.xs(0, level="step").mean(axis=1)
    first = wide[wide.index.isin(range(1, FIRST + 1), level="step")]
    fall = start.reindex(first.index.droplevel("step")).to_numpy() - first.mean(axis=1)
    share = (first.max(axis=1) - first.min(axis=1)) / fall
    return share.groupby(["seed", "scaling"]).mean().unstack("scaling")
