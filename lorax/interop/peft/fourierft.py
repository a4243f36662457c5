"""FourierFT in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

The files hold the trained numbers alone. Their places follow from the config's seed and from the
size of a module, so a module that is several matrices here (GPT-2's c_attn), whose waves go through
all of them, can neither be written nor read.
"""

import numpy as np

from lorax import permutations
from lorax.interop.peft.config import CONFIG, WEIGHTS, as_number, as_patterns, from_patterns
from lorax.interop.peft.modules import Arrays, fit, only_layer


def write(modules, shared, hp):
    """`fourierft_spectrum` (n,) of every module, without padding.

    Raises ValueError for a module of several matrices, and for matrices of different scales or
    places, as a file has one for all."""
    tensors, counts = {}, {}
    for place, parts in modules:
        arrays = parts[only_layer(place, "FourierFT")]
        n = int(arrays["n"])
        at = permutations.entries(place.inputs, place.outputs, n, hp["places_seed"])
        if not np.array_equal(at, (arrays["rows"][:n], arrays["columns"][:n])):
            raise ValueError(f"{place.name}: its places are not those of method.places_seed")
        if arrays["s"] != np.float32(hp["spectral_scale"]):
            raise ValueError(f"{place.name}: its scale is not method.spectral_scale")
        tensors[f"{place.name}.fourierft_spectrum"] = arrays["values"][:n]
        counts[place.name] = n
    n, pattern = as_patterns(counts)
    config = {"n_frequency": n, "n_frequency_pattern": pattern, "init_weights": hp["std"] == 0}
    config |= {"scaling": as_number(hp["spectral_scale"])}
    return tensors, config | {"random_loc_seed": hp["places_seed"]}


def read(modules, shared, config, where):
    """The numbers of every module, and the places that PEFT would give them.

    Raises ValueError for a module of several matrices, and for a number of frequencies that the
    config or the base contradicts."""
    layers: dict[str, Arrays] = {}
    seed, scale = config.get("random_loc_seed", 777), config.get("scaling", 150.0)
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        layer = only_layer(place, "FourierFT", here)
        pattern = config.get("n_frequency_pattern")
        n = from_patterns(pattern, place.name, config.get("n_frequency", 1000))
        fit(f"{here}, n_frequency {n} in {CONFIG}", tensors, fourierft_spectrum=(n,))
        if n > place.inputs * place.outputs:
            raise ValueError(f"{here}: {n} frequencies in {place.outputs} x {place.inputs} entries")
        if place.inputs * place.outputs >= permutations.TOO_MANY:
            raise ValueError(f"{here}: {place.outputs} x {place.inputs} entries are too many")
        rows, columns = permutations.entries(place.inputs, place.outputs, n, seed)
        layers[layer] = {"values": tensors["fourierft_spectrum"], "rows": rows, "columns": columns}
        layers[layer] |= {"n": np.int32(n), "s": np.float32(scale)}
    hp = {"frequencies": max(int(x["n"]) for x in layers.values()), "spectral_scale": scale}
    hp |= {"places_seed": seed, "std": 0.0 if config.get("init_weights") else 1.0}
    return hp, layers, {}
