"""Does dW drift to the principal directions of W over training? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    LADDER,
    Verdict,
    by_interval,
    by_signs,
    commands,
    complete,
    numbers,
    shown,
    write,
)
from lorax.analysis import compare, tables

CLAIM = "over training dW drifts from minor to principal directions of W"
SOURCE = "SDC-LoRA (ACL Findings 2026)"
RULE = (
    "The principal share is |U^T dW V|^2 / |dW|^2 with U and V the 8 leading singular directions "
    "of W, less its mean for a dW in random directions; the mean over matrices. It rises if its "
    "slope on log2 of the step is positive in at least 9 of 10 seeds (p = 0.02 by a sign test; "
    "of other numbers of seeds in as many as have p < 0.05), and does not if it is negative in "
    "as many. Above chance: the 95% interval over seeds of the share at the end lies "
    "above 0. Minor directions: the same of the 8 last ones, which should fall."
)
STUDY = "over_training"
COMMANDS = commands(STUDY, *LADDER, "gpt2-nano random")
METHODS = {"lora": "LoRA", "full": "full fine-tuning"}
RISES, FALLS, ABOVE = "principal share rises", "minor share falls", "principal share above chance"
PARTS = [f"{name}: {what}" for name in METHODS.values() for what in (RISES, FALLS, ABOVE)]


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """energy.csv: a row a base, method, seed and step; means over the matrices that LoRA adapts of
    the shares of dW's energy in W's leading and last directions, and of chance."""
    found = []
    for base, sweep in sweeps.each(runs, STUDY):
        finished = sweep.table[sweep.table["status"] == "finished"]
        rows = tables.trajectory(sweep.run)
        rows = rows[rows["member"].isin(finished.index) & (rows["step"] > 0)]
        lora = rows[rows["member"].map(finished["method"]) == "lora"]
        rows = rows[rows["path"].isin(set(lora["path"]))]
        rows = rows.join(finished[["method", "seed"]], on="member")
        columns = ["energy_top", "energy_bottom", "chance"]
        means = rows.groupby(["method", "seed", "step"], as_index=False)[columns].mean()
        means.insert(0, "base", base)
        found.append(means)
    write(pd.concat(found), folder, "energy.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "energy.csv").groupby("base", sort=False):
        for method, name in METHODS.items():
            of = table[table["method"] == method]
            found += [
                trend(base, f"{name}: {RISES}", of, "energy_top", 1),
                trend(base, f"{name}: {FALLS}", of, "energy_bottom", -1),
                above(base, f"{name}: {ABOVE}", of),
            ]
    return complete(found, PARTS)


def trend(base: str, part: str, table: pd.DataFrame, column: str, sign: int) -> Verdict:
    """Whether a share rises (sign 1) or falls (-1) in nearly all seeds."""
    shares = table.pivot(index="step", columns="seed", values=column)
    slopes = np.polyfit(np.log2(shares.index), shares, 1)[0]
    right = int((sign * slopes > 0).sum())
    interval = compare.interval(100 * slopes)
    number = f"in {right} of {len(slopes)} seeds, {shown(interval)} percent a doubling"
    verdict = by_signs(slopes, "above" if sign > 0 else "below")
    return Verdict(part, base, verdict, number, interval)


def above(base: str, part: str, table: pd.DataFrame) -> Verdict:
    last = table[table["step"] == table["step"].max()].set_index("seed")
    share = compare.interval(100 * (last["energy_top"] - last["chance"]))
    number = f"{shown(share)} percent, chance {100 * last['chance'].iloc[0]:.3f}"
    return Verdict(part, base, by_interval(share, "above"), number, share)
