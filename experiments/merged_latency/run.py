"""What does an adapter cost in inference? LoRA merged and not, Houlsby's and Pfeiffer's adapters.

    python -m experiments.merged_latency.run [DIR...] [--clock=cpu|wall] [--workdir=DIR]

Times of gpt2-nano, of models in Hugging Face's layout (DIR) and of a GPT-2 small with random
weights: reading a prompt of 128 tokens, one and eight at a time, and the next token behind it. The
sides run in turn within a round, because a machine's speed drifts, and a round's ratio is of
neighbours in time. On one thread, whose CPU time is what it would take on a machine that does
nothing else; --clock=wall is for such a machine. Writes numbers.csv and figure.png beside this
file.
"""

import argparse
import functools
import os
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # before JAX starts

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments.plotting import COLOURS, GREY, MARKERS, STYLE
from lorax import decode
from lorax.bench import timing

HERE = Path(__file__).parent
PROMPT = 128
#: What is measured: sequences, tokens of each.
SHAPES = {"1 x 128": (1, PROMPT), "8 x 128": (8, PROMPT), "1 x 1": (1, 1)}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
#: Rounds of each of them.
SMALL = {"1 x 128": 40, "1 x 1": 100, "8 x 128": 20}
LARGE = {"1 x 128": 12, "1 x 1": 30, "8 x 128": 6}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    data = os.environ.get("LORAX_DATA")
    default = [f"{data}/models/stories-llama-260k"] if data else []
    parser.add_argument("bases", nargs="*", default=default, metavar="DIR", help="small models")
    parser.add_argument("--workdir", default=HERE, type=Path, help="for table and figure")
    flags = parser.parse_args()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    clock, bases = CLOCKS[flags.clock], ["gpt2-nano", *flags.bases]

    rows = []
    for name, rounds in {**dict.fromkeys(bases, SMALL), "random:gpt2": LARGE}.items():
        base = lorax.load(name)
        d = width(base)
        # r of LoRA is the usual one; Pfeiffer's m is d / 16, and Houlsby's here as well.
        lora = lorax.method("lora", rank=8, targets=("q", "v"))
        state = start(lora, base)
        params = {
            "base": base.params,
            "merged LoRA": lorax.merge(lora, state, base.params, base.sites),
            "LoRA beside it": lora.bind(*state, base.params, sites=base.sites),
        }
        for kind in ("houlsby", "pfeiffer"):
            method = lorax.method(kind, rank=d // 16)
            params[kind] = method.bind(*start(method, base), base.params, sites=base.sites)
        # One program for the base and for what is merged into it: their ratio is the noise.
        read = jax.jit(lambda p, ids, cache, m=base.module: decode.read(m, p, ids, None, cache))
        for shape, n in rounds.items():
            make = functools.partial(forward, base, read, clock, *SHAPES[shape])
            sides = {side: make(own) for side, own in params.items()}
            seconds = timing.measure(sides, n)
            for side, own in seconds.items():
                short = Path(name).name.removeprefix("random:")
                about = {"base": short, "shape": shape, "side": side}
                pairs = enumerate(zip(own, own / seconds["base"], strict=True))
                rows += [about | {"round": i, "ms": 1e3 * s, "ratio": r} for i, (s, r) in pairs]
            print(f"{name}, {shape}: done", flush=True)
            table = pd.DataFrame(rows)
            table.to_csv(
                flags.workdir / "numbers.csv", index=False, float_format="%.5g", lineterminator="\n"
            )

    each = table.groupby(["base", "shape", "side"], sort=False)
    shown = each.agg(
        ms=("ms", "median"),
        ratio=("ratio", "median"),
        low=("ratio", "min"),
        high=("ratio", "max"),
        quarter=("ratio", lambda x: x.quantile(0.25)),
        three_quarters=("ratio", lambda x: x.quantile(0.75)),
    )
    print(shown.to_string(float_format=lambda x: f"{x:.3f}"))
    figure(table).savefig(flags.workdir / "figure.png", dpi=110)


def width(base) -> int:
    return getattr(base.config, "n_embd", None) or base.config.hidden_size


def start(method, base):
    """The method's state with normal numbers on what it trains: its start has zeros."""
    state = method.init(jax.random.key(0), base.params, base.sites)
    leaves, rng = jax.tree.flatten(state.trainable), np.random.default_rng(0)
    moved = [x + 0.02 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves[0]]
    return state._replace(trainable=jax.tree.unflatten(leaves[1], moved))


def forward(base, read, clock, batch, tokens, params):
    """Function that reads so many tokens, behind a cached prompt where it is one, and returns the
    seconds: the least of three calls, or those of one that is long."""
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (batch, PROMPT + 1))
    ids, cache = ids.astype(np.int32), base.module.empty_cache(batch, PROMPT + 1)
    if tokens == 1:
        _, cache = read(params, ids[:, :PROMPT], cache)
    part = ids[:, -tokens:]
    calls = 1 if batch * tokens * width(base) > 5e4 else 3

    def seconds():
        found = []
        for _ in range(calls):
            begin = clock()
            jax.block_until_ready(read(params, part, cache)[0])
            found.append(clock() - begin)
        return min(found)

    return seconds


def figure(table) -> Figure:
    """Time over the base's of the same round: median, quartiles, range over rounds."""
    sides = [side for side in table["side"].unique() if side != "base"]
    bases = list(table["base"].unique())
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(0.4 + 3.4 * len(bases), 3.6), layout="constrained")
        panels = drawn.subplots(1, len(bases))
        for base, axes in zip(bases, panels, strict=True):
            for n, side in enumerate(sides):
                own = table[(table["base"] == base) & (table["side"] == side)]
                found = own.groupby("shape", sort=False)["ratio"]
                y = found.median()
                x = np.array([list(SHAPES).index(shape) for shape in y.index]) + 0.18 * (n - 1.5)
                style = {"color": COLOURS[n], "linestyle": ""}
                quartiles = [y - found.quantile(0.25), found.quantile(0.75) - y]
                axes.vlines(x, found.min(), found.max(), color=COLOURS[n], linewidth=0.6)
                axes.errorbar(x, y, yerr=quartiles, marker=MARKERS[n], label=side, **style)
            axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            axes.set_xticks(range(len(SHAPES)), SHAPES)
            axes.set_xlabel("sequences x tokens")
            axes.set_title(base)
            shown = table[(table["base"] == base)].groupby(["shape", "side"])["ratio"]
            low, high = shown.quantile(0.05).min(), shown.quantile(0.95).max()
            axes.set_ylim(min(0.8, low - 0.05), max(1.3, high + 0.05))
        panels[0].set_ylabel("time / base's time")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return drawn


if __name__ == "__main__":
    main()
