"""The LoRA paper's tables 5, 6 and 7 and figure 3 beside ours, from the committed numbers.

`experiments.tables` writes them into README.md. Published numbers: Hu et al. 2021
(arXiv:2106.09685), GPT-3 175B; accuracies in percent, of WikiSQL and of MultiNLI.
"""

from experiments import losses, verdicts
from experiments.losses import Losses
from experiments.sweeps import markdown
from experiments.verdicts import HERE, crossed, shown

TABLE_5 = {  # targets: WikiSQL (+-0.5), MultiNLI (+-0.1)
    "q": (70.4, 91.0),
    "k": (70.0, 90.8),
    "v": (73.0, 91.0),
    "o": (73.2, 91.3),
    "q k": (71.4, 91.3),
    "q v": (73.7, 91.3),
    "q k v o": (73.7, 91.7),
}
RANKS = (1, 2, 4, 8, 64)
TABLE_6 = {  # targets: accuracy at each of RANKS
    ("q", "WikiSQL"): (68.8, 69.6, 70.5, 70.4, 70.0),
    ("q v", "WikiSQL"): (73.4, 73.3, 73.7, 73.8, 73.5),
    ("q k v o", "WikiSQL"): (74.1, 73.7, 74.0, 74.0, 73.9),
    ("q", "MultiNLI"): (90.7, 90.9, 91.1, 90.7, 90.7),
    ("q v", "MultiNLI"): (91.3, 91.4, 91.3, 91.6, 91.4),
    ("q k v o", "MultiNLI"): (91.2, 91.7, 91.7, 91.5, 91.4),
}
TABLE_7 = {  # r: |U^T W V| of dW's, W's and random directions, |dW|; q of layer 48, |W| = 61.95
    4: (0.32, 21.67, 0.02, 6.91),
    64: (1.90, 37.71, 0.33, 3.57),
}
LEADING = (1, 2, 4, 8)  # i of phi(i, i)


def tables() -> str:
    """The page's four tables in Markdown, each under its heading."""
    parts = {
        "Table 5: which matrices, at one budget": table_5(),
        "Table 6: which rank": table_6(),
        "Figure 3: what two ranks share": figure_3(),
        "Table 7: what dW amplifies": table_7(),
    }
    return "\n\n".join(f"### {heading}\n\n{table}" for heading, table in parts.items())


def table_5() -> str:
    """A row a set of targets: the published accuracies, and our test losses."""
    ours = _tuned("targets")
    heads = ["targets", "r", "WikiSQL", "MultiNLI", *(f"{base}, loss" for base in ours)]
    ranks = {1: 8, 2: 4, 4: 2}
    rows = []
    for targets, published in TABLE_5.items():
        rank = ranks[len(targets.split())]
        own = [_loss(of, f"{targets}, {rank}") for of in ours.values()]
        rows.append([targets.replace(" ", ", "), rank, *published, *own])
    return markdown(heads, rows)


def table_6() -> str:
    """A row a set of targets and task: the published accuracies, and our test losses."""
    rows = [
        [targets.replace(" ", ", "), f"GPT-3, {task}, accuracy", *published]
        for (targets, task), published in TABLE_6.items()
    ]
    for base, of in _tuned("rank").items():
        ranks = {r: r for r in RANKS[:-1]} | {RANKS[-1]: of.members["rank"].max()}
        for targets in ("q", "q v", "q k v o"):
            own = [_loss(of, f"{targets}, {rank}") for rank in ranks.values()]
            if ranks[RANKS[-1]] != RANKS[-1]:
                own[-1] += f" (r = {ranks[RANKS[-1]]})"
            rows.append([targets.replace(" ", ", "), f"{base}, loss", *own])
    return markdown(["targets", "", *(f"r = {rank}" for rank in RANKS)], rows)


def figure_3() -> str:
    """A row a base and matrix: phi(i, i) of A at r = 8 and at the largest rank."""
    rows = [["GPT-3, layer 48", "q, v", "above 0.5", "", "", ""]]
    pairs = verdicts.numbers(HERE / "subspaces", "pairs.csv")
    pairs = pairs[(pairs["kind"] == "A") & (pairs["comparison"] == "ranks")]
    known = pairs[pairs["doubt"].isna()]  # the best rate
    for (base, target), own in known.groupby(["base", "target"], sort=False):
        at = lambda i, own=own: own.pivot(index="seed1", columns="layer", values=f"phi_{i}_{i}")
        rows.append([base, target, *(shown(crossed(at(i)), 2) for i in LEADING)])
    return markdown(["", "matrix", *(f"phi({i}, {i})" for i in LEADING)], rows)


def table_7() -> str:
    """A row a base, matrix and rank: |U^T W V| for three pairs of U and V, |dW|, their ratio."""
    heads = ["", "matrix", "r", "of dW", "of W", "of random", "norm of dW", "factor", "over chance"]
    rows = []
    for rank, (delta, own, drawn, norm) in TABLE_7.items():
        ratio, chance = f"{norm / delta:.1f}", f"{delta / drawn:.1f}"
        rows.append(["GPT-3, layer 48", "q", rank, delta, own, drawn, norm, ratio, chance])
    matrices = verdicts.numbers(HERE / "amplification", "matrices.csv")
    columns = ["w_in_delta", "w_in_w", "w_in_random", "delta_norm", "factor", "over_chance"]
    known = matrices[(matrices["k"] == matrices["rank"]) & matrices["doubt"].isna()]
    for setting, of in known.groupby(["base", "target", "rank"], sort=False):
        rows.append([*setting, *(f"{of[column].mean():.2f}" for column in columns)])
    return markdown(heads, rows)


def _tuned(claim: str) -> dict[str, Losses]:
    """{base: losses} of a claim's runs in which every setting has its own best rate."""
    found = losses.read(HERE / claim, ["targets", "rank"])
    return {base: of for base, of in found.items() if not of.doubts}


def _loss(of: Losses, setting: str) -> str:
    """A setting's loss with its interval; "-" where it was not run."""
    return shown(of.contrast({setting: 1})) if setting in of.by_seed else "-"
