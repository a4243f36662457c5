"""Do ranks, and seeds, find the same subspaces? Reads runs of configs/lora_table6_rank.py.

    python -m experiments.subspaces.figure runs/lora_table6_rank runs/lora_table6_rank-stories

Takes the members on q and v of rank 8 and of the largest rank. Writes pairs.csv, curves.csv,
maps.csv, ranks.png and seeds.png beside itself and prints the tables of the README.
"""

import itertools
import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import COLOURS, DASHES, MARKERS, STYLE
from lorax.analysis import basis_similarity, chance_similarity, expected_similarity, tables

HERE = pathlib.Path(__file__).parent
SMALL = 8
MAPS = ("A", "dW in")  # whose maps are drawn
TITLES = {"A": "A", "B": "B", "dW in": "ΔW, input side", "dW out": "ΔW, output side"}


def table(found: list[dict], shape: tuple[int, int]) -> list[dict]:
    """A row a target and kind: phi(i, j) ± its standard error over pairs and layers, chance in
    brackets, and how many pairs have a phi(1, 1) above chance's 95% quantile.

    found: a dict a pair and matrix, of `compare`; shape: (r1, r2).
    """
    rows = []
    spaces = {row["n"] for row in found}
    high = {n: chance_similarity(n, 1, 1).high[0, 0] for n in spaces}
    for kind, target in itertools.product(tables.KINDS, ("q", "v")):
        own = [row for row in found if row["kind"] == kind and row["target"] == target]
        phi, n = np.stack([row["phi"] for row in own]), own[0]["n"]
        row = {"directions of": kind, "target": target, "n": n}
        for i, j in dict.fromkeys([(1, 1), (1, 8), (2, 2), (4, 4), (8, 8), shape]):
            words = sweeps.words(phi[:, i - 1, j - 1], 2)
            row[f"phi({i}, {j})"] = f"{words} ({expected_similarity(i, j, n):.2f})"
        rows.append(row | {"above chance": f"{(phi[:, 0, 0] > high[n]).sum()} of {len(phi)}"})
    return rows


def q_against_v(found: list[dict]) -> list[dict]:
    """A row a kind: phi(i, i) of q minus that of v, pair by pair and layer by layer, where both are
    of one space."""
    rows = []
    for kind in tables.KINDS:
        own = [row for row in found if row["kind"] == kind]
        if len({row["n"] for row in own}) > 1:
            continue
        q, v = (np.stack([x["phi"] for x in own if x["target"] == target]) for target in "qv")
        words = {f"phi({i}, {i})": sweeps.words((q - v)[:, i - 1, i - 1], 2) for i in (1, 2, 4, 8)}
        rows.append({"directions of": kind} | words)
    return rows


def compare(bases: dict, pairs: list) -> list[dict]:
    """phi (r1, r2) of each matrix and kind, for each pair of members (rank, seed)."""
    found = []
    for one, other in pairs:
        for path, kind in itertools.product(bases[one], tables.KINDS):
            u, v = bases[one][path][kind], bases[other][path][kind]
            layer, target = tables.layer_and_target(path)
            row = {"seed1": one[1], "seed2": other[1], "layer": layer, "target": target}
            row |= {"kind": kind, "n": len(u), "phi": basis_similarity(u, v)}
            found.append(row)
    return found


def mean(found: list[dict], kind: str, target: str) -> tuple[np.ndarray, np.ndarray, int]:
    """phi's mean and standard error over pairs and layers, and n."""
    own = [row for row in found if row["kind"] == kind and row["target"] == target]
    phi = np.stack([row["phi"] for row in own])
    return phi.mean(0), phi.std(0, ddof=1) / np.sqrt(len(phi)), own[0]["n"]


def learned(adapter: dict, rank: int) -> dict[str, float]:
    """{target: how many singular values of A are above those of a start, mean over layers}.

    The start is uniform with variance 1 / (3 in); its largest singular value is, by Marchenko and
    Pastur's law, (1 + sqrt(r / in)) / sqrt(3).
    """
    counts = {"q": [], "v": []}
    for path, factors in adapter.items():
        edge = (1 + np.sqrt(rank / len(factors.a))) / np.sqrt(3)
        above = np.linalg.svd(factors.a, compute_uv=False) > edge
        counts[tables.layer_and_target(path)[1]].append(above.sum())
    return {target: float(np.mean(values)) for target, values in counts.items()}


# ------------------------------------------------------------------------------------------ tables

found = sweeps.read("lora_table6_rank", __doc__)
results, pairs, curves, maps = {}, [], [], []
for sweep in found:
    own = sweep.table[sweep.table["targets"] == "q v"]
    large, seeds = own["rank"].max(), sorted(set(own["seed"]))
    members = {(row.rank, row.seed): row.member for row in own.itertuples()}
    members = {key: member for key, member in members.items() if key[0] in (SMALL, large)}
    adapters = {key: sweep.run.adapter(member) for key, member in members.items()}
    bases = {key: tables.bases(adapter) for key, adapter in adapters.items()}
    compared = {
        "ranks": [((SMALL, s), (large, s)) for s in seeds],
        "ranks, other seeds": [((SMALL, s), (large, t)) for s in seeds for t in seeds if s != t],
        "seeds": [((large, s), (large, t)) for s, t in itertools.combinations(seeds, 2)],
    }
    words = {
        "ranks": f"r = {SMALL} against r = {large}, same seed",
        "ranks, other seeds": f"r = {SMALL} against r = {large}, other seed",
        "seeds": f"two seeds at r = {large}",
    }
    for name, of_members in compared.items():
        results[sweep.size, name] = phis = compare(bases, of_members)
        print(f"{sweep.size}: {words[name]}, {len(of_members)} pairs\n")
        sweeps.markdown(table(phis, (large if name == "seeds" else SMALL, large)))
        for row in phis:
            some = {f"phi_{i}_{i}": row["phi"][i - 1, i - 1] for i in (1, 2, 4, 8)}
            about = {"base": sweep.size, "comparison": name}
            pairs.append(about | {k: v for k, v in row.items() if k != "phi"} | some)
    print(f"{sweep.size}: q minus v, {words['seeds']}\n")
    sweeps.markdown(q_against_v(results[sweep.size, "seeds"]))
    print(f"{sweep.size}: singular values of A above those of a random start\n")
    rows = []
    for r in (SMALL, large):
        above = pd.DataFrame([learned(adapters[r, seed], r) for seed in seeds])
        rows.append({"r": r} | {target: sweeps.words(above[target], 1) for target in above})
    sweeps.markdown(rows)

pd.DataFrame(pairs).to_csv(HERE / "pairs.csv", index=False, float_format="%.4g")

# ----------------------------------------------------------------------------- figure 3: two ranks

with matplotlib.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
    height = 0.7 + 1.5 * len(MAPS) * len(found)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    grid = figure.subplots(len(MAPS) * len(found), 3, squeeze=False)
    for line, (sweep, kind) in zip(grid, itertools.product(found, MAPS), strict=True):
        phi = {target: mean(results[sweep.size, "ranks"], kind, target) for target in ("q", "v")}
        n = phi["q"][2]
        chance = chance_similarity(n, *phi["q"][0].shape).mean
        values = {"q": phi["q"][0], "v": phi["v"][0], "chance": chance}
        for panel, (target, value) in zip(line, values.items(), strict=True):
            r1, r2 = value.shape
            extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)
            style = {"vmin": 0, "vmax": 1, "cmap": "cividis", "interpolation": "nearest"}
            image = panel.imshow(value, aspect="auto", extent=extent, **style)
            panel.set_xticks([1, *range(r2 // 4, r2 + 1, r2 // 4)])
            panel.set_yticks([1, 4, 8])
            panel.set_title(f"{target} (n = {n})" if target not in ("q", "v") else target)
            maps += [
                {"base": sweep.size, "directions": kind, "target": target}
                | {"i": i + 1, "j": j + 1, "phi": x}
                for (i, j), x in np.ndenumerate(value)
            ]
        line[0].set_ylabel(f"{sweep.size}\n{TITLES[kind]}\ni, of r = 8")
        line[1].set_xlabel(f"j, of r = {r2}")
    figure.colorbar(image, ax=grid, shrink=0.5).set_label("φ(i, j), mean over layers and seeds")
    figure.savefig(HERE / "ranks.png", dpi=150)
pd.DataFrame(maps).to_csv(HERE / "maps.csv", index=False, float_format="%.4g")

# ----------------------------------------------------------------------------- figure 4: two seeds

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(9.2, 0.6 + 2.3 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(tables.KINDS), sharex="row", sharey=True, squeeze=False)
    for line, sweep in zip(grid, found, strict=True):
        for panel, kind in zip(line, tables.KINDS, strict=True):
            for n, target in enumerate(("q", "v")):
                phi, error, space = mean(results[sweep.size, "seeds"], kind, target)
                phi, error = np.diag(phi), np.diag(error)
                i = np.arange(1, len(phi) + 1)
                style = {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": DASHES[n]}
                panel.errorbar(i, phi, error, capsize=2, markersize=3, label=target, **style)
                band = chance_similarity(space, len(i), len(i))
                low, high = np.diag(band.low), np.diag(band.high)
                label = "two random subspaces, 5 to 95%"
                style = {"color": "0.45", "alpha": 0.35, "linewidth": 0}
                panel.fill_between(i, low, high, label=label, **style)
                about = {"base": sweep.size, "directions": kind, "target": target, "n": space}
                columns = {"i": i, "phi": phi, "se": error, "low": low, "high": high}
                curves.append(pd.DataFrame(columns).assign(**about))
            panel.set_xscale("log", base=2)
            panel.set_xticks(powers := 2 ** np.arange(len(i).bit_length()), powers)
            panel.set_title(
                {"dW in": "ΔW, input side", "dW out": "ΔW, output side"}.get(kind, kind)
            )
        line[0].set_ylabel(f"{sweep.size}\nφ(i, i), two seeds")
        line[0].set_ylim(0, 1.02)
    figure.supxlabel("i: leading directions", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    labelled = dict(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=3)
    figure.savefig(HERE / "seeds.png", dpi=150)
pd.concat(curves).to_csv(HERE / "curves.csv", index=False, float_format="%.4g")
