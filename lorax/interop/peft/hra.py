"""HRA in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

A module that is several matrices here has the same reflections of its inputs for all of them. PEFT
has no HRA of GPT-2's Conv1D.
"""

from lorax.interop.peft.config import CONFIG, WEIGHTS
from lorax.interop.peft.modules import Arrays, fit, input_of, not_conv1d


def write(modules, shared, hp):
    """`hra_u` (in, r) of every module, without padding.

    Raises ValueError for GPT-2's Conv1D, and for a module whose parts are reflected differently."""
    tensors = {}
    for place, parts in modules:
        not_conv1d(place, "HRA")
        tensors[f"{place.name}.hra_u"] = input_of(place, parts, "u", "reflects")[:, : hp["rank"]]
    return tensors, {"r": hp["rank"], "apply_GS": False, "init_weights": True}


def read(modules, shared, config, where):
    """The vectors of every module.

    Raises ValueError for shapes that don't fit the config or the base, and for a vector of zeros,
    by whose length PEFT divides."""
    layers: dict[str, Arrays] = {}
    rank = config.get("r", 8)
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        not_conv1d(place, "HRA", here)
        fit(f"{here}, r {rank} in {CONFIG}", tensors, hra_u=(place.inputs, rank))
        if not tensors["hra_u"].any(axis=0).all():
            raise ValueError(f"{here}: hra_u has a column of zeros, which is no reflection")
        layers |= dict.fromkeys(place.columns, {"u": tensors["hra_u"]})
    return {"rank": rank}, layers, {}
