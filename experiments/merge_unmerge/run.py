"""Merge an adapter into the weights and take it out again: how much of the weights is lost?

    python -m experiments.merge_unmerge.run [--data=DIR] [--workdir=DIR]

DIR (or $LORAX_DATA) holds models/stories-llama-260k; without it gpt2-nano alone is measured. Where
torch, transformers and PEFT are installed, PEFT does the same. Writes numbers.csv and figure.png
beside this file, or into --workdir.
"""

import argparse
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import ml_dtypes
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments.plotting import COLOURS, GREY, MARKERS, STYLE
from lorax import adapters, methods, tree
from lorax.adapters import peft_methods
from lorax.interop import peft
from lorax.models.directories import ASSETS

HERE = Path(__file__).parent
SEEDS, CYCLES, DTYPES = (0, 1, 2), 100, ("float32", "bfloat16")
#: Method -> standard deviation of what is added to its start, in place of training.
METHODS = dict.fromkeys(("lora", "rslora", "loha", "lokr", "vera", "dora"), 0.05) | {"ia3": 0.3}
IN_PEFT = ("lora", "dora", "ia3")
GUARD = 1e-8  # that PEFT adds to (IA)3's vectors before it divides by them


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("LORAX_DATA"))
    parser.add_argument("--workdir", default=HERE, type=Path, help="for tables and figures")
    flags = parser.parse_args()
    data, folder = flags.data, flags.workdir
    folder.mkdir(parents=True, exist_ok=True)
    names = {"gpt2-nano": str(ASSETS / "gpt2-nano")}
    if data and (Path(data) / "models/stories-llama-260k").exists():
        names["stories-llama-260k"] = str(Path(data) / "models/stories-llama-260k")
    else:
        print("no stories-llama-260k in --data: gpt2-nano alone")
    has_peft = all(importlib.util.find_spec(x) for x in ("torch", "transformers", "peft"))
    print("" if has_peft else "no torch, transformers and PEFT: without their numbers")

    rows = []
    for base_name, directory in names.items():
        for dtype in DTYPES:
            base = lorax.load(directory, param_dtype=dtype)
            for name in METHODS:
                for seed in SEEDS:
                    about = {"base": base_name, "dtype": dtype, "method": name, "seed": seed}
                    method, state = perturbed(base, name, seed)
                    kept = kept_bit_for_bit(base, method, state)
                    for way, found in by_hand(base, method, state).items():
                        rows.append(about | {"way": way, "kept": kept} | found)
                    if has_peft and name in IN_PEFT:
                        found = by_peft(base, method, state, directory, dtype)
                        rows.append(about | {"way": "PEFT"} | found)
            # One entry of a vector of (IA)3 is zero: a column is gone.
            method, state = perturbed(base, "ia3", 0, zero=True)
            found = by_hand(base, method, state)["inverse"]
            about = {"base": base_name, "dtype": dtype, "method": "ia3, a zero", "seed": 0}
            rows.append(about | {"way": "inverse"} | found)
            print(f"{base_name} in {dtype}: done")

    # ------------------------------------------------------------------------------------ results
    table = pd.DataFrame(rows)
    table.to_csv(folder / "numbers.csv", index=False, float_format="%.6g", lineterminator="\n")
    each = table.groupby(["dtype", "base", "method", "way"], sort=False)
    shown = each[["size", "units", "relative", "changed", "units_after"]].agg(["mean", "sem"])
    shown = shown.drop(columns=[("size", "sem")])
    pd.set_option("display.width", 250)
    print(shown.to_string(float_format=lambda x: f"{x:.3g}"))
    kept = table.loc[table["way"] == "subtract", "kept"].dropna()
    print("lorax's own, bit for bit:", kept.value_counts().to_dict())
    figure(table).savefig(folder / "figure.png", dpi=110)


def perturbed(base, name, seed, zero=False):
    """(method, state) with normal numbers on everything that is trained."""
    method = methods.method(name, **({} if name == "ia3" else {"rank": 8}))
    state = method.init(jax.random.key(seed), base.params, base.sites)
    flat, rng = tree.flatten(state.trainable), np.random.default_rng(seed)
    for path, x in flat.items():
        flat[path] = x + METHODS[name] * jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        if zero:
            flat[path] = flat[path].at[..., 0].set(0)
    return method, state._replace(trainable=tree.unflatten(flat))


def kept_bit_for_bit(base, method, state) -> bool | None:
    """Whether `adapters.unmerge` gives the base's very bits, after a merge that changed some; None
    for a method that is no adapter of low rank, whose merge is a copy."""
    if method.factors is None:
        return None
    merged = adapters.merge(base, adapters.factored(base, method, state))
    before, between, after = (
        tree.flatten(x) for x in (base.params, merged.params, adapters.unmerge(merged))
    )
    assert any(np.any(between[path] != before[path]) for path in before)
    return all(np.array_equal(before[path], after[path]) for path in before)


def by_hand(base, method, state) -> dict:
    """{way: what is lost}. "subtract": dW off the merged weights, in float32 and rounded to their
    dtype; "inverse", of DoRA and (IA)3: their formula backwards, as PEFT does it."""
    weights = tree.flatten(base.params)
    deltas = method.delta(*state, base.params, base.sites)
    bound = tree.flatten(method.bind(*state, base.params, sites=base.sites))
    found = {"subtract": [], "inverse": []}
    for path, delta in deltas.items():
        w, d = np.asarray(weights[path]), np.asarray(delta, np.float32)
        add, take = lambda w, d=d: w + d, lambda w, d=d: w - d
        found["subtract"].append(lost(w, add, take))
        if method.name == "dora":
            g = np.asarray(bound[path].g)[..., None, :]
            low = bound[path].w
            update = np.asarray(low.s)[..., None, None] * (np.asarray(low.a) @ np.asarray(low.b))
            update = np.asarray(base.sites[path].from_matrix(jnp.asarray(update), w.shape))
            ways = lambda w, g=g, u=update: g * (w + u), lambda w, g=g, u=update: w / g - u
            found["inverse"].append(lost(w, *ways))
        elif method.name == "ia3" and path in base.sites:
            leaf = bound[path]
            inner = isinstance(leaf, lorax.leaves.ScaledInput)
            g = np.asarray(leaf.g)[..., None] if inner else np.asarray(leaf.g)[..., None, :]
            ways = lambda w, g=g: w * g, lambda w, g=g: w / (g + np.float32(GUARD))
            found["inverse"].append(lost(w, *ways))
    return {way: worst(own) for way, own in found.items() if own}


def lost(w, merge, unmerge) -> dict:
    """What merging and unmerging loses of w; both are computed in float32 and rounded to its dtype.

    size: |dW| / |W|. units: the largest error, in units of the dtype's epsilon times the largest of
    |w|, |merged w| and |dW| at that place. relative: it over the largest |w|. changed: share of the
    numbers that are not what they were. units_after: as units, after `CYCLES` times.
    """
    cast = lambda x: x.astype(w.dtype).astype(np.float32)
    start = now = w.astype(np.float32)
    for cycle in range(CYCLES):
        merged = cast(merge(now))
        now = cast(unmerge(merged))
        if cycle == 0:
            once, update = now, np.abs(merged - start)
            scale = np.maximum(np.maximum(np.abs(start), np.abs(merged)), update)
    eps = float(ml_dtypes.finfo(w.dtype).eps)
    units = lambda x: float(np.max(np.abs(x - start) / np.where(scale > 0, eps * scale, 1)))
    return {
        "size": float(np.linalg.norm(update) / np.linalg.norm(start)),
        "units": units(once),
        "relative": float(np.abs(once - start).max() / np.abs(start).max()),
        "changed": float(np.mean(once != start)),
        "units_after": units(now),
    }


def worst(found) -> dict:
    """The largest of every number over the matrices; of shares the mean."""
    table = pd.DataFrame(found)
    mean = table[["size", "changed"]].mean()
    return table.max().to_dict() | mean.to_dict()


def by_peft(base, method, state, directory, dtype) -> dict:
    """The same from PEFT's own merge and unmerge, of one cycle."""
    import torch
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    )
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that (IA)3's can be inaccurate
        if method.factors is None:
            peft_methods.save(out, method, state, base, directory)
        else:
            adapter = adapters.factored(base, method, state)
            peft.save(out, adapter, base.sources, directory)
        model = PeftModel.from_pretrained(model, out)
        read = lambda: {
            name: p.detach().float().numpy().copy()
            for name, p in model.named_parameters()
            if name.endswith("base_layer.weight")
        }
        before = read()
        model.merge_adapter()
        merged = read()
        model.unmerge_adapter()
        after = read()
    as_stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    found = []
    for name, w in before.items():
        # `lost` with what PEFT found in place of the sums.
        ways = lambda _, n=name: merged[n], lambda _, n=name: after[n]
        found.append(lost(w.astype(as_stored), *ways))
    return worst(found) | {"units_after": np.nan}


def figure(table) -> Figure:
    """Error in units of rounding, once and after many times, by method and way."""
    table = table[table["method"] != "ia3, a zero"]
    names = list(METHODS)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(7.2, 3.4), layout="constrained")
        panels = drawn.subplots(1, len(DTYPES), sharey=True)
        for dtype, axes in zip(DTYPES, panels, strict=True):
            own = table[table["dtype"] == dtype]
            for n, (way, of_way) in enumerate(own.groupby("way", sort=False)):
                found = of_way.groupby("method", sort=False)["units"].agg(["mean", "sem"])
                x = [names.index(name) + 0.2 * (n - 1) for name in found.index]
                style = {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": ""}
                axes.errorbar(x, found["mean"], yerr=found["sem"], capsize=3, label=way, **style)
            axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            axes.set_xticks(range(len(names)), names, rotation=45)
            axes.set_title(dtype)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("largest error / (epsilon · size)")
        panels[0].legend(loc="lower left")
        return drawn


if __name__ == "__main__":
    main()
