"""Does the rank of dW grow over training, beyond what noise does? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    LADDER,
    Verdict,
    by_interval,
    by_signs,
    commands,
    complete,
    numbers,
    shown,
    write,
)
from lorax import rundir, spectrum
from lorax.analysis import compare
from lorax.analysis.tables.matrices import layer_and_target
from lorax.interop.tensors import read_arrays

CLAIM = "the number of directions with 90% of dW's energy grows over training"
SOURCE = "Biderman et al. (arXiv:2405.09673), section 4.6"
RULE = (
    "k is the number of singular values with 90% of dW's energy, the mean over matrices. Grows: "
    "the slope of k on log2 of the step is positive in at least 9 of 10 seeds (p = 0.02 by a "
    "sign test; of other numbers of seeds in as many as have p < 0.05); it does not if it is "
    "negative in as many. Not noise alone: k less the k of the part of dW below the edge "
    "of the noise (singular values up to (sqrt(in) + sqrt(out)) times that part's own standard "
    "deviation) has a slope whose 95% interval over seeds lies above 0. More in the feed-forward "
    "layers: the 95% interval over seeds of their k at the end less that of attention, each over "
    "the largest that a matrix can have, lies above 0."
)
STUDY = "over_training"
COMMANDS = commands(STUDY, *LADDER)
GROWS = {"full": "full fine-tuning: grows", "lora": "LoRA: grows"}
SIGNAL = "full fine-tuning: not noise alone"
MLP = "full fine-tuning: feed-forward above attention"
PARTS = (*GROWS.values(), SIGNAL, MLP)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """ranks.csv: a row a base, method, seed, step and kind of matrix: `k`, the means over matrices
    of the number of singular values with 90% of the energy, `share` of what is possible, `noise`,
    the same number of the part below the noise's edge, and `above`, how many values are above."""
    tables = []
    for base, sweep in sweeps.each(runs, STUDY):
        table = pd.DataFrame(_rows(sweep))
        table = table.groupby(["method", "seed", "step", "kind"], as_index=False).mean()
        table.insert(0, "base", base)
        tables.append(table)
    write(pd.concat(tables), folder, "ranks.csv")


def _rows(sweep):
    """A dictionary a member, step and matrix that LoRA adapts."""
    finished = sweep.table[sweep.table["status"] == "finished"]
    adapter = sweep.run.adapter(finished.index[finished["method"] == "lora"][0])
    shapes = {path: (f.a.shape[0], f.b.shape[1]) for path, f in adapter.items()}
    for file in rundir.spectra_files(sweep.run.directory):
        arrays, step = read_arrays(file), int(file.stem)
        for n, member in enumerate(arrays["members"].tolist()):
            if member not in finished.index or not step:
                continue
            own = {column: finished.loc[member, column] for column in ("method", "seed")}
            for path, shape in shapes.items():
                sigma = arrays[f"{path}/sigma"][n].astype(float)
                if sigma.any():
                    yield own | {"step": step, "kind": kind_of(path)} | measured(sigma, shape)


def measured(sigma: np.ndarray, shape: tuple[int, int]) -> dict:
    """The numbers of ranks.csv of one matrix. sigma: of dW, descending."""
    split, k = above_noise(sigma, *shape), int(spectrum.energy_rank(sigma))
    noise = int(spectrum.energy_rank(sigma[split:]))
    return {"k": k, "share": k / min(shape), "noise": noise, "above": split}


def kind_of(path: str) -> str:
    target = layer_and_target(path)[1]
    return "attention" if target in ("q", "k", "v", "o") else "feed-forward"


def above_noise(sigma: np.ndarray, n_in: int, n_out: int) -> int:
    """How many singular values lie above the largest that i.i.d. noise (n_in, n_out) has with the
    standard deviation of the rest: (sqrt(n_in) + sqrt(n_out)) of it (Baik, Ben Arous and Peche
    2005). sigma: descending. The count is the smallest that agrees with itself."""
    energy = np.cumsum(sigma[::-1] ** 2)[::-1]  # of sigma[k:]
    for k in range(len(sigma)):
        left = (n_in - k) * (n_out - k)
        if sigma[k] <= (np.sqrt(n_in) + np.sqrt(n_out)) * np.sqrt(energy[k] / left):
            return k
    return len(sigma)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "ranks.csv").groupby("base", sort=False):
        found += [grows(base, table, method) for method in GROWS]
        full = table[table["method"] == "full"]
        found += [not_noise(base, full), feed_forward(base, full)]
    return complete(found, PARTS)


def slopes(table: pd.DataFrame, column: str) -> np.ndarray:
    """One a seed: the slope of a column, the mean over kinds, on log2 of the step."""
    means = table.pivot_table(index="step", columns="seed", values=column)
    return np.polyfit(np.log2(means.index), means, 1)[0]


def grows(base: str, table: pd.DataFrame, method: str) -> Verdict:
    found = slopes(table[table["method"] == method], "k")
    interval = compare.interval(found)
    number = (
        f"in {(found > 0).sum()} of {len(found)} seeds, {shown(interval, 2)} directions a doubling"
    )
    return Verdict(GROWS[method], base, by_signs(found, "above"), number, interval)


def not_noise(base: str, full: pd.DataFrame) -> Verdict:
    excess = compare.paired(slopes(full, "k"), slopes(full, "noise"))
    number = f"{shown(excess, 2)} directions a doubling more than below the noise's edge"
    return Verdict(SIGNAL, base, by_interval(excess, "above"), number, excess)


def feed_forward(base: str, full: pd.DataFrame) -> Verdict:
    last = full[full["step"] == full["step"].max()]
    share = last.pivot(index="seed", columns="kind", values="share")
    more = compare.paired(share["feed-forward"], share["attention"])
    number = f"by {shown(more)} of the largest rank"
    return Verdict(MLP, base, by_interval(more, "above"), number, more)
