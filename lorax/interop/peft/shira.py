"""SHiRA in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

The entries of the parts of a fused module are put side by side. PEFT has no SHiRA of GPT-2's
Conv1D.
"""

import numpy as np

from lorax.interop.peft.config import WEIGHTS
from lorax.interop.peft.modules import fit, not_conv1d


def write(modules, shared, hp):
    """`shira_weight` (n,) and `shira_indices` (2, n), outputs and inputs, of every module, with
    n = r (in + out) as PEFT demands: where a fused module has fewer entries, zeros are added.

    Raises ValueError for GPT-2's Conv1D, and for a module too small for that n."""
    entries = []
    for place, parts in modules:
        not_conv1d(place, "SHiRA")
        found = []
        for layer, arrays in parts.items():
            own = np.arange(place.outputs)[place.columns[layer]]
            real = arrays["places"] > 0
            row, column = np.divmod(arrays["places"][real] - 1, len(own))
            found.append((arrays["values"][real], own[column], row))
        entries.append((place, *(np.concatenate(x) for x in zip(*found, strict=True))))
    # One rank for all modules, the smallest that has room for the entries of each.
    r = max(-(-len(x) // (place.inputs + place.outputs)) for place, x, *_ in entries)
    tensors = {}
    for place, values, outputs, inputs in entries:
        missing = r * (place.inputs + place.outputs) - len(values)
        used = np.zeros((place.outputs, place.inputs), bool)
        used[outputs, inputs] = True
        free = np.argwhere(~used)[:missing].T
        if free.shape[1] < missing:
            raise ValueError(f"{place.name}: PEFT's SHiRA has no rank {r} for so small a module")
        indices = np.concatenate([[outputs, inputs], free], axis=1).astype(np.int32)
        tensors[f"{place.name}.shira_indices"] = indices
        tensors[f"{place.name}.shira_weight"] = np.pad(values, (0, missing))
    return tensors, {"r": r, "mask_type": "random", "init_weights": True}


def read(modules, shared, config, where):
    """The entries, those of a fused module by its parts. A part of a fused module whose entries are
    zero is not adapted.

    Raises ValueError for shapes that don't fit, and places that are no whole numbers, are not in a
    module or come twice."""
    layers, r, rank = {}, config.get("r", 32), 0
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        n = r * (place.inputs + place.outputs)
        fit(f"{here}, r {r}", tensors, shira_weight=(n,), shira_indices=(2, n))
        indices = tensors["shira_indices"].astype(np.int64)
        if np.any(indices != tensors["shira_indices"]):
            raise ValueError(f"{here}: shira_indices: not all are whole numbers")
        size = np.array([[place.outputs], [place.inputs]])
        if np.any((indices < 0) | (indices >= size)):
            raise ValueError(f"{here}: shira_indices: not all are in {size[0, 0]} x {size[1, 0]}")
        if len(np.unique(indices, axis=1).T) < n:
            raise ValueError(f"{here}: shira_indices: a place comes twice")
        column, row = indices
        for layer, columns in place.columns.items():
            own = np.full(place.outputs, -1)  # the part's number of each output of the module
            width = len(own[columns])
            own[columns] = np.arange(width)
            mine = own[column] >= 0
            values = tensors["shira_weight"][mine]
            if place.fused and not values.any():
                continue
            places = 1 + row[mine] * width + own[column[mine]]
            layers[layer] = {"values": values, "places": places}
            rank = max(rank, -(-len(values) // (place.inputs + width)))
    if not layers:
        raise ValueError(f"{where}: there is no update, all is zero")
    return {"rank": rank}, layers, {}
