"""How many bits does a trainable parameter store? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    WITHDRAWN,
    Tuned,
    Verdict,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    tuned,
    write,
)
from lorax.analysis import compare

CLAIM = "full fine-tuning stores more bits a parameter than LoRA, feed-forward more than attention"
SOURCE = "Tan, Du and Feng (arXiv:2607.21351)"
RULE = (
    "Bits a trainable parameter of random strings that hold several times as many, each setting "
    "at its best rate, seed by seed. Full above LoRA: the 95% interval over seeds of the ratio of "
    "one o matrix in full to LoRA on all o lies above 1. Feed-forward above attention: the ratio "
    "of LoRA there to LoRA in attention lies above 1.2. A pretrained base stores more: LoRA in "
    "attention, ratio to a base with random weights, above 1. A best rate at the edge of its grid "
    "withdraws the number, and so does a setting that recalls more than 95% of the tokens: then "
    "the strings ran out. So does one that stores nothing in a seed, and has no ratio."
)
STUDY = "stored_bits"
COMMANDS = {
    base: tuple(run for (run,) in commands(STUDY, base, f"{base} random").values())
    for base in ("stories-llama-260k", "gpt2-nano")
}
BY = ["weights", "method", "targets"]
#: part: (setting above, setting below, ratio that is claimed)
PARTS = {
    "full above LoRA": ("pretrained, full, o", "pretrained, lora, o", 1.0),
    "feed-forward above attention": ("pretrained, lora, mlp", "pretrained, lora, attention", 1.2),
    "pretrained above random": ("pretrained, lora, attention", "random, lora, attention", 1.0),
}


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """bits.csv: a row a member; weights is "random" for a base with random weights."""
    found = []
    for base, sweep in sweeps.each(runs, STUDY):
        columns = ["method", "targets", "lr", "seed", "status", "trainable_params"]
        scores = ["final_loss", "bits", "bits_per_parameter", "recalled"]
        table = sweep.table.reindex(columns=[*columns, *scores]).copy()
        drawn = str(sweep.run.config["config"]["base"]).startswith("random:")
        table.insert(0, "base", base)
        table.insert(1, "weights", "random" if drawn else "pretrained")
        table.loc[table["method"] == "full", "targets"] = "o"
        found.append(table)
    write(pd.concat(found), folder, "bits.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "bits.csv").groupby("base", sort=False):
        best = tuned(table.assign(less=-table["bits_per_parameter"]), BY, "less")
        found += [ratio(base, best, part) for part in PARTS]
    return complete(found, PARTS)


def ratio(base: str, best: Tuned, part: str) -> Verdict:
    above, below, margin = PARTS[part]
    settings = best.members.set_index(["setting", "seed"])
    for name in (above, below):
        if name not in settings.index:
            return Verdict(part, base, WITHDRAWN, f"{name} has no run")
        if doubt := best.doubt(name):
            return Verdict(part, base, WITHDRAWN, doubt)
        if (recalled := settings.loc[name, "recalled"].mean()) > 0.95:
            return Verdict(part, base, WITHDRAWN, f"{name} recalls {recalled:.0%}")
    bits = settings["bits_per_parameter"]
    if not (bits[below] > 0).all():
        return Verdict(part, base, WITHDRAWN, f"{below} stores nothing in a seed")
    interval = compare.interval((bits[above] / bits[below]).to_numpy())
    number = (
        f"{shown(interval, 2)} ({bits[above].mean():.2f} against {bits[below].mean():.2f} bits)"
    )
    return Verdict(part, base, by_interval(interval, "above", margin), number, interval)
