"""Adapters of Tinker: PEFT's two files, with the tensors of a layer's experts in stacks.

    base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)
    ....experts.w1.lora_A.weight (E, r, in), .lora_B.weight (E, out, r)

One of the two stacks may have one element that all experts share. s = lora_alpha / r. A stack
without numbers stands for a matrix that the base does not have.
(tinker-cookbook, tinker_cookbook/weights/_merge.py and _adapter.py.)
"""

import re

from lorax.interop.formats import pairs
from lorax.interop.formats.contract import Found
from lorax.interop.formats.opened import Opened
from lorax.interop.formats.scales import alpha_over_rank
from lorax.interop.peft.files import PREFIX

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def recognises(opened: Opened) -> bool:
    """Whether a file of PEFT's names has stacks."""
    return any(
        len(tensor.shape) == 3 and _KEY.fullmatch(name) is not None and ".experts." in name
        for name, tensor in opened.tensors.items()
    )


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names the file for other tensors."""
    layers: dict[str, dict[str, pairs.Lazy]] = {}
    for key, tensor in opened.tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise ValueError(f"{opened.file}: {key}: no tensor of Tinker's adapters")
        layers.setdefault(match["layer"], {})[match["side"]] = pairs.lazy(tensor)
    updates, notes = [], []
    for layer, sides in layers.items():
        a, b = sides.get("A"), sides.get("B")
        if a is None or b is None:
            raise ValueError(f"{opened.file}: {layer}: needs both lora_A and lora_B")
        if 0 in a.shape and 0 in b.shape:
            notes.append(f"{layer}: no numbers, as the base has no such matrix")
            continue
        rank = a.shape[-2] if len(a.shape) > 1 else 0
        scale, source, warnings = alpha_over_rank(opened, rank)
        turned = pairs.transposed
        if len(a.shape) == len(b.shape) == 3:
            updates += pairs.stack(layer, a, b, scale, source, turned, turned, warnings)
        else:
            updates.append(
                pairs.update(layer, turned(a), turned(b), scale, source, warnings=warnings)
            )
    return Found("Tinker", opened.path, tuple(updates), {}, opened.config, tuple(notes))
