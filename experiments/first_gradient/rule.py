"""Does LoRA turn to the first full gradient, and does it help to start there? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import losses, sweeps
from experiments.losses import Losses
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    tuned,
    write,
)
from lorax.analysis import compare, tables

CLAIM = "from a small start LoRA turns to the leading directions of the first full gradient"
SOURCE = "LoRA-One (arXiv:2502.01235)"
RULE = (
    "phi is the mean over matrices of the overlap of the span of a with the r leading left "
    "singular directions of the first full gradient, less its mean for a random span. It turns "
    "there under gradient descent from a small start (s = 1/64) if the 95% interval over seeds of "
    "phi after the last step, at the best rate and the mean over ranks 1, 4 and 16, lies above "
    "0.1, and does not if below. The same for AdamW. LoRA-One is ahead if the 95% interval over "
    "seeds and test rows of the loss after 25 steps of another start less LoRA-One's, each at its "
    "best rate, lies above 0. A best rate at the edge of its grid withdraws the number."
)
TURNS, STARTS = "first_gradient", "starts_first_steps"
COMMANDS = {
    base: tuple(commands(study, base)[base][0] for study in (TURNS, STARTS))
    for base in ("gpt2-nano", "stories-llama-260k", "SmolLM2-135M")
}
BY, NEAR = ["init"], 0.1
DESCENT, ADAMW = "gradient descent turns to it", "AdamW turns to it"
OPTIMISERS = {DESCENT: "sgd", ADAMW: "adamw"}
AHEAD = {"LoRA-One ahead of the default": "kaiming", "LoRA-One ahead of LoRA-GA": "lora-ga"}


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """phi.csv: a row a member and evaluation: its loss, phi and phi of chance, the means over
    matrices; losses.csv and rows.csv of the starts."""
    found = []
    for base, (directory, _) in runs.items():
        sweep = sweeps.load(directory, TURNS)
        phi = tables.trajectory(sweep.run)[
            ["member", "step", "gradient_overlap", "gradient_chance"]
        ]
        phi = phi.groupby(["member", "step"], as_index=False).mean()
        columns = ["train.optimizer", "alpha", "rank", "lr", "seed", "status", "final_loss"]
        phi = phi.join(sweep.table[columns], on="member").drop(columns="member")
        phi = phi.rename(columns={"train.optimizer": "optimizer", "alpha": "scale"})
        phi.insert(0, "base", base)
        found.append(phi)
    write(pd.concat(found), folder, "phi.csv")
    losses.collect({base: of[1:] for base, of in runs.items()}, folder, BY, STARTS)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "phi.csv").groupby("base", sort=False):
        found += [turns(base, table, part) for part in OPTIMISERS]
    for base, of in losses.read(folder, BY).items():
        found += [ahead(base, of, part) for part in AHEAD]
    return complete(found, (*OPTIMISERS, *AHEAD))


def turns(base: str, table: pd.DataFrame, part: str) -> Verdict:
    """Whether a's span has turned to the first gradient's after the last step."""
    table = table[
        (table["optimizer"] == OPTIMISERS[part]) & (table["scale"] == table["scale"].min())
    ]
    last = table[table["step"] == table["step"].max()]
    best = tuned(last, ["rank"])
    if doubt := best.doubt():
        return Verdict(part, base, WITHDRAWN, doubt)
    more = best.members.assign(
        phi=best.members["gradient_overlap"] - best.members["gradient_chance"]
    )
    interval = compare.interval(more.groupby("seed")["phi"].mean())
    number = f"{shown(interval)} above chance"
    return Verdict(part, base, by_interval(interval, "above", NEAR), number, interval)


def ahead(base: str, of: Losses, part: str) -> Verdict:
    other = AHEAD[part]
    if doubt := of.doubt(other, "lora-one"):
        return Verdict(part, base, WITHDRAWN, doubt)
    lead = of.contrast({other: 1, "lora-one": -1})
    return Verdict(part, base, by_interval(lead, "above"), f"by {shown(lead)} nats", lead)
