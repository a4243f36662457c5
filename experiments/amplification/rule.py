"""What does an update amplify? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    LADDER,
    WITHDRAWN,
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    crossed,
    mapped,
    numbers,
    shown,
    write,
)
from lorax.analysis import amplification, tables
from lorax.analysis.compare import Interval

CLAIM = "dW amplifies directions that W has but does not emphasise"
SOURCE = "LoRA (arXiv:2106.09685), table 7"
RULE = """\
q and v, r = 4 and the largest rank, each at its own best rate; x is |U^T W V| with the first four
directions of dW at r = 4. dW's directions are ones that W has if the 95% interval of x over that of
random directions, as a geometric mean over seeds and layers, lies above 1 for q and for v, and are
not if it lies below 1 for one. W does not emphasise them if the interval of x over that of W's own
first four lies below 1/2. The factor |dW| / x itself has no verdict: it grows with the learning
rate, and random directions of the same norm have more. That it is larger at r = 4 than at the
largest rank counts only where it is relative to random directions of the same rank and norm."""
BY, STUDY, SMALL = ["targets", "rank"], "lora_table6_rank", 4
COMMANDS = commands(STUDY, *LADDER, "SmolLM2-135M random")
PARTS = (
    "directions that W has: ‖UᵀWV‖ over random directions' > 1",
    "but does not emphasise: over W's own < 1/2",
    "a small rank amplifies more than a large one, relative to random directions",
)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes matrices.csv: a row a member, matrix and number of directions k, with the columns of
    table 7, |W|, what random directions have (`chance` = k |W| / sqrt(in out), exactly the root
    mean square), and |U^T W V| over that."""
    found = [of_run(base, sweeps.load(directory, STUDY)) for base, (directory,) in runs.items()]
    write(pd.concat(found), folder, "matrices.csv")


def of_run(base: str, sweep: sweeps.Sweep) -> pd.DataFrame:
    import lorax  # which imports JAX; verdicts need only the CSV

    kernels = lorax.models.kernels(lorax.load(sweep.run.config["config"]["base"]))
    best = sweeps.at_best(sweep, BY).query("targets == 'q v'")
    rows = []
    for member in best[best["rank"].isin((SMALL, best["rank"].max()))].itertuples():
        for path, (a, b, s, *_) in sweep.run.adapter(member.Index).items():
            w, (layer, target) = kernels[path], tables.layer_and_target(path)
            for k in dict.fromkeys((member.rank, SMALL)):
                # A seed of its own for each, or all random columns would be one draw.
                rng = np.random.default_rng([member.Index, layer, ord(target), k])
                row = {"base": base, "target": target, "layer": layer, "rank": member.rank}
                row |= {"lr": member.lr, "doubt": member.doubt, "k": k, "seed": member.seed}
                row |= {"w_norm": np.linalg.norm(w)}
                row |= amplification(w, (a, b, s), k, rng=rng)._asdict()
                row["chance"] = k * row["w_norm"] / np.sqrt(w.size)
                rows.append(row | {"over_chance": row["w_in_delta"] / row["chance"]})
    return pd.DataFrame(rows)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, matrices in numbers(folder, "matrices.csv").groupby("base", sort=False):
        doubts = matrices["doubt"].dropna()
        if len(doubts):
            found += [Verdict(part, base, WITHDRAWN, doubts.iloc[0]) for part in PARTS]
            continue
        all_k = matrices[matrices["k"] == matrices["rank"]].assign(
            over_w=matrices["w_in_delta"] / matrices["w_in_w"]
        )
        small, large = (all_k[(all_k["rank"] == SMALL) == is_small] for is_small in (True, False))
        at = ["target", "layer", "seed"]
        # |dW| / x over |dW| / chance is 1 / over_chance.
        ratio = large.set_index(at)["over_chance"] / small.set_index(at)["over_chance"]
        found.append(decided(PARTS[0], base, small, "over_chance", "above", 1.0))
        found.append(decided(PARTS[1], base, small, "over_w", "below", 0.5))
        found.append(decided(PARTS[2], base, ratio.rename("x").reset_index(), "x", "above", 1.0))
    return complete(found, PARTS)


def decided(
    part: str, base: str, rows: pd.DataFrame, column: str, side: str, margin: float
) -> Verdict:
    """Whether the geometric means of a column over seeds and layers lie on that side of the margin,
    for q and for v."""
    of = {
        target: geometric(own.pivot(index="seed", columns="layer", values=column))
        for target, own in rows.groupby("target")
    }
    verdict = all_of(by_interval(interval, side, margin) for interval in of.values())
    number = "; ".join(f"{target} {shown(interval, 2)}" for target, interval in of.items())
    return Verdict(part, base, verdict, number, next(iter(of.values())))


def geometric(values: pd.DataFrame) -> Interval:
    """The geometric mean of values (seeds, layers) with its interval."""
    return mapped(crossed(np.log(values)), np.exp)
