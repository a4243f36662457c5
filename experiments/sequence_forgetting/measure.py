"""Intruders that a sequence of tasks has put into every member's weights, after each task.

    python -m experiments.sequence_forgetting.measure runs/forgetting_sequence --workdir=OUT

Writes OUT/intruders.csv, a row a member and task: intruders (k = 10, epsilon = 0.5, output side)
of all that was added since the first base, summed over the matrices that LoRA adapts, and those of
a control of the same singular values in random directions; and the norm of what was added.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import forgetting, intruders, norm_matched, runs
from lorax.report import bases

K, EPSILON = 10, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    table = forgetting.sequence(arguments.run)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    measured(arguments.run, table).to_csv(arguments.workdir / "intruders.csv", index=False)


def measured(directory: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of intruders.csv. table: of `forgetting.sequence`."""
    keys = ["number", "after", "member", "first", "line", "lr", "seed"]
    first = runs.load(folder(directory, table.iloc[0]))
    start = bases.load(first.config["config"]["base"])
    lora = first.members.index[first.members["method"] == "lora"][0]
    start = {path: np.asarray(start[path], np.float64) for path in first.update(lora)}
    svds = {path: np.linalg.svd(w, full_matrices=False) for path, w in start.items()}
    rng, rows = np.random.default_rng(0), []
    for _, row in table[keys].drop_duplicates().iterrows():
        now = bases.load(str(rundir.merged(folder(directory, row), row["member"])))
        found, control, norm = 0, 0, 0.0
        for path, w in start.items():
            added = np.asarray(now[path], np.float64) - w
            count = lambda change, w=w, path=path: int(
                intruders(w, change, K, EPSILON, w_svd=svds[path]).count
            )
            found, control = found + count(added), control + count(norm_matched(rng, added))
            norm += float(np.square(added).sum())
        rows.append(row.to_dict() | {"intruders": found, "control": control, "norm": norm**0.5})
    return pd.DataFrame(rows)


def folder(directory: Path, row: pd.Series) -> Path:
    """The run directory of a row's task."""
    return Path(directory) / f"{row['number']}-{row['after']}"


if __name__ == "__main__":
    main()
