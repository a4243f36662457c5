"""Do two ranks, or two seeds, find the same directions? See `experiments`."""

import itertools
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
    numbers,
    shown,
    write,
)
from lorax.analysis import basis_similarity, chance_similarity, tables
from lorax.analysis.compare import Interval

CLAIM = "of two ranks' directions, the first is shared"
SOURCE = "LoRA (arXiv:2106.09685), figures 3 and 4"
RULE = """\
phi(i, j) of A at r = 8 and A at the largest rank, same seed, each rank at its own best rate. Ranks
share the top direction if the 95% interval of phi(1, 1), over seeds and layers, lies above 0.5 for
q and for v, and do not if it lies below 0.5 for one. They share the top direction only if phi
falls: the interval of phi(1, 1) - phi(8, 8) lies above 0 for q and for v. Two seeds at the largest
rank share more for q than for v if the interval of phi(8, 8) of q less that of v, over layers (the
pairs of seeds are not independent, so their mean is taken), lies above 0."""
BY, STUDY, SMALL = ["targets", "rank"], "lora_table6_rank", 8
COMMANDS = commands(STUDY, *LADDER, "SmolLM2-135M random")
PARTS = (
    "two ranks share the top direction: phi(1, 1) > 0.5",
    "and only it: phi(1, 1) > phi(8, 8)",
    "two seeds share more for q than for v",
)
LEADING = (1, 2, 4, 8)


# ----------------------------------------------------------------------------------------- numbers


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes pairs.csv (every pair of members and matrix), maps.csv (phi between the ranks) and
    curves.csv (phi(i, i) between seeds)."""
    pairs, maps, curves = [], [], []
    for base, (directory,) in runs.items():
        found = pd.DataFrame(of_run(sweeps.load(directory, STUDY)))
        found.insert(0, "base", base)
        pairs.append(found.drop(columns="phi"))
        for name, group in found.groupby(["comparison", "kind", "target"], sort=False):
            comparison, kind, target = name
            about = {"base": base, "directions": kind, "target": target, "n": group["n"].iloc[0]}
            phi = np.stack(group["phi"])
            if comparison == "ranks" and kind in ("A", "dW in"):
                maps += [
                    about | {"i": i + 1, "j": j + 1, "phi": x}
                    for (i, j), x in np.ndenumerate(phi.mean(0))
                ]
            if comparison == "seeds":
                curves += [about | row for row in diagonal(group, phi)]
    write(pd.concat(pairs), folder, "pairs.csv")
    write(pd.DataFrame(maps), folder, "maps.csv")
    write(pd.DataFrame(curves), folder, "curves.csv")


def of_run(sweep: sweeps.Sweep) -> list[dict]:
    """phi of each matrix and kind of directions, for each pair of members."""
    own = sweeps.at_best(sweep, BY).query("targets == 'q v'")
    large, seeds = own["rank"].max(), sorted(set(own["seed"]))
    chosen = own[own["rank"].isin((SMALL, large))]
    bases = {
        (row.rank, row.seed): tables.bases(sweep.run.adapter(row.Index))
        for row in chosen.itertuples()
    }
    doubt = next((words for words in chosen["doubt"] if words), "")
    rates = chosen.groupby("rank")["lr"].first()
    pairs = {
        "ranks": [((SMALL, s), (large, s)) for s in seeds],
        "ranks, other seeds": [((SMALL, s), (large, t)) for s in seeds for t in seeds if s != t],
        "seeds": [((large, s), (large, t)) for s, t in itertools.combinations(seeds, 2)],
    }
    rows = []
    for comparison, of_members in pairs.items():
        for one, other in of_members:
            for path, kind in itertools.product(bases[one], tables.KINDS):
                u, v = bases[one][path][kind], bases[other][path][kind]
                layer, target = tables.layer_and_target(path)
                phi = basis_similarity(u, v)
                row = {"comparison": comparison, "seed1": one[1], "seed2": other[1]}
                row |= {"lr1": rates[one[0]], "lr2": rates[other[0]], "doubt": doubt}
                row |= {"layer": layer, "target": target, "kind": kind, "n": len(u)}
                row |= {f"phi_{i}_{i}": phi[i - 1, i - 1] for i in LEADING}
                rows.append(row | {"phi": phi})
    return rows


def diagonal(group: pd.DataFrame, phi: np.ndarray) -> list[dict]:
    """phi(i, i) of two seeds: means over pairs and layers with the interval over layers, and what
    two random subspaces have (5% to 95%)."""
    phi = np.diagonal(phi, axis1=1, axis2=2)
    band = chance_similarity(group["n"].iloc[0], phi.shape[1], phi.shape[1])
    rows = []
    for i in range(phi.shape[1]):
        mean = crossed(group.assign(x=phi[:, i]).groupby("layer")["x"].mean().to_frame().T)
        row = {"i": i + 1, "phi": mean.value, "phi_low": mean.low, "phi_high": mean.high}
        rows.append(row | {"low": band.low[i, i], "high": band.high[i, i]})
    return rows


# ---------------------------------------------------------------------------------------- verdicts


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, pairs in numbers(folder, "pairs.csv").groupby("base", sort=False):
        of_a = pairs[pairs["kind"] == "A"]
        doubts = pairs["doubt"].dropna()
        if len(doubts):
            found += [Verdict(part, base, WITHDRAWN, doubts.iloc[0]) for part in PARTS]
            continue
        ranks = of_a[of_a["comparison"] == "ranks"]
        falls = ranks.assign(falls=ranks["phi_1_1"] - ranks["phi_8_8"])
        found.append(decided(PARTS[0], base, of_targets(ranks, "phi_1_1"), 0.5))
        found.append(decided(PARTS[1], base, of_targets(falls, "falls"), 0.0))
        found.append(q_against_v(base, of_a[of_a["comparison"] == "seeds"]))
    return complete(found, PARTS)


def of_targets(rows: pd.DataFrame, column: str) -> dict[str, Interval]:
    """{target: the interval of a column over seeds and layers}."""
    return {
        target: crossed(own.pivot(index="seed1", columns="layer", values=column))
        for target, own in rows.groupby("target")
    }


def decided(part: str, base: str, of: dict[str, Interval], margin: float) -> Verdict:
    """Whether the intervals of q and v lie above the margin."""
    verdict = all_of(by_interval(interval, "above", margin) for interval in of.values())
    number = "; ".join(f"{target} {shown(interval, 2)}" for target, interval in of.items())
    least = min(of.values(), key=lambda interval: interval.value)
    return Verdict(part, base, verdict, number, least)


def q_against_v(base: str, seeds: pd.DataFrame) -> Verdict:
    """Whether phi(8, 8) of two seeds is higher for q than for v, layer by layer."""
    means = seeds.pivot_table(index="layer", columns="target", values="phi_8_8")
    difference = crossed((means["q"] - means["v"]).to_frame().T)
    return Verdict(
        PARTS[2], base, by_interval(difference, "above"), shown(difference, 2), difference
    )
