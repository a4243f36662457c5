"""LoRA that starts from the base's weights or from data: is step 0 the base, and does PiSSA learn
faster?

    python -m experiments.starts_step0.run [--data=DIR] [--workdir=DIR]

DIR (or $LORAX_DATA) holds models/stories-llama-260k and e2e/e2e-dataset.zip; without them gpt2-nano
alone is measured. Writes starts.csv, training.csv and figure.png beside this file.
"""

import argparse
import functools
import os
import tempfile
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments.plotting import COLOURS, GREY, MARKERS, STYLE
from lorax import config, tree
from lorax.train import fitting, layouts, prepare
from lorax.train.batches import eval_batches, train_batches

HERE = Path(__file__).parent
STARTS = ("kaiming", "pissa", "olora", "eva", "corda", "lora-ga")
ON_NF4 = ("kaiming", "loftq")  # of a base in 4 bits
STEPS, LRS, SEEDS, PART = 60, (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2), 10
TOLERANCE = 1e-5  # of the largest logit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("LORAX_DATA"))
    parser.add_argument("--workdir", default=HERE, type=Path, help="for tables and figures")
    flags = parser.parse_args()
    data, folder = flags.data, flags.workdir
    folder.mkdir(parents=True, exist_ok=True)
    layouts.split_cpu()
    # Starts that read data compile one program for every seed: the same one.
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)

    # ---------------------------------------------------------------------------------- settings
    nano = config.default()
    nano.method.update(rank=8, alpha=8.0, targets=("all-linear",))  # s = 1, as PiSSA's authors
    nano.train.update(steps=STEPS, batch_size=4, schedule="constant", warmup=5)
    nano.eval.examples = 8
    nano.sweep.seed = SEEDS
    settings = [nano]
    if data and (Path(data) / "models/stories-llama-260k").exists():
        stories = nano.copy_and_resolve_references()
        stories.base = str(Path(data) / "models/stories-llama-260k")
        stories.task.update(name="e2e", path=str(Path(data) / "e2e/e2e-dataset.zip"))
        settings.append(stories)
    else:
        print("no stories-llama-260k in --data: gpt2-nano alone")

    # ------------------------------------------------------------------------------------ step 0
    write = dict(index=False, float_format="%.6g", lineterminator="\n")
    starts, training, loaded = [], [], prepare.Loaded({}, {})
    for c in settings:
        forward = jax.jit(functools.partial(lorax.apply, lorax.load(c.base).module))
        for quantised, inits in ((None, STARTS), ("nf4", ON_NF4)):
            c.update(quant=quantised)
            c.sweep.update(init=inits, lr=())
            for group in prepare.groups(config.members(c), print, loaded=loaded):
                starts += step_0(group, c.base, forward)
    starts = pd.DataFrame(starts)
    starts.to_csv(folder / "starts.csv", **write)
    pd.set_option("display.width", 200)
    each = starts.groupby(["base", "quant", "init"], sort=False)[["largest", "rms", "of_quantised"]]
    print(each.agg(["mean", "sem"]).to_string(float_format=lambda x: f"{x:.3g}"))

    # ------------------------------------------------------------------- PiSSA beside LoRA's own
    for c in settings:
        c.update(quant=None)
        c.sweep.update(init=("kaiming", "pissa"), lr=LRS)
        for group in prepare.groups(config.members(c), print, loaded=loaded):
            losses = train(group)  # (M, STEPS)
            for member, own in zip(group.stack.members, losses, strict=True):
                row = {"base": Path(c.base).name} | {
                    key: member.point[key] for key in ("init", "lr", "seed")
                }
                parts = own.reshape(-1, PART).mean(axis=1)
                row |= {f"to_{PART * (i + 1)}": loss for i, loss in enumerate(parts)}
                training.append(row | {"mean": own.mean()})

    training = pd.DataFrame(training)
    training.to_csv(folder / "training.csv", **write)
    each = training.groupby(["base", "init", "lr"], sort=False)[["mean", f"to_{STEPS}"]]
    print(each.agg(["mean", "sem"]).to_string(float_format=lambda x: f"{x:.4f}"))
    for base in starts["base"].unique():
        own = {init: best(training, base, init) for init in ("kaiming", "pissa")}
        for column in ("mean", f"to_{STEPS}"):
            gain = own["kaiming"][column].to_numpy() - own["pissa"][column].to_numpy()
            se = gain.std(ddof=1) / np.sqrt(len(gain))
            print(f"{base}, {column}: kaiming - pissa = {gain.mean():.4f} +- {se:.4f}", gain)
    figure(starts, training).savefig(folder / "figure.png", dpi=110)


def step_0(group, name, forward):
    """A row for each member: how far its logits at step 0 are from the base's own in float32.

    largest: of the largest logit; rms: root mean square over that of the logits. Of a base in 4
    bits also of_quantised: rms over what it is for that base without an adapter.
    """
    base, stack = group.base, group.stack
    tokens = group.task.eval["tokens"][:, :-1]
    rms = lambda x: float(np.sqrt(np.mean(np.square(x, dtype=float))))
    quantised = stack.members[0].config.quant
    own = np.asarray(forward(base.params, tokens))
    exact = np.asarray(forward(lorax.load(name).params, tokens)) if quantised else own
    for i, (member, method) in enumerate(zip(stack.members, stack.methods, strict=True)):
        state = jax.tree.map(lambda x: x[i], (stack.state.trainable, stack.constants))  # noqa: B023
        logits = np.asarray(forward(method.bind(*state, base.params, sites=base.sites), tokens))
        # LoftQ is there to come close to the weights as they were; the others keep the base.
        target = exact if member.point["init"] == "loftq" else own
        off = logits - target
        yield {
            "base": Path(name).name,
            "quant": quantised or "none",
            "init": member.point["init"],
            "seed": member.point["seed"],
            "largest": float(np.abs(off).max() / np.abs(target).max()),
            "rms": rms(off) / rms(target),
            "of_quantised": rms(logits - exact) / rms(own - exact) if quantised else np.nan,
        }


def train(group):
    """The group's training losses, (M, STEPS), nats a completion token."""
    stack, task, section = group.stack, group.task, group.stack.members[0].config.train
    batches = train_batches(stack, task, 0, STEPS)
    one = tree.shapes({key: x[0] for key, x in batches.items()})
    evals = tree.shapes(eval_batches(task, 8))
    programs = fitting.fit(stack, group.base, section, one, evals, task.kind)
    params, state = programs.place_base(group.base.params), programs.place_state(stack.state)
    data = programs.place(stack.constants), programs.place(stack.hyper)
    _, logs = programs.train(params, *data, state, programs.place_batches(batches))
    return np.asarray(logs["loss"])


def best(training, base, init):
    """A base's and a start's rows at the learning rate of the lowest mean loss in the end."""
    own = training[(training["base"] == base) & (training["init"] == init)]
    lr = own.groupby("lr")[f"to_{STEPS}"].mean().idxmin()
    return own[own["lr"] == lr].sort_values("seed")


def figure(starts, training) -> Figure:
    """Step 0 of every start, and the training loss of two at their best learning rates."""
    bases = list(starts["base"].unique())
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(4 + 3 * len(bases), 3.4), layout="constrained")
        axes = drawn.subplots(1, 1 + len(bases), width_ratios=[1.2] + [1] * len(bases))
        kept = starts[(starts["quant"] == "none")]
        for n, base in enumerate(bases):
            own = kept[kept["base"] == base]
            y = [STARTS.index(init) + 0.2 * n for init in own["init"]]
            style = {"color": COLOURS[n], "marker": MARKERS[n], "alpha": 0.6}
            axes[0].scatter(own["largest"].clip(lower=1e-9), y, s=20, label=base, **style)
        axes[0].axvline(TOLERANCE, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        axes[0].set_xscale("log")
        axes[0].set_xticks([1e-9, 1e-7, 1e-6, 1e-5], ["0", "1e-7", "1e-6", "1e-5"])
        axes[0].set_yticks(range(len(STARTS)), STARTS)
        axes[0].invert_yaxis()
        axes[0].set_xlabel("|logits - base's| / largest logit, step 0")
        axes[0].legend(loc="lower left")
        for base, panel in zip(bases, axes[1:], strict=True):
            parts = [column for column in training if column.startswith("to_")]
            x = [int(part[3:]) - PART / 2 for part in parts]
            for n, init in enumerate(("kaiming", "pissa")):
                own = best(training, base, init)
                style = {"color": COLOURS[n], "marker": MARKERS[n], "capsize": 3}
                label = f"{init}, lr {own['lr'].iloc[0]:g}"
                panel.errorbar(x, own[parts].mean(), yerr=own[parts].sem(), label=label, **style)
            panel.set_title(base)
            panel.set_xlabel("step")
            panel.set_ylabel("training loss (nats a token)")
            panel.legend()
        return drawn


if __name__ == "__main__":
    main()
