"""Is a large alpha at a small rate better than a large rate? See `experiments`."""

from pathlib import Path

import numpy as np

from experiments import losses
from experiments.optima import edges, optima, slopes
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_equivalence,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    tuned,
)
from lorax.analysis import compare

CLAIM = "at a small rate the best alpha goes as sqrt(r), and beats the best rate at alpha = r"
SOURCE = "LoRA-alpha (arXiv:2606.12883)"
NEAR = 1 / 4  # half of the distance between two exponents
RULE = (
    "At an eighth of the default rate, the slope of log2 of the best alpha on log2 r at r = 2, 8 "
    "and 32, seed by seed (a parabola's vertex over alphas a factor of two apart): sqrt(r) if its "
    "90% interval over seeds lies within 1/4 of 1/2, not if none of it does. Alpha beats the rate "
    "if the 95% interval over seeds of test loss at alpha = r with the best rate less that at the "
    "small rate with the best alpha, the mean over ranks, lies above 0. A best value at the edge "
    "of its grid withdraws the number."
)
STUDY, BY = "rank_scale_rate", ["init", "rank", "alpha"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
ROOT, BEATS = "the best alpha goes as sqrt(r)", "the best alpha beats the best rate"


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY, of_claim)


def verdicts(folder: Path) -> list[Verdict]:
    tables = numbers(folder, "losses.csv").groupby("base", sort=False)
    found = [part(base, of) for base, of in tables for part in (exponent, gap)]
    return complete(found, (ROOT, BEATS))


def of_claim(table):
    """Whether members have alpha = r (s = 1, which the run calls alpha), or the small rate."""
    small = table["lr"] == table.loc[table["init"] == "kaiming", "lr"].min()
    return (table["init"] == "kaiming") & (small | (table["alpha"] == 1))


def at_small_rate(table):
    """The members that tune alpha: at the lowest rate, from s = 2 on."""
    return table[(table["lr"] == table["lr"].min()) & (table["alpha"] >= 2)]


def exponent(base: str, table) -> Verdict:
    best = optima(at_small_rate(table), ["rank"], rate="alpha")
    if wrong := edges(best):
        return Verdict(ROOT, base, WITHDRAWN, wrong)
    best["best"] += np.log2(best["rank"])  # alpha = s r
    interval = compare.interval(slopes(best), level=0.9)
    verdict = by_equivalence(interval, 0.5 - NEAR, 0.5 + NEAR)
    alphas = [f"{2**x:.0f}" for x in best.groupby("rank")["best"].mean()]
    number = f"exponent {shown(interval, 2)}, 90%; alpha {', '.join(alphas)}"
    return Verdict(ROOT, base, verdict, number, interval)


def gap(base: str, table) -> Verdict:
    by_alpha = tuned(at_small_rate(table), ["rank"], "validation", "alpha")
    by_rate = tuned(table[table["alpha"] == 1], ["rank"], "validation")
    if doubt := by_alpha.doubt() or by_rate.doubt():
        return Verdict(BEATS, base, WITHDRAWN, doubt)
    means = [of.members.groupby("seed")["test"].mean() for of in (by_rate, by_alpha)]
    lost = compare.paired(*means)
    return Verdict(BEATS, base, by_interval(lost, "above"), f"by {shown(lost)} nats", lost)
