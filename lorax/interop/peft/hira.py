"""HiRA in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

The inner ranks of the parts of a fused module are concatenated, each with its own outputs.
"""

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS, from_patterns
from lorax.interop.peft.modules import apart, fit, joined, widest


def write(modules, shared, hp):
    """`hira_A` (r, in) and `hira_B` (out, r) of every module, with one rank for all, as PEFT 0.21
    does not look at `rank_pattern`."""
    whole = {place.name: joined(place, parts, ("a",), ("b",)) for place, parts in modules}
    rank, tensors = max(len(arrays["a"]) for arrays in whole.values()), {}
    for name, arrays in whole.items():
        padding = rank - len(arrays["a"])
        tensors[f"{name}.hira_A"] = np.pad(arrays["a"], ((0, padding), (0, 0)))
        tensors[f"{name}.hira_B"] = np.pad(arrays["b"], ((0, 0), (0, padding)))
    config = {"r": rank, "rank_pattern": {}, "init_weights": True}
    return tensors, config | {"hira_dropout": hp["dropout"]}


def read(modules, shared, config, where):
    """The factors, with r or, what PEFT 0.21 does not make, the rank of `rank_pattern`.

    Raises ValueError for shapes that don't fit, a rank that the config contradicts, and if all
    updates are zero."""
    layers = {}
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        shapes = {"hira_A": ("r", place.inputs), "hira_B": (place.outputs, "r")}
        rank = fit(here, tensors, **shapes)["r"]
        r = config.get("r", 32)
        said = from_patterns(config.get("rank_pattern"), place.name, r)
        if rank not in (r, said):
            raise ValueError(f"{here}: rank {rank}, but {said} in {CONFIG}, r or rank_pattern")
        arrays = {"a": tensors["hira_A"], "b": tensors["hira_B"]}
        layers |= apart(place, arrays, ("a",), ("b",))
    rank = widest(layers, "a", where)
    return {"rank": rank, "dropout": config.get("hira_dropout", 0.0)}, layers, {}
