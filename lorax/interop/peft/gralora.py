"""GraLoRA in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

A module that is several matrices here (GPT-2's c_attn) has blocks that lie across them, so it can
neither be written nor read.
"""

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS, as_number
from lorax.interop.peft.modules import Arrays, fit, only_layer


def write(modules, shared, hp):
    """`gralora_A` (k, in/k, r) and `gralora_B` (k, r, out/k) of every module, without padding.

    Raises ValueError for a module of several matrices."""
    tensors, inner = {}, hp["rank"] // hp["blocks"]
    for place, parts in modules:
        arrays = parts[only_layer(place, "GraLoRA")]
        a, b = arrays["a"][..., :inner], arrays["b"][:, :, :inner]
        k, _, n_in, _ = a.shape
        tensors[f"{place.name}.gralora_A"] = a.transpose(0, 2, 1, 3).reshape(k, n_in, -1)
        tensors[f"{place.name}.gralora_B"] = b.swapaxes(0, 1).reshape(k, hp["rank"], -1)
    config = {"r": hp["rank"], "alpha": as_number(hp["scale"] * hp["rank"]), "hybrid_r": 0}
    config |= {"gralora_k": hp["blocks"], "gralora_dropout": hp["dropout"], "init_weights": True}
    return tensors, config


def read(modules, shared, config, where):
    """The blocks of every module.

    Raises ValueError for a module of several matrices, shapes that don't fit the config or the
    base, and a rank that k does not divide."""
    rank, k = config.get("r", 32), config.get("gralora_k", 2)
    if rank % k:
        raise ValueError(f"{where / CONFIG}: r: {rank}, which gralora_k, {k}, must divide")
    layers: dict[str, Arrays] = {}
    s = np.float64(config.get("alpha", 64) / rank)
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        layer = only_layer(place, "GraLoRA", here)
        if place.inputs % k or place.outputs % k:
            sizes = f"{place.outputs} x {place.inputs}"
            raise ValueError(f"{where / CONFIG}: gralora_k: {k}, but {place.name} is {sizes}")
        n_in, n_out = place.inputs // k, place.outputs // k
        fit(here, tensors, gralora_A=(k, n_in, rank), gralora_B=(k, rank, n_out))
        a = tensors["gralora_A"].reshape(k, n_in, k, -1).transpose(0, 2, 1, 3)
        b = tensors["gralora_B"].reshape(k, k, -1, n_out).swapaxes(0, 1)
        layers[layer] = {"a": a, "b": b, "s": s}
    hp = {"rank": rank, "alpha": as_number(s * rank), "blocks": k}
    return hp | {"dropout": config.get("gralora_dropout", 0.0)}, layers, {}
