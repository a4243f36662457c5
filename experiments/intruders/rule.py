"""Does LoRA put new directions into the weights, and do they forget?"""

from pathlib import Path

import pandas as pd
from scipy import stats

from experiments.verdicts import Verdict, by_interval, commands, complete, copied, numbers, shown
from lorax.analysis import compare

CLAIM = "LoRA has intruder dimensions, full fine-tuning hardly any; they forget"
SOURCE = "Shuttleworth et al. (arXiv:2410.21228)"
K, EPSILON, RANK, ALPHA, LAMBDA = 10, 0.5, 8, 8, 0.7
MORE, THIRD = 1.1, 1 / 3
RULE = """\
Intruders at r = 8 with alpha = 8, k = 10 and epsilon = 0.5, the higher of two learning rates,
summed over matrices; intervals of 95% over seeds. LoRA has them and full fine-tuning hardly any if
that of the difference lies above 0. They say what was learned only if LoRA has at least 10% more
than its control, an update of the same singular values in random directions: the interval of the
count less 1.1 times the control's lies above 0 (below 0: no more than that). Their number goes with
forgetting if Spearman's correlation of the two over seeds, within one rank and learning rate (over
rates it is that of the rate) and as a mean over ranks, lies above 0 over the five rates, and does
not if it lies below. Scaling each matrix's top intruder by 0.7 gives back a third of what was
forgotten if the interval of that share lies above a third, and does not if it lies below."""
STUDIES = ("intruders", "lr_vs_rank")
MEASURE = "python -m experiments.intruders.measure {1} {2}"
COMMANDS = {
    base: (*(commands(study, base)[base][0] for study in STUDIES), MEASURE)
    for base in ("gpt2-nano", "stories-llama-260k")
}
PARTS = (
    "LoRA has intruders, full fine-tuning hardly any",
    "more than random directions of the same singular values",
    "their number goes with forgetting, at one rank and rate",
    "scaling them by 0.7 gives back a third of the forgetting",
)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "members.csv", "counts.csv", "scaled.csv")


def verdicts(folder: Path) -> list[Verdict]:
    members, counts, scaled = (
        dict(list(numbers(folder, f"{name}.csv").groupby("base", sort=False)))
        for name in ("members", "counts", "scaled")
    )
    found = []
    for base in counts:
        found += counted(base, counts[base])
        found.append(forgetting(base, members[base], counts[base]))
        found.append(intervention(base, scaled[base], members[base]))
    return complete(found, PARTS)


def counted(base: str, counts: pd.DataFrame) -> list[Verdict]:
    """LoRA's intruders against full fine-tuning's, and against random directions'."""
    own = counts.query("config == 'intruders' and k == @K and epsilon == @EPSILON")
    own = own.set_index("seed").sort_index()
    lora = own[(own["method"] == "lora") & (own["rank"] == RANK) & (own["alpha"] == ALPHA)]
    lora = lora[lora["lr"] == lora["lr"].max()]
    full = own[own["method"] == "full"]
    full = full[full["lr"] == full["lr"].max()]
    most = K * int(lora["matrices"].iloc[0])
    apart = compare.paired(lora["count"], full["count"])
    words = f"{lora['count'].mean():.0f} and {full['count'].mean():.1f} of {most}"
    less = compare.paired(lora["count"], MORE * lora["control"])
    control = compare.paired(lora["count"], lora["control"])
    control_words = f"{lora['count'].mean():.0f} and {lora['control'].mean():.0f}; difference "
    return [
        Verdict(PARTS[0], base, by_interval(apart, "above"), words, apart),
        Verdict(
            PARTS[1], base, by_interval(less, "above"), control_words + shown(control, 1), control
        ),
    ]


def forgetting(base: str, members: pd.DataFrame, counts: pd.DataFrame) -> Verdict:
    """Spearman's correlation of intruders and forgetting over seeds, within ranks and rates."""
    counts = counts.query("k == @K and epsilon == @EPSILON")[["config", "member", "count"]]
    own = members.merge(counts, on=["config", "member"])
    own = own[(own["config"] == "lr_vs_rank") & (own["method"] == "lora")]
    rows = [
        (lr, stats.spearmanr(cell["count"], cell["text"]).statistic)
        for (lr, _), cell in own.groupby(["lr", "rank"])
        if cell["count"].nunique() > 1
    ]
    of_rates = pd.DataFrame(rows, columns=["lr", "rho"]).groupby("lr")["rho"].mean()
    mean = compare.interval(of_rates)
    number = f"{shown(mean, 2)} over {len(of_rates)} rates"
    return Verdict(PARTS[2], base, by_interval(mean, "above"), number, mean)


def intervention(base: str, scaled: pd.DataFrame, members: pd.DataFrame) -> Verdict:
    """The share of the forgetting that scaling the top intruders gives back, and its price."""
    own = scaled[(scaled["way"] == "intruder") & (scaled["rank"] == RANK)]
    text, task = (own.pivot(index="seed", columns="lambda", values=x) for x in ("text", "task"))
    start = members["base_text"].iloc[0]
    back = compare.interval((text[1.0] - text[LAMBDA]) / (text[1.0] - start))
    price = compare.interval(task[LAMBDA] - task[1.0])
    number = f"{shown(back, 2)}, for {shown(price)} nats of the task"
    return Verdict(PARTS[3], base, by_interval(back, "above", THIRD), number, back)
