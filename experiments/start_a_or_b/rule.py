"""Should a start random, or b? See `experiments`."""

from pathlib import Path

from experiments import losses
from experiments.losses import Losses
from experiments.optima import edges, optima
from experiments.verdicts import WITHDRAWN, Verdict, by_interval, commands, complete, numbers, shown
from lorax.analysis import compare

CLAIM = "a random and b zero allows a larger learning rate than the reverse, and learns better"
SOURCE = "arXiv:2406.08447"
RULE = (
    "Both starts have the same seven cells of rank and scale. A larger rate: the 95% interval "
    "over seeds of log2(best rate with a random / with b random), the mean over cells, lies above "
    "0; the best rate is a parabola's vertex, seed by seed, and one at the edge of the grid "
    "withdraws the number. Better: the 95% interval over seeds and test rows of the loss with b "
    "random less that with a random, each at its best rate and the mean over cells, lies above 0."
)
STUDY, BY = "rank_scale_rate", ["init", "rank", "alpha"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
RATE, LOSS = "a random: larger rate", "a random: lower loss"
CELLS = ((2, 8.0), (2, 4.0), (2, 2.0), (8, 2.0), (32, 0.5), (32, 1.0), (32, 2.0))


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY, of_claim)


def verdicts(folder: Path) -> list[Verdict]:
    tables = numbers(folder, "losses.csv").groupby("base", sort=False)
    found = [rate(base, of) for base, of in tables]
    found += [loss(base, of) for base, of in losses.read(folder, BY).items()]
    return complete(found, (RATE, LOSS))


def of_claim(table):
    """Whether members are in one of the cells that both starts have."""
    return [cell in CELLS for cell in zip(table["rank"], table["alpha"], strict=True)]


def rate(base: str, table) -> Verdict:
    best = optima(table, BY)
    if wrong := edges(best):
        return Verdict(RATE, base, WITHDRAWN, wrong)
    means = best.pivot_table(index="seed", columns="init", values="best")
    ratio = compare.paired(means["kaiming"], means["init-b"])
    number = f"log2 of the ratio {shown(ratio, 2)}"
    return Verdict(RATE, base, by_interval(ratio, "above"), number, ratio)


def loss(base: str, of: Losses) -> Verdict:
    names = {init: [f"{init}, {r}, {s}" for r, s in CELLS] for init in ("kaiming", "init-b")}
    if doubt := of.doubt(*names["kaiming"], *names["init-b"]):
        return Verdict(LOSS, base, WITHDRAWN, doubt)
    share = 1 / len(CELLS)
    weights = dict.fromkeys(names["init-b"], share) | dict.fromkeys(names["kaiming"], -share)
    lost = of.contrast(weights)
    return Verdict(LOSS, base, by_interval(lost, "above"), f"by {shown(lost)} nats", lost)
