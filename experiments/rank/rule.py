"""How much rank does adaptation need? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import losses, sweeps
from experiments.losses import START, Losses
from experiments.verdicts import (
    LADDER,
    WITHDRAWN,
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    shown,
    write,
)
from lorax.analysis import tables

CLAIM = "a rank of 1 to 8 is enough"
SOURCE = "LoRA (arXiv:2106.09685), tables 6 and 18"
SHARE = 0.02  # of the gain
RULE = """\
With q and v adapted and each setting at its own best rate, a rank r is enough if it lacks less than
2% of what the largest rank R gains over the base: the 95% interval of loss(r) - loss(R) - 0.02
(start - loss(R)), over seeds and test rows, lies below 0. It is not if the interval lies above 0.
q alone stays behind if the interval of loss(q) - loss(q, v) lies above 0 at every rank, and does
not if it lies below 0 at one. A best rate at the edge of its grid, or one
rate alone, withdraws the number."""
BY, STUDY = ["targets", "rank"], "lora_table6_rank"
BASES = (*LADDER, "MiniLM CoLA", "SmolLM2-135M random", "SmolLM2-135M text")
COMMANDS = commands(STUDY, *BASES)
ENOUGH, BEHIND = "r = {} is enough (q, v)", "q alone stays behind q and v"
UPDATES = ["base", "rank", "seed", "layer", "target", "norm", "effective", "energy90", "stable"]
PARTS = (ENOUGH.format(8), ENOUGH.format(1), BEHIND)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes losses.csv, rows.csv, and updates.csv: what each dW of q and v is made of."""
    losses.collect(runs, folder, BY, STUDY)
    tables_of = []
    for base, (directory,) in runs.items():
        sweep = sweeps.load(directory, STUDY)
        best = sweeps.at_best(sweep, BY).query("targets == 'q v'")
        _, ranks = tables.spectra({member: sweep.run.update(member) for member in best.index})
        ranks = ranks.assign(base=base, seed=ranks["member"].map(best["seed"]))
        tables_of.append(ranks[UPDATES])
    write(pd.concat(tables_of), folder, "updates.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, of in losses.read(folder, BY).items():
        found += [enough(base, of, 8), enough(base, of, 1), behind(base, of)]
    return complete(found, PARTS)


def enough(base: str, of: Losses, rank: int) -> Verdict:
    """Whether q and v at this rank lack less than 2% of the gain of the largest."""
    low, high = f"q v, {rank}", f"q v, {of.members['rank'].max()}"
    if doubt := of.doubt(low, high):
        return Verdict(ENOUGH.format(rank), base, WITHDRAWN, doubt)
    lost = of.contrast({low: 1, high: -1})
    share = lost.value / of.contrast({START: 1, high: -1}).value
    above = of.contrast({low: 1, high: SHARE - 1, START: -SHARE})
    number = f"{shown(lost)} nats behind r = {high.split()[-1]}, {share:.1%} of its gain"
    return Verdict(ENOUGH.format(rank), base, by_interval(above, "below"), number, lost)


def behind(base: str, of: Losses) -> Verdict:
    """Whether q alone has a higher loss than q and v at every rank."""
    ranks = sorted(set(of.members["rank"]))
    if doubt := of.doubt(*(f"{targets}, {r}" for targets in ("q", "q v") for r in ranks)):
        return Verdict(BEHIND, base, WITHDRAWN, doubt)
    differences = {r: of.contrast({f"q, {r}": 1, f"q v, {r}": -1}) for r in ranks}
    verdict = all_of(by_interval(difference, "above") for difference in differences.values())
    least = min(differences, key=lambda r: differences[r].value)
    number = f"by {shown(differences[least])} nats at least (r = {least})"
    return Verdict(BEHIND, base, verdict, number, differences[least])
