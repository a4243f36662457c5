"""LoRAs on the parts of a fused matrix that a converter stored as one LoRA.

    gate and up, or parts of in_proj, each (r, in) and (out i, r)
      ->  A (k r, in), their A below each other; B (out, k r), zero outside its diagonal blocks

alpha is k times what it was, so s = alpha / (k r) is that of the parts. (tinker-cookbook,
weights/_adapter.py; transformers, utils/transformers_weight_conversion.py for experts.) Here they
are k updates, so that the zeros are not part of any rank.
"""

import re
from collections.abc import Sequence

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Update
from lorax.interop.formats.opened import numbers, quiet
from lorax.interop.formats.updates import Module
from lorax.interop.tensors import Stored

_FUSED = re.compile(r"(.+\.)?(in_proj\w*|gate_up_proj|qkv_proj)")
_MOST = 4  # parts


def apart(module: Module) -> list[Update]:
    """An update for each part, in the order of its outputs; [] for a module that is not so."""
    down, up = (module.tensors.get(word) for word in ("lora_down", "lora_up"))
    if not _FUSED.fullmatch(module.layer) or set(module.tensors) != {"lora_down", "lora_up"}:
        return []
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        return []
    ends = _ends(up)
    if len(ends) < 2:
        return []
    whole, rank = down.shape[0], down.shape[0] // len(ends)
    said = f"one of {len(ends)} LoRAs of rank {rank} that are stored as one of rank {whole}"
    return parts(module, range(len(ends)), ends, module.scale(module.layer, whole), said)


def parts(
    module: Module,
    names: Sequence[str | int],
    ends: Sequence[int],
    scale: tuple[float, str],
    warning: str,
) -> list[Update]:
    """The updates, "<module>.<name>", of the parts of a LoRA, whose rows of B end at `ends`. scale:
    (s, where it is from) of each part."""
    down, up = (module.tensors[word] for word in ("lora_down", "lora_up"))
    rank, inputs, starts = down.shape[0] // len(ends), down.shape[1], [0, *ends[:-1]]
    s, source = scale

    def read(i: int) -> Factors:
        inner = range(rank * i, rank * (i + 1))
        a = numbers(down, [inner, range(inputs)])
        b = numbers(up, [range(starts[i], ends[i]), inner])
        return Factors(a.T, b.T, s)

    return [
        Update(f"{module.layer}.{name}", "LoRA", (inputs, ends[i] - starts[i]), rank, s, source,
               down.kind, lambda i=i: read(i), (warning,))
        for i, name in enumerate(names)
    ]  # fmt: skip


@quiet
def _ends(up: Stored) -> list[int]:
    """Where the diagonal blocks of rows of B end, [] if it has none. Its first row, which is in the
    first block, is looked at before the others are read."""
    first = numbers(up, [range(1), range(up.shape[1])])[0]
    if not first.any() or first[len(first) // 2 :].any():
        return []
    filled = numbers(up) != 0
    for k in range(_MOST, 1, -1):
        if up.shape[1] % k:
            continue
        of_block = filled.reshape(len(filled), k, -1).any(axis=2)  # (out, k)
        block = of_block.argmax(axis=1)
        rows = of_block.any(axis=1)
        one_each = (of_block.sum(axis=1) <= 1).all() and of_block.any(axis=0).all()
        if one_each and (np.diff(block[rows]) >= 0).all():
            last = [int(np.flatnonzero(of_block[:, i])[-1]) + 1 for i in range(k)]
            return [*last[:-1], len(filled)]
    return []
