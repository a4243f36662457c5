"""LoRA under Adam has fewer hyperparameters than it seems: the scale, the width of A's start and
both learning rates, changed together, change nothing.

    python -m experiments.adam_invariance.run [--data=DIR] [--workdir=DIR]

DIR (or $LORAX_DATA) holds models/stories-llama-260k and e2e/e2e-dataset.zip; without them gpt2-nano
alone is trained. Writes numbers.csv and figure.png beside this file.
"""

import argparse
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments.plotting import COLOURS, GREY, MARKERS, STYLE
from lorax import config, methods, tasks, tree
from lorax.train import step

HERE = Path(__file__).parent
STEPS, BATCH, RANK, ALPHA, LR, SEEDS = 48, 8, 8, 16.0, 3e-3, (0, 1, 2)
#: In float32 it adds nothing to a number above 1e-22, and makes 0 / 0, of A's first step, zero.
EPS = 1e-30
POWERS = ((8, 1), (1, 1 / 8), (4, 16), (1 / 4, 1 / 2), (16, 1 / 16))
OTHERS = ((3, 1), (1, 0.3), (3, 5), (0.7, 0.1), (10, 0.1))
CONTROLS = ("eps 1e-8", "clipping at norm 1", "lr not scaled", "init not scaled")
PAIR = (4, 16)  # of the controls


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("LORAX_DATA"))
    parser.add_argument("--workdir", default=HERE, type=Path, help="for tables and figures")
    flags = parser.parse_args()
    data, folder = flags.data, flags.workdir
    folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------- bases and tasks
    asked = [("gpt2-nano", {"name": "restaurants"})]
    if data and (Path(data) / "models/stories-llama-260k").exists():
        path = str(Path(data) / "e2e/e2e-dataset.zip")
        asked.append((str(Path(data) / "models/stories-llama-260k"), {"name": "e2e", "path": path}))
    else:
        print("no stories-llama-260k in --data: gpt2-nano alone")

    rows = []
    for name, settings in asked:
        base = lorax.load(name)
        task = tasks.build(settings, base.vocabulary, 128, 1)
        for seed in SEEDS:
            order = tasks.orders(tasks.size(task.train), BATCH, seed, range(STEPS))
            batches = {key: jnp.asarray(x[order][:, None]) for key, x in task.train.items()}
            run = functools.partial(train, base, batches, seed)

            # ----------------------------------------- (p, q), and what rounding alone would do
            reference = run(1, 1)
            settings = [("powers of two", p, q, run(p, q)) for p, q in POWERS]
            settings += [("other numbers", p, q, run(p, q)) for p, q in OTHERS]
            settings += [("A off by 1 in 2^23", 1, 1, run(1, 1, nudge=2.0**-23))]
            differ = [(*setting, reference) for setting in settings]
            # ------------------------------------- controls, each against its own (1, 1)
            p, q = PAIR
            for what, how in (("eps 1e-8", {"eps": 1e-8}), ("clipping at norm 1", {"clip": 1.0})):
                differ.append((what, p, q, run(p, q, **how), run(1, 1, **how)))
            differ.append(("lr not scaled", p, q, run(p, q, scale_lr=False), reference))
            differ.append(("init not scaled", p, q, run(p, q, scale_init=False), reference))
            for what, p, q, (losses, deltas, _), (losses0, deltas0, _) in differ:
                off = np.sqrt(sum(np.sum((deltas[k] - deltas0[k]) ** 2) for k in deltas))
                size = np.sqrt(sum(np.sum(deltas0[k] ** 2) for k in deltas))
                row = {"base": Path(name).name, "seed": seed, "what": what, "p": p, "q": q}
                row |= {"loss": losses[-1], "loss_difference": np.abs(losses - losses0).max()}
                rows.append(row | {"update_difference": off / size})
            print(f"{base.name}, seed {seed}: loss {reference[0][0]:.3f} to {reference[0][-1]:.3f}")
        # ---------------------------------------------------------------- eps = 0, to the letter
        print(f"with eps = 0 itself the loss is not finite in step {run(1, 1, eps=0.0)[2]}")

    table = pd.DataFrame(rows)
    table.to_csv(folder / "numbers.csv", index=False, float_format="%.6g", lineterminator="\n")
    columns = ["loss_difference", "update_difference"]
    shown = table.groupby(["base", "what", "p", "q"], sort=False)[columns]
    print(shown.agg(["mean", "sem"]).to_string(float_format=lambda x: f"{x:.3g}"))
    figure(table).savefig(folder / "figure.png", dpi=110)


def train(
    base, batches, seed, p, q, eps=EPS, clip=0.0, scale_lr=True, scale_init=True, nudge=0.0
):  # fmt: skip
    """(losses (STEPS,), {path: dW}, step that failed) of LoRA on q and v with (p, q) applied.

    LoRA+ gives b its own learning rate, `ratio` times that of a; B starts at zero, so that only A's
    start has a width. nudge: relative change of A's start.
    """
    by_lr = (p, q) if scale_lr else (1, 1)
    hp = dict(rank=RANK, alpha=ALPHA / (p * q), targets=("q", "v"))
    method = methods.method("lora+", ratio=by_lr[1] / by_lr[0], **hp)
    trainable, constants = method.init(jax.random.key(seed), base.params, base.sites)
    flat, wide = tree.flatten(trainable), (p if scale_init else 1) * (1 + nudge)
    flat |= {path: wide * x for path, x in flat.items() if path.endswith("/a")}
    trainable = tree.unflatten(flat)

    hyper = step.Hyper(jnp.float32(LR * by_lr[0]), jnp.float32(0), jax.random.key(0))
    run, start = program(base.name, eps, clip)
    state, logs = run(base.params, constants, hyper, start(trainable, constants, hyper), batches)
    deltas = method.delta(state.trainable, constants, base.params, base.sites)
    deltas = {path: np.asarray(x, float) for path, x in deltas.items()}
    return np.asarray(logs["loss"], float), deltas, int(state.diverged_at)


@functools.cache
def program(name, eps, clip):
    """(jitted `train_steps`, jitted `start`): one for all (p, q), which are data to them."""
    base, method = lorax.load(name), methods.method("lora+", rank=RANK, targets=("q", "v"))
    section = config.default().train
    section.update(steps=STEPS, schedule="constant", warmup=0, eps=eps, clip=clip)
    of = step.Program(base.module, method, base.sites, section, dropout=False, merge=True)
    start = lambda trainable, constants, hyper: step.start(
        method, trainable, constants, section, hyper, base.sites
    )
    return jax.jit(functools.partial(step.train_steps, of)), jax.jit(start)


def figure(table) -> Figure:
    """The update's relative difference, each seed and (p, q) a point."""
    kinds = list(dict.fromkeys(table["what"]))
    kinds.sort(key=lambda what: what in CONTROLS)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = drawn.add_subplot()
        for n, (base, own) in enumerate(table.groupby("base", sort=False)):
            x = [kinds.index(what) + 0.24 * n - 0.12 for what in own["what"]]
            y = own["update_difference"].clip(lower=1e-9)
            style = {"color": COLOURS[n], "marker": MARKERS[n]}
            axes.scatter(x, y, label=base, alpha=0.6, s=22, linewidths=0, **style)
        axes.set_yscale("log")
        marks = {1e-9: "0", 1e-8: "1e-8", 1e-6: "1e-6", 1e-4: "1e-4", 1e-2: "0.01", 1: "1"}
        axes.set_yticks(list(marks), marks.values())
        axes.set_xticks(range(len(kinds)), [what.replace(" ", "\n", 1) for what in kinds])
        axes.set_ylabel(f"|dW - dW of (1, 1)| / |dW|, step {STEPS}")
        axes.axvline(2.5, color=GREY, linewidth=0.8)
        axes.text(2.6, axes.get_ylim()[1], "controls", va="bottom", color=GREY)
        axes.legend(loc="center right")
        return drawn


if __name__ == "__main__":
    main()
