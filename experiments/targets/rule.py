"""Which matrices should a fixed budget go to? See `experiments`."""

from pathlib import Path

from experiments import losses
from experiments.losses import Losses
from experiments.verdicts import LADDER, WITHDRAWN, Verdict, by_interval, commands, complete, shown

CLAIM = "at one budget several matrices are better than one"
SOURCE = "LoRA (arXiv:2106.09685), table 5"
RULE = """\
One matrix at r = 8, two at 4, all four at 2, each set at its own best rate. q and v, and all four,
beat one matrix if the 95% interval of their loss less that of the best single matrix (by the
validation loss), over seeds and test rows, lies below 0, and do not if it lies above 0. q or k
alone is worst if the interval of the better of the two less the worst of the other sets lies above
0, and is not if it lies below 0. A best rate at the edge of its grid, or one rate alone, withdraws
the number."""
BY, STUDY = ["targets", "rank"], "lora_table5_targets"
COMMANDS = commands(STUDY, *LADDER, "MiniLM CoLA", "SmolLM2-135M random", "SmolLM2-135M text")
ONE = ("q", "k", "v", "o")
PARTS = ("q and v beat one matrix", "all four beat one matrix", "q or k alone is worst")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, of in losses.read(folder, BY).items():
        names = of.members.groupby("targets")["setting"].first()
        on_validation = of.members.groupby("targets")["validation"].mean()
        one = on_validation[list(ONE)].idxmin()
        found.append(compared(PARTS[0], base, of, names, "q v", one, "below"))
        found.append(compared(PARTS[1], base, of, names, "q k v o", one, "below"))
        alone = on_validation[["q", "k"]].idxmin()
        other = on_validation.drop(["q", "k"]).idxmax()
        found.append(compared(PARTS[2], base, of, names, alone, other, "above"))
    return complete(found, PARTS)


def compared(part: str, base: str, of: Losses, names, a: str, b: str, side: str) -> Verdict:
    """Whether the loss of the targets a, less that of b, lies on that side of 0."""
    if doubt := of.doubt(names[a], names[b]):
        return Verdict(part, base, WITHDRAWN, doubt)
    difference = of.contrast({names[a]: 1, names[b]: -1})
    number = f"{', '.join(a.split())} less {', '.join(b.split())}: {shown(difference)} nats"
    return Verdict(part, base, by_interval(difference, side), number, difference)
