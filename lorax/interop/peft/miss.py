"""MiSS in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

The parts of a fused module are side by side, with zeros for parts that are not adapted. PEFT has no
MiSS of GPT-2's Conv1D.
"""

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS
from lorax.interop.peft.modules import fit, not_conv1d


def write(modules, shared, hp):
    """`miss_block` (r, out) of every module, or (r, mini_r).

    Raises ValueError for GPT-2's Conv1D, and for parts of a fused module whose outputs share."""
    tensors = {}
    for place, parts in modules:
        not_conv1d(place, "MiSS", instead="; store it as LoRA")
        if hp["mini_rank"] and place.fused:
            raise ValueError(
                f"{', '.join(parts)}: outputs of all {place.name} share in PEFT's mini; "
                "store it as LoRA"
            )
        block = np.zeros((hp["rank"], hp["mini_rank"] or place.outputs), np.float32)
        for layer, arrays in parts.items():  # padded, where a sweep has larger ranks
            block[:, place.columns[layer]] = arrays["d"][: hp["rank"]]
        tensors[f"{place.name}.miss_block"] = block
    config = {"r": hp["rank"], "mini_r": hp["mini_rank"] or 1}
    config["init_weights"] = "mini" if hp["mini_rank"] else True
    return tensors, config | {"miss_dropout": hp["dropout"]}


def read(modules, shared, config, where):
    """The blocks. A part of a fused module whose block is zero is not adapted.

    Raises ValueError for shapes that don't fit, a rank above a module's inputs, and a fused module
    whose outputs share."""
    layers, r = {}, config.get("r", 64)
    mini = config.get("mini_r", 1) if config.get("init_weights") == "mini" else None
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        fit(f"{here}, r {r}", tensors, miss_block=(r, mini or place.outputs))
        if r > place.inputs:
            raise ValueError(
                f"{where / CONFIG}: r: {r}, but {place.name} has {place.inputs} inputs"
            )
        if mini and place.fused:
            raise ValueError(f"{here}: outputs of {', '.join(place.columns)} share an update")
        if mini and place.outputs % mini:
            raise ValueError(
                f"{where / CONFIG}: mini_r: {mini} must divide {place.outputs} outputs"
            )
        block = tensors["miss_block"]
        parts = {layer: block[:, columns] for layer, columns in place.columns.items()}
        moved = [layer for layer, d in parts.items() if d.any()] or [*parts]
        layers |= {layer: {"d": parts[layer]} for layer in moved}
    hp = {"rank": r, "mini_rank": mini, "dropout": config.get("miss_dropout", 0.0)}
    return hp, layers, {}
