"""Does a learning rate that rank 2 finds serve other ranks? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import losses
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    tuned,
)
from lorax.analysis import compare

CLAIM = "under LoRA-Muon a learning rate that rank 2 finds serves every rank"
SOURCE = "LoRA-Muon (arXiv:2606.12921)"
SHARE = 0.01  # of the gain
RULE = (
    "The regret of a rank is its test loss at the best rate of r = 2 less that at its own best "
    "rate, both chosen on the validation rows, over the gain of r = 2; the mean over r = 8 and "
    "32. Rank 2's rate serves if the 95% interval of the regret over seeds lies below 1%, and "
    "does not if above. AdamW's regret is larger if the 95% interval of the difference lies above "
    "0. A best rate at the edge of its grid withdraws the number."
)
STUDY, BY = "rate_transfer", ["train.optimizer", "rank"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
MUON, ADAMW, PLAIN = (f"{name}: rank 2's rate serves" for name in ("LoRA-Muon", "AdamW", "Muon"))
BETTER = "AdamW's regret is larger than LoRA-Muon's"
OPTIMISERS = {MUON: "lora-muon", ADAMW: "adamw", PLAIN: "muon"}
PROXY, OTHERS = 2, (8, 32)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "losses.csv").groupby("base", sort=False):
        of = {part: regret(table, name) for part, name in OPTIMISERS.items()}
        found += [serves(base, part, *of[part]) for part in OPTIMISERS]
        found.append(better(base, of[ADAMW], of[MUON]))
    return complete(found, (*OPTIMISERS, BETTER))


def regret(table: pd.DataFrame, optimiser: str) -> tuple[pd.Series, str]:
    """(each seed's regret as a share of the gain, the mean over ranks; why it is not known)."""
    table = table[table["train.optimizer"] == optimiser]
    best = tuned(table, ["rank"], "validation")
    if doubt := best.doubt():
        return pd.Series(dtype=float), doubt
    rates = best.members.groupby("rank")["lr"].first()
    test = table.set_index(["rank", "lr", "seed"])["test"].sort_index()
    gain = table["start_test"].iloc[0] - test[PROXY, rates[PROXY]].mean()
    lost = [test[r, rates[PROXY]] - test[r, rates[r]] for r in OTHERS]
    share = sum(lost) / len(OTHERS) / gain
    return share, "a seed diverges at rank 2's best rate" if share.isna().any() else ""


def serves(base: str, part: str, lost: pd.Series, doubt: str) -> Verdict:
    if doubt:
        return Verdict(part, base, WITHDRAWN, doubt)
    interval = compare.interval(lost)
    number = f"regret {shown(interval)} of the gain"
    return Verdict(part, base, by_interval(interval, "below", SHARE), number, interval)


def better(base: str, adamw: tuple, muon: tuple) -> Verdict:
    if doubt := adamw[1] or muon[1]:
        return Verdict(BETTER, base, WITHDRAWN, doubt)
    interval = compare.paired(adamw[0], muon[0])
    return Verdict(BETTER, base, by_interval(interval, "above"), f"by {shown(interval)}", interval)
