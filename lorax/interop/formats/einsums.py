"""Adapters of JAX trainers in orbax checkpoints: gemma, tunix (qwix) and MaxText.

    gemma             layer_0/attn/q_einsum/lora/{a,b}           s = 1, it has no alpha
    tunix, MaxText    layers/0/attn/q_proj/w_lora_a, w_lora_b    s = alpha / rank, not in the arrays
    MaxText's older   .../self_attention/query/{lora_a,lora_b}.kernel

The weights are those of einsums, so a is (in ..., r) and b is (r, out ...), as many axes as the
einsum has: (heads, d) of an output's a are one `in`, (heads, d) of a query's b one `out`. An axis
that both have is a stack, of experts, of a batch axis of the einsum, or of the layers that MaxText
scans over, which then lie on axis 0 or 1:

    (E, in, r), (E, r, out)        (in, layers, r), (r, layers, out ...)

An axis that only a has, of experts in "ETD,EDF->ETF" or of heads in "BTNI,NIH->BTNH", can't be told
by shapes from a second axis of `in`: it is taken for experts in a feed-forward part's matrices, for
`in` in others.
(gemma/peft/_einsum_utils.py; qwix/_src/providers/lora.py; maxtext/utils/lora_utils.py.)
"""

import re
from typing import Any

from lorax.interop.formats import pairs
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened
from lorax.interop.formats.orbax_files import Checkpoint, open_checkpoint
from lorax.interop.formats.scales import alpha_over_rank

_QWIX = re.compile(r"(?P<weight>\w+)_lora_(?P<side>[ab])")
_OLDER = re.compile(r"lora_(?P<side>[ab])\.kernel")
_PLAIN = ("w", "kernel")  # names of the only weight of a module
_EXPERTS = re.compile(r"(.*\.)?((\w*(moe|expert)\w*)(\..*)?|(gate|up|down)_proj|w[io](_\d)?)", re.I)
_OUTPUTS = ("o_proj", "out", "attn_vec_einsum")  # modules whose `in` is (heads, d)


def recognises(opened: Opened) -> bool:
    """Whether a path is an orbax checkpoint; `read` refuses those that are no adapters."""
    return opened.container == "orbax"


def read(opened: Opened) -> Found:
    """The updates of a checkpoint. Raises ValueError that names it if it is damaged or has none."""
    checkpoint = open_checkpoint(opened.file)
    layers: dict[tuple[str, str], dict[str, pairs.Lazy]] = {}
    others = 0
    for keys in checkpoint.arrays:
        if place := _place(keys):
            program, layer, side = place
            layers.setdefault((program, layer), {})[side] = checkpoint.lazy(keys)
        else:
            others += 1
    if not layers:
        raise ValueError(
            f"{checkpoint.path}: no adapter in it: expected lora/a and lora/b, or ..._lora_a and "
            f"..._lora_b, among its {others} arrays"
        )
    programs = {program for program, _ in layers}
    config = _config(opened, checkpoint)
    updates = [
        one
        for (program, layer), sides in layers.items()
        for one in _updates(checkpoint, program, layer, sides, config, opened)
    ]
    notes = (f"{others} other arrays, of the base or trained beside, are not read",) * (others > 0)
    name = "MaxText" if "lora" in checkpoint.custom else ", ".join(sorted(programs))
    return Found(name, opened.path, tuple(updates), {}, config, notes)


def _place(keys: tuple[str, ...]) -> tuple[str, str, str] | None:
    """(program, layer, side) of an array that is a factor."""
    keys = keys[:-1] if keys[-1] == "value" else keys  # of an nnx.Variable
    while keys and keys[0] == "params":
        keys = keys[1:]
    if len(keys) > 2 and keys[-2] == "lora" and keys[-1] in ("a", "b"):
        return "gemma", ".".join(keys[:-2]), keys[-1]
    if keys and (match := _OLDER.fullmatch(keys[-1])):
        return "MaxText", ".".join(keys[:-1]), match["side"]
    if keys and (match := _QWIX.fullmatch(keys[-1])):
        weight = () if match["weight"] in _PLAIN else (match["weight"],)
        return "tunix", ".".join((*keys[:-1], *weight)), match["side"]
    return None


def _config(opened: Opened, checkpoint: Checkpoint) -> dict[str, Any]:
    """MaxText's sidecar {lora_rank, lora_alpha} or the adapter_config.json of its older files."""
    sidecar = checkpoint.custom.get("lora")
    return dict(sidecar) if isinstance(sidecar, dict) else dict(opened.config)


def _updates(checkpoint, program, layer, sides, config, opened: Opened) -> list[Update]:
    a, b = sides.get("a"), sides.get("b")
    if a is None or b is None:
        raise ValueError(f"{checkpoint.path}: {layer}: needs both a and b")
    if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
        raise ValueError(f"{checkpoint.path}: {layer}: a {a.shape} and b {b.shape} given")
    if program == "gemma":
        scale, source, warnings = 1.0, "1: gemma has no alpha", ()
    else:
        rank = "lora_rank" if "lora_rank" in config else "r"
        scale, source, warnings = alpha_over_rank(opened, a.shape[-1], config, ("lora_alpha", rank))
    axis = _stack(layer, a.shape, b.shape)
    if axis is None and len(a.shape) == 3 and _EXPERTS.fullmatch(layer):
        said = f"B is one for all {a.shape[0]} matrices of {layer}"
        each = {pairs.numbered(layer, i): pairs.flat_a(a.at(0, i)) for i in range(a.shape[0])}
        as_b, warnings = pairs.flat_b(b), (*warnings, said)
        return [pairs.update(*one, as_b, scale, source, warnings=warnings) for one in each.items()]
    if axis is None and len(a.shape) > 2 and layer.rpartition(".")[2] not in _OUTPUTS:
        said = f"a {a.shape}: its axes are taken as one input; if one is of heads, each is a LoRA"
        warnings = (*warnings, said)
    if axis is not None:
        sides = pairs.flat_a, pairs.flat_b
        return pairs.stack(layer, a, b, scale, source, *sides, warnings, axis)
    a, b = pairs.flat_a(a), pairs.flat_b(b)
    return [pairs.update(layer, a, b, scale, source, warnings=warnings)]


def _stack(layer: str, a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """The axis that is a stack in both, None if b begins with r and has none of a's axes.

    a is (..., r). Without a stack b is (r, out ...); on axis 0 it is (n, r, out ...); on axis 1
    (r, n, out ...) beside a (in, n, ..., r), in a layer whose name has no number.
    """
    r = a[-1]
    if len(a) < 3 or len(b) < 3:
        return None
    if a[0] == b[0] and b[1] == r:
        return 0
    scanned = not any(key.isdecimal() for key in layer.split("."))
    return 1 if scanned and b[0] == r and a[1] == b[1] else None
