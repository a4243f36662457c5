"""How far are 4-bit weights from the weights? NF4, FP4 and INT4, blocks of 64 numbers.

    python -m experiments.nf4_error.run [--data=DIR] [--workdir=DIR]

DIR (or $LORAX_DATA) holds models/stories-llama-260k; without it gpt2-nano alone is measured beside
the normal distribution. Writes numbers.csv and figure.png beside this file.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments.plotting import COLOURS, MARKERS, STYLE
from lorax import methods, quant, tree

HERE = Path(__file__).parent
SEEDS, SIZE, BLOCK = range(8), 1024, 64
FORMATS = ("nf4", "nf4, double quantisation", "int4, 16 levels from -8 to 7", "int4, 15 levels")
FORMATS += ("int4, 16 levels without 0", "fp4")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("LORAX_DATA"))
    parser.add_argument("--workdir", default=HERE, type=Path, help="for tables and figures")
    flags = parser.parse_args()
    data, folder = flags.data, flags.workdir
    folder.mkdir(parents=True, exist_ok=True)

    # --------------------------------------------------------------------- N(0, 1), a seed a row
    rows = []
    for seed in SEEDS:
        w = jax.random.normal(jax.random.key(seed), (SIZE, SIZE))
        rows += errors("N(0,1)", f"seed {seed}", w)

    # ------------------------------------------------------- the linear layers of real models
    names = ["gpt2-nano"]
    if data and (Path(data) / "models/stories-llama-260k").exists():
        names.append(str(Path(data) / "models/stories-llama-260k"))
    else:
        print("no stories-llama-260k in --data: gpt2-nano alone")
    for name in names:
        base = lorax.load(name)
        flat = tree.flatten(base.params)
        for path, site in methods.resolve(("all-linear",), base.sites).items():
            for layer, w in enumerate(site.to_matrix(flat[path])):
                rows += errors(Path(name).name, f"{path}, layer {layer}", w)

    # ------------------------------------------------------------------------------------ results
    table = pd.DataFrame(rows)
    table["over_nf4"] = table["mse"] / table.groupby(["base", "of"])["mse"].transform("first")
    table.to_csv(folder / "numbers.csv", index=False, float_format="%.6g", lineterminator="\n")
    each = table.groupby(["base", "format"], sort=False)
    shown = each.agg(
        n=("of", "size"),
        mse=("mse", "mean"),
        se=("mse", "sem"),
        over_nf4=("over_nf4", "mean"),
        over_nf4_se=("over_nf4", "sem"),
        least=("over_nf4", "min"),
        most=("over_nf4", "max"),
        worse_than_nf4=("over_nf4", lambda x: (x > 1).sum()),
    )
    print(shown.to_string(float_format=lambda x: f"{x:.5f}"))
    closer = table[(table["format"] == FORMATS[2]) & (table["base"] != "N(0,1)")]
    print("INT4 over NF4 against peak, rank correlation:")
    print(closer[["over_nf4", "peak"]].corr(method="spearman").to_string())
    print(closer[closer["over_nf4"] < 1].to_string())
    figure(table).savefig(folder / "figure.png", dpi=110)


def errors(weights, of, w):
    """A row for each format: mean squared error over the mean square of w (in, out); and how far a
    block's largest number stands out, over its root mean square, on average (2.61 for N(0, 1))."""
    w = jnp.asarray(w, jnp.float32)
    decoded = {
        "nf4": quant.quantise(w, "nf4", BLOCK).decoded(),
        "nf4, double quantisation": quant.quantise(w, "nf4", BLOCK, double=True).decoded(),
        "fp4": quant.quantise(w, "fp4", BLOCK).decoded(),
    }
    # lorax quantises the transpose row by row, as bitsandbytes; these have the same blocks.
    x = np.asarray(w).T.reshape(-1, BLOCK)
    absmax = np.abs(x).max(axis=1, keepdims=True)
    signed = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    levels = {
        "int4, 15 levels": np.rint(x / absmax * 7) * absmax / 7,
        # The largest number of a block is -8 of 8, whichever its sign.
        "int4, 16 levels from -8 to 7": np.clip(np.rint(x / -signed * 8), -8, 7) * -signed / 8,
        "int4, 16 levels without 0": (np.rint(x / absmax * 7.5 - 0.5) + 0.5) * absmax / 7.5,
    }
    decoded |= {name: y.reshape(w.T.shape).T for name, y in levels.items()}
    size = np.mean(np.square(np.asarray(w, float)))
    peak = np.mean(absmax / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True)))
    return [
        {"base": weights, "of": of, "format": name, "peak": peak}
        | {"mse": np.mean(np.square(np.asarray(decoded[name], float) - np.asarray(w))) / size}
        for name in FORMATS
    ]


def figure(table) -> Figure:
    """Mean squared error of each format, with the standard error over seeds or matrices."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = drawn.add_subplot()
        for n, (weights, own) in enumerate(table.groupby("base", sort=False)):
            found = own.groupby("format", sort=False)["mse"].agg(["mean", "sem"]).loc[list(FORMATS)]
            y = np.arange(len(FORMATS)) + 0.2 * (n - 1)
            what = "seeds" if weights == "N(0,1)" else "matrices"
            label = f"{weights}, {own['of'].nunique()} {what}"
            style = {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": ""}
            axes.errorbar(found["mean"], y, xerr=found["sem"], capsize=3, label=label, **style)
        axes.set_yticks(range(len(FORMATS)), FORMATS)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("mean squared error / mean square of the weights (± standard error)")
        axes.legend(loc="upper left")
        return drawn


if __name__ == "__main__":
    main()
