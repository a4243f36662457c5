"""RandLoRA in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

A module that is several matrices here (GPT-2's c_attn) has one update that goes through all of
them, so it can neither be written nor read.
"""

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS, as_number
from lorax.interop.peft.modules import Arrays, fit, largest, only_layer


def _sizes(inputs: int, outputs: int, rank: int) -> tuple[int, int, int]:
    """(the smaller size, the larger one, the number n of products that make the full rank) of a
    module, or with the `largest` inputs and outputs of all modules of PEFT's shared pair."""
    least = min(inputs, outputs)
    return least, max(inputs, outputs), -(-least // rank)


def write(modules, shared, hp):
    """`randlora_lambda` (r, n) and `randlora_gamma` (n, min) of every module, and the shared pair
    `base_model.randlora_A` (r, 1, min) and `base_model.randlora_B` (max, n, r).

    Raises ValueError for a module of several matrices."""
    tensors, rank = {}, hp["rank"]
    for place, parts in modules:
        arrays = parts[only_layer(place, "RandLoRA")]
        tensors[f"{place.name}.randlora_lambda"] = arrays["lam"]
        tensors[f"{place.name}.randlora_gamma"] = arrays["gamma"]
    least, most, n = _sizes(*largest(modules), rank)
    a, b = np.zeros((rank, least), np.float32), np.zeros((most, n * rank), np.float32)
    for whole, part in ((a, shared["a"]), (b, shared["b"])):
        corner = part[: whole.shape[0], : whole.shape[1]]
        whole[: corner.shape[0], : corner.shape[1]] = corner
    tensors["base_model.randlora_A"] = a[:, None]
    tensors["base_model.randlora_B"] = b.reshape(most, n, rank)
    config = {"r": rank, "randlora_alpha": as_number(hp["scale"] * rank)}
    config |= {"randlora_dropout": hp["dropout"], "projection_prng_key": hp["projection_seed"]}
    config |= {"save_projection": True, "sparse": False, "very_sparse": False}
    return tensors, config | {"init_weights": True}


def read(modules, shared, config, where):
    """The trained numbers of every module, and as much of the pair as they use.

    Raises ValueError for a file without the pair (`save_projection=False`), a module of several
    matrices, and shapes that don't fit the config or the base."""
    file, rank = where / WEIGHTS, config.get("r", 32)
    if set(shared) != {"randlora_A", "randlora_B"}:
        raise ValueError(
            f"{file}: randlora_A and randlora_B are missing, which torch's generator would draw "
            "again, in the half precision of the machine; save with save_projection=True"
        )
    least, most, n = _sizes(*largest(modules), rank)
    said = f"{file}, r {rank} in {CONFIG}"
    fit(said, shared, randlora_A=(rank, 1, least), randlora_B=(most, n, rank))
    layers: dict[str, Arrays] = {}
    s = np.float64(config.get("randlora_alpha", 640) / rank)
    sizes = [_sizes(place.inputs, place.outputs, rank) for place, _ in modules]
    for (place, tensors), (smaller, _, count) in zip(modules, sizes, strict=True):
        here = f"{file}: {place.name}"
        layer = only_layer(place, "RandLoRA", here)
        tensors = _without_copies(tensors, shared, here)
        shapes = {"randlora_lambda": (rank, count), "randlora_gamma": (count, smaller)}
        fit(here, tensors, **shapes)
        layers[layer] = {"lam": tensors["randlora_lambda"], "gamma": tensors["randlora_gamma"]}
        layers[layer]["s"] = s
    least, most, n = (max(size) for size in zip(*sizes, strict=True))
    pair = {"a": shared["randlora_A"][:, 0, :least]}
    pair["b"] = shared["randlora_B"].reshape(len(shared["randlora_B"]), -1)[:most, : n * rank]
    hp = {"rank": rank, "alpha": as_number(s * rank)}
    hp |= {"projection_seed": config.get("projection_prng_key", 0)}
    return hp | {"dropout": config.get("randlora_dropout", 0.0)}, layers, pair


def _without_copies(tensors: Arrays, shared: Arrays, where: str) -> Arrays:
    """A module's tensors without the copies of the pair that PEFT writes with each. Raises
    ValueError, which begins with `where`, for a copy that differs."""
    own = dict(tensors)
    for name, whole in shared.items():
        if not np.array_equal(own.pop(name, whole), whole):
            raise ValueError(f"{where}: {name} is not that of all modules, base_model.{name}")
    return own
