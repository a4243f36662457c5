"""Flux.1's modules: by its authors' names, which kohya, ComfyUI and XLabs take, and by diffusers'.

    double_blocks.0.img_attn.qkv        transformer_blocks.0.attn.to_q, .to_k, .to_v
    double_blocks.0.txt_attn.qkv        transformer_blocks.0.attn.add_q_proj, .add_k_proj, ...
    single_blocks.0.linear1             single_transformer_blocks.0.attn.to_q, ..., .proj_mlp
    final_layer.adaLN_modulation.1      norm_out.linear, with the halves of its rows swapped

(diffusers, loaders/lora_conversion_utils.py, `_convert_kohya_flux_lora_to_diffusers`, which drops
the alpha of the last two.) A LoRA of a fused module is one of each part, with copies of its A; one
that is zero outside its blocks (`fused`: split_qkv) is one of each part with an A of its own. s
stays what programs apply. Back again, parts with one A are one LoRA, others are stored as blocks.

Other models have modules of these names in other sizes, so the inputs must be Flux.1's.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Found, Update

HIDDEN = 3072  # features of every block
_KINDS = ("LoRA", "DoRA", "AdaLoRA")  # of which rows can be taken
_STREAM = {
    "{}_attn.qkv": ("attn.{1}q{2}", "attn.{1}k{2}", "attn.{1}v{2}"),
    "{}_attn.proj": ("attn.{3}",),
    "{}_mlp.0": ("ff{0}.net.0.proj",),
    "{}_mlp.2": ("ff{0}.net.2",),
    "{}_mod.lin": ("norm1{0}.linear",),
}
_WORDS = {"img": ("", "to_", "", "to_out.0"), "txt": ("_context", "add_", "_proj", "to_add_out")}
_DOUBLE = {
    name.format(stream): tuple(part.format(*words) for part in parts)
    for stream, words in _WORDS.items()
    for name, parts in _STREAM.items()
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTER = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_OUTER |= {
    f"{name}_in.{way}_layer": f"time_text_embed.{theirs}_embedder.linear_{i}"
    for name, theirs in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items()
    for i, way in enumerate(("in", "out"), 1)
}
_SWAPPED = "norm_out.linear"
_OUTER |= {"final_layer.adaLN_modulation.1": _SWAPPED}
_XLABS = {
    ("double", "qkv_lora1"): _DOUBLE["img_attn.qkv"],
    ("double", "qkv_lora2"): _DOUBLE["txt_attn.qkv"],
    ("double", "proj_lora1"): _DOUBLE["img_attn.proj"],
    ("double", "proj_lora2"): _DOUBLE["txt_attn.proj"],
    ("single", "qkv"): _QKV,
    ("single", "proj"): ("proj_out",),
}
_FLAT = {
    f"{kind}_{name.replace('.', '_')}": parts
    for kind, table in (("double", _DOUBLE), ("single", _SINGLE))
    for name, parts in table.items()
}
#: By flattened names, and the other way.
_FLAT_OUTER = {name.replace(".", "_"): theirs for name, theirs in _OUTER.items()}
_OF_OUTER = {theirs: flat for flat, theirs in _FLAT_OUTER.items()}
_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
_IN_BLOCK = re.compile(r"(?P<kind>double|single)_blocks_(?P<n>\d+)_(?P<end>.+)")
_OF_XLABS = re.compile(r"(?P<kind>double|single)_blocks\.(?P<n>\d+)\.(processor\.)?(?P<end>.+)")
_OF_DIFFUSERS = re.compile(r"(?P<blocks>(single_)?transformer_blocks)\.(?P<n>\d+)\.(?P<end>.+)")

_ENDS = ("q", "k", "v", "mlp")  # of parts, as `fused` calls them

Refused = Callable[[str], ValueError]


class _Part(NamedTuple):
    """A module of diffusers' as part `i` of one of kohya's. kohya: its name. of: all its parts."""

    kohya: str
    i: int
    of: tuple[str, ...]


def parts(layer: str) -> tuple[str, ...]:
    """diffusers' names of what a module of kohya's, ComfyUI's or XLabs's consists of, () for one
    that Flux does not have."""
    if match := _OF_XLABS.fullmatch(layer):
        ends = _XLABS.get((match["kind"], match["end"]), ())
    else:
        flat = re.sub(r"^(lora_unet_|diffusion_model\.)", "", layer)
        if flat == layer:
            return ()
        flat = flat.replace(".", "_")
        match = _IN_BLOCK.fullmatch(flat)
        if match is None:
            return (f"transformer.{_FLAT_OUTER[flat]}",) if flat in _FLAT_OUTER else ()
        ends = _FLAT.get(f"{match['kind']}_{match['end']}", ())
    return tuple(f"transformer.{_BLOCKS[match['kind']]}.{match['n']}.{end}" for end in ends)


def kohya(layer: str) -> str | None:
    """kohya's name of a module of ComfyUI's, None for one that Flux does not have."""
    flat = f"lora_unet_{layer.removeprefix('diffusion_model.').replace('.', '_')}"
    return flat if layer.startswith("diffusion_model.") and parts(flat) else None


def _part(name: str) -> _Part | None:
    """A module by diffusers' name, with the word "transformer." before it or without."""
    path = name.removeprefix("transformer.")
    if match := _OF_DIFFUSERS.fullmatch(path):
        kind = "single" if match["blocks"] == _BLOCKS["single"] else "double"
        table = _DOUBLE if kind == "double" else _SINGLE
        for fused, ends in table.items():
            if match["end"] in ends:
                flat = f"lora_unet_{kind}_blocks_{match['n']}_{fused.replace('.', '_')}"
                return _Part(flat, ends.index(match["end"]), ends)
        return None
    flat = _OF_OUTER.get(path)
    return _Part(f"lora_unet_{flat}", 0, (path,)) if flat else None


# ----------------------------------------------------------------------------------- to diffusers


def apart(found: Found, refused: Refused) -> Found:
    """A file with diffusers' names, each fused module taken apart; itself if it has none of Flux's.

    Raises ValueError for modules of another size, and for kinds that can't be taken apart.
    """
    named = [(update, parts(update.layer)) for update in found.updates]
    _check_inputs([(names[0], update) for update, names in named if names], refused)
    made: list[Update] = []
    for update, names in named:
        if len(names) > 1 or names and names[0].endswith(_SWAPPED):
            _check_kind(update, refused)
        if len(names) > 1:
            made += _split(update, names, refused)
        elif names and names[0].endswith(_SWAPPED):
            made.append(_rows(update, names[0], _swap(update.shape[1])))
        else:
            made.append(update._replace(layer=names[0]) if names else update)
    return found._replace(updates=tuple(made))


def _check_inputs(named: Sequence[tuple[str, Update]], refused: Refused) -> None:
    """Raises ValueError unless there are modules in blocks, of Flux.1's size. named: diffusers'
    names of modules, or of the first part of each."""
    blocks = [(name, update) for name, update in named if "transformer_blocks." in name]
    if named and not blocks:
        raise refused("no module in its blocks: Flux's or another model's is not known")
    times = {"ff.net.2": 4, "ff_context.net.2": 4, "proj_out": 5}
    for name, update in blocks:
        inputs = HIDDEN * next((n for end, n in times.items() if name.endswith(f".{end}")), 1)
        if update.shape[0] != inputs:
            raise refused(
                f"{update.layer} has {update.shape[0]} inputs, in Flux.1 {inputs}; names of other "
                "transformers are not known"
            )


def _check_kind(update: Update, refused: Refused) -> None:
    if update.kind not in _KINDS:
        raise refused(
            f"{update.layer} is {update.kind} of a fused module, or of a part; only "
            f"{', '.join(_KINDS)} can be taken apart or joined"
        )


def _sizes(count: int) -> list[int]:
    """Outputs of the parts of a fused module."""
    return [HIDDEN] * 3 + [4 * HIDDEN] * (count - 3)


def _swap(n: int) -> np.ndarray:
    return np.r_[n // 2 : n, : n // 2]


def _rows(update: Update, name: str, rows, rank: slice = slice(None)) -> Update:
    """The update of some outputs, with some of its directions."""
    n = len(np.arange(update.shape[1])[rows])
    r = len(range(update.rank)[rank])

    def read() -> Factors:
        a, b, s, m = update.read()
        return Factors(a[:, rank], b[rank][:, rows], s, None if m is None else m[rows])

    return update._replace(layer=name, shape=(update.shape[0], n), rank=r, read=read)


def _split(update: Update, names: Sequence[str], refused: Refused) -> list[Update]:
    sizes = _sizes(len(names))
    if update.shape[1] != sum(sizes):
        raise refused(
            f"{update.layer} has {update.shape[1]} outputs, Flux.1 has {sum(sizes)}; names of "
            "other models are not known"
        )
    ends = [*itertools.accumulate(sizes)]
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    r = update.rank // len(names)
    inner = [slice(r * i, r * i + r) for i in range(len(names))]
    if update.rank % len(names) or not _is_blocks(update.read().b, rows, inner):
        inner = [slice(None)] * len(names)
    return [
        _rows(update, name, *of)
        for name, of in zip(names, zip(rows, inner, strict=True), strict=True)
    ]


def _is_blocks(b: np.ndarray, rows: Sequence[slice], inner: Sequence[slice]) -> bool:
    """Whether b (r, out) is zero outside its blocks, and has some in each."""
    for out, own in zip(rows, inner, strict=True):
        block = b[:, out]
        if not block[own].any() or block[: own.start].any() or block[own.stop :].any():
            return False
    return True


# --------------------------------------------------------------------------------------- to kohya


def joined(found: Found, refused: Refused) -> Found:
    """A file with kohya's names, parts of a fused module joined; itself if it has none of Flux's.

    Raises ValueError for modules of another size, for parts with different scales, and for kinds
    that can't be joined.
    """
    if found.format == "XLabs":  # whose fused modules are smaller ones than kohya's
        found = apart(found, refused)
    groups: dict[str, dict[int, Update]] = {}
    of: dict[str, tuple[str, ...]] = {}
    made: list[Update] = []
    for update in found.updates:
        part = _part(update.layer)
        if part is None:
            flat = kohya(update.layer)
            made.append(update._replace(layer=flat) if flat else update)
            continue
        if part.i in groups.setdefault(part.kohya, {}):
            raise refused(f"{update.layer} occurs twice")
        groups[part.kohya][part.i] = update
        of[part.kohya] = part.of
    _check_inputs(
        [(one.layer, one) for group in groups.values() for one in group.values()], refused
    )
    for name, group in groups.items():
        if len(of[name]) > 1:
            made.append(_fused(name, group, len(of[name]), refused))
        elif of[name] == (_SWAPPED,):
            (update,) = group.values()
            _check_kind(update, refused)
            made.append(_rows(update, name, _swap(update.shape[1])))
        else:
            made.append(group[0]._replace(layer=name))
    return found._replace(updates=tuple(made))


def _fused(name: str, group: Mapping[int, Update], count: int, refused: Refused) -> Update:
    """The update of a fused module."""
    sizes = _sizes(count)
    for i, update in group.items():
        _check_kind(update, refused)
        if update.shape != (HIDDEN, sizes[i]):
            raise refused(f"{update.layer} is {update.shape}, in Flux.1 {(HIDDEN, sizes[i])}")
    if len(scales := {update.scale for update in group.values()}) > 1:
        raise refused(f"{name} would have several scales, {sorted(scales)}: kohya's has one")
    kinds = {update.kind for update in group.values()}
    dora = "DoRA" in kinds
    if dora and (len(group) < count or len(kinds) > 1):
        raise refused(f"{name} would be DoRA in {len(group)} of its {count} parts")
    each = [group[i] for i in sorted(group)]
    # Copies of one A, as a converter makes them, are one A again.
    first = each[0].read().a if len({update.rank for update in each}) == 1 else None
    one = first is not None and all(np.array_equal(first, x.read().a) for x in each[1:])
    rank = each[0].rank if one else sum(update.rank for update in each)
    starts = [*itertools.accumulate(sizes, initial=0)]

    def read() -> Factors:
        b, at, some = np.zeros((rank, sum(sizes)), np.float32), 0, []
        for i in sorted(group):
            x = group[i].read()
            b[at : at + len(x.b), starts[i] : starts[i + 1]] = x.b
            at += 0 if one else len(x.b)
            some.append(x)
        a = some[0].a if one else np.concatenate([x.a for x in some], axis=1)
        m = np.concatenate([x.m for x in some]) if dora else None
        return Factors(a, b, some[0].s, m)

    shape, kind = (HIDDEN, sum(sizes)), "DoRA" if dora else "LoRA"
    return each[0]._replace(layer=name, kind=kind, shape=shape, rank=rank, read=read)


# ----------------------------------------------------------------------------------- in comparisons


def known(layer: str) -> str | None:
    """diffusers' name of a module of any of these formats, or of a part of one as `fused` names it;
    of a fused module the names of its parts, as `fused` joins them; None for other modules."""
    around, _, end = layer.rpartition(".")
    if end in _ENDS and (own := parts(around)):
        return own[_ENDS.index(end)] if len(own) > _ENDS.index(end) else None
    if not (own := parts(layer)):
        return None
    ends = (name.rpartition(".")[2] for name in own)
    return f"{own[0].rpartition('.')[0]}.{'+'.join(ends)}"
