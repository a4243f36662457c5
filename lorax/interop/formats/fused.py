"""Several updates that a file stores as one, and one that it stores as several.

Flux's qkv is one matrix in kohya's files and three in diffusers'.

    split_qkv   sd-scripts trains three LoRAs on its parts (four on linear1: q, k, v and the
                feed-forward part) and saves them as one: down (3 r, in), and up zero outside its
                blocks (out / 3, r); alpha stays that of one, so each has s = alpha / r
                (sd-scripts, networks/lora_flux.py, lora_sd3.py). Converters from diffusers' names
                store the parts in the same way, but with an alpha for all of them: each has
                s = alpha / (3 r) (networks/convert_flux_lora.py, where alpha is 3 r; musubi-tuner,
                networks/convert_z_image_lora_to_comfy.py, where it is 3 times that of a part). It
                is taken as a converter's if that s is 1 or the s of another module in the file, or
                if sd-scripts does not train such parts. Here they are three updates.
    one A       a converter to diffusers' names gives the three parts of one LoRA copies of its A
                (loaders/lora_conversion_utils.py). Here they are one update, counted once.
    blocks      several LoRAs of a language model's fused matrix, saved as one: `blocks`.
"""

import itertools
import re
from collections.abc import Container, Iterable, Sequence

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats import blocks, updates
from lorax.interop.formats.contract import Update
from lorax.interop.formats.opened import numbers, quiet, same
from lorax.interop.formats.updates import Module
from lorax.interop.tensors import Stored

_QKV = re.compile(r".*[._]qkv")
#: Modules whose parts sd-scripts trains.
_TRAINED = re.compile(r".*(double|joint|single)_blocks[._].+")
_LINEAR1 = re.compile(r".*[._]single_blocks[._]\d+[._]linear1")
#: What a part of a fused module may be called, in the order of its outputs.
_PARTS = ("to_q", "to_k", "to_v", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj")
_PARTS += ("q_proj", "k_proj", "v_proj", "q", "k", "v")


def updates_of(modules: Sequence[Module], as_stored: bool) -> tuple[Update, ...]:
    """The updates of a file's modules, each counted once, or as they are stored. Raises as
    `updates.update`."""
    every = {module.layer: updates.update(module) for module in modules}
    if as_stored:
        return tuple(every.values())
    usual = {1.0, *(one.scale for layer, one in every.items() if not _names(layer))}
    found: list[Update] = []
    for together in _with_one_a(modules):
        one = [every[module.layer] for module in together]
        if len(one) > 1 and len({(update.scale, update.kind) for update in one}) == 1:
            found.append(_joined(one))
        else:
            apart = len(one) == 1 and (_split(together[0], usual) or blocks.apart(together[0]))
            found += apart or one
    return tuple(found)


# ------------------------------------------------------------------------------------- split_qkv


def _names(layer: str) -> tuple[str, ...]:
    """The parts of a module that may be stored as one, () for any other module."""
    qkv = ("q", "k", "v")
    return (*qkv, "mlp") if _LINEAR1.fullmatch(layer) else qkv if _QKV.fullmatch(layer) else ()


def _split(module: Module, usual: Container[float]) -> list[Update]:
    """The updates of a module that holds those of its parts, [] for any other module. usual: the
    scales of modules that are stored whole."""
    down, up = (module.tensors.get(word) for word in ("lora_down", "lora_up"))
    names = _names(module.layer)
    if not names or set(module.tensors) != {"lora_down", "lora_up"} or len(down.shape) != 2:
        return []
    whole, inputs, outputs = *down.shape, up.shape[0]
    sizes = [outputs // 3] * 3 if len(names) == 3 else [inputs] * 3 + [outputs - 3 * inputs]
    rank = whole // len(names)
    if whole % len(names) or sum(sizes) != outputs or min(sizes) < 1:
        return []
    if len(up.shape) != 2 or up.shape[1] != whole or not _is_sparse(up, sizes, rank):
        return []
    s, source = module.scale(module.layer, whole)
    warning = f"one of {len(names)} LoRAs of rank {rank} that are stored as one of rank {whole}"
    if source == updates.OF_TENSOR and s not in usual and _TRAINED.fullmatch(module.layer):
        s, source = module.scale(module.layer, rank)
        warning += " (split_qkv) with the alpha of one: programs that divide it by "
        warning += f"{whole} apply 1/{len(names)} of this"
    return blocks.parts(module, names, [*itertools.accumulate(sizes)], (s, source), warning)


@quiet
def _is_sparse(up: Stored, sizes: Sequence[int], rank: int) -> bool:
    """Whether each block of rows of `up` is zero outside its own columns, and not zero in them. A
    row of each block is looked at first, as others hardly ever pass that."""
    starts = [*itertools.accumulate(sizes, initial=0)][:-1]
    for i, start in enumerate(starts):
        row = numbers(up, [range(start, start + 1), range(up.shape[1])])[0]
        own = row[i * rank : (i + 1) * rank].any()
        row[i * rank : (i + 1) * rank] = 0
        if row.any() or not own:
            return False
    whole = numbers(up)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        whole[start : start + size, i * rank : (i + 1) * rank] = 0
    return not whole.any()


# ----------------------------------------------------------------------------------------- one A


def _with_one_a(modules: Sequence[Module]) -> Iterable[list[Module]]:
    """The modules, in groups: parts of one fused module with the same A, and single ones."""
    groups: dict[tuple, list[Module]] = {}
    for module in modules:
        around, _, name = module.layer.rpartition(".")
        down = module.tensors.get("lora_down")
        kind = (around.removesuffix(".attn"), down.kind, down.shape) if down else ()
        key = (*kind, _first_row(down)) if down and name in _PARTS else (module.layer,)
        group = groups.setdefault(key, [])
        if group and not same(group[0].tensors["lora_down"], down):
            group = groups.setdefault((module.layer,), [])
        group.append(module)
    return groups.values()


def _first_row(tensor: Stored) -> bytes:
    size = tensor.size // tensor.shape[0]
    return tensor.as_bytes().read([range(size)]).tobytes()


def _joined(parts: list[Update]) -> Update:
    """The update of a module that was split, from those of its parts, which have one scale."""
    parts = sorted(parts, key=lambda part: _PARTS.index(part.layer.rpartition(".")[2]))
    first, around = parts[0], parts[0].layer.rpartition(".")[0]
    names = [part.layer.rpartition(".")[2] for part in parts]
    outputs = sum(part.shape[1] for part in parts)
    warning = f"{', '.join(names)} have one A: one update of a fused module that was split"

    def read() -> Factors:
        each = [part.read() for part in parts]
        m = None if each[0].m is None else np.concatenate([one.m for one in each])
        b = np.concatenate([one.b for one in each], axis=1)
        return Factors(each[0].a, b, first.scale, m)

    warnings = tuple(dict.fromkeys([warning, *(text for part in parts for text in part.warnings)]))
    return first._replace(
        layer=f"{around}.{'+'.join(names)}", shape=(first.shape[0], outputs), read=read,
        warnings=warnings,
    )  # fmt: skip
