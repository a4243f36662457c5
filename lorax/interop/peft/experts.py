"""Experts in PEFT's files: `target_parameters`, one pair of tensors for all experts of a layer.

transformers 5 holds a layer's experts in two parameters, `gate_up_proj` and `down_proj`, and PEFT's
ParamWrapper adapts a parameter: with E experts and rank r

    lora_A.weight (E r, in)    rows e r to (e + 1) r are A of expert e
    lora_B.weight (out, r E)   columns e, e + E, e + 2 E... are B of expert e

whatever the order of the parameter's own axes. One wrapper goes around the other, so the tensors of
`gate_up_proj` are "...experts.base_layer.lora_A.weight" if `down_proj` is adapted as well. Here an
expert's part is a module of its own, "...experts.5.gate_up_proj", which `lora` reads and writes
like any fused module. A router is a parameter in transformers 5, too, with the tensors of a linear
layer.

Files of transformers 4 have a module for each expert ("...experts.5.up_proj", "...experts.5.w3").
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.peft.config import CONFIG, WEIGHTS, from_patterns, scale_of
from lorax.interop.peft.metadata import rescale
from lorax.interop.places import Places

if TYPE_CHECKING:
    from lorax.interop.peft.lora import Joined

#: The parameters of transformers' experts, in the order in which PEFT wraps them.
PARAMETERS = ("gate_up_proj", "down_proj")
_ONE = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<name>\w+)")
_INNER = ".base_layer"


# ---------------------------------------------------------------------------------------- writing


def with_one_scale(modules: dict[str, dict[str, Factors]]) -> dict[str, dict[str, Factors]]:
    """{module: {layer: factors}} in which the experts of a layer have the largest of their scales,
    as a file has one for all of them. B is multiplied by what its scale is smaller."""
    scales: dict[str, list[float]] = {}
    for module, parts in modules.items():
        if match := _ONE.fullmatch(module):
            of_all = scales.setdefault(f"{match['experts']}.{match['name']}", [])
            of_all += [float(one.s) for one in parts.values()]
    result = {}
    for module, parts in modules.items():
        match = _ONE.fullmatch(module)
        of_all = scales[f"{match['experts']}.{match['name']}"] if match else ()
        if len(set(of_all)) > 1:
            s = max(of_all, key=abs)
            parts = {
                layer: one._replace(b=rescale(one.b, float(one.s), s), s=s)
                for layer, one in parts.items()
            }
        result[module] = parts
    return result


def pack(joined: Mapping[str, Joined], places: Places) -> dict[str, Joined]:
    """The modules of a file, in which the experts of a layer are one.

    Those are named by their parameter, "...experts.gate_up_proj". An expert that is not adapted has
    zeros, and ranks are padded with zeros to the largest.
    """
    packed, experts = {}, {}
    for module, one in joined.items():
        match = _ONE.fullmatch(module)
        if match is None:
            packed[module] = one
        else:
            parameter = f"{match['experts']}.{match['name']}"
            experts.setdefault(parameter, {})[int(match["expert"])] = one
    for parameter, each in experts.items():
        packed[parameter] = _stacked(each, places.experts[re.sub(r"\.\d+\.", ".{}.", parameter)])
    return packed


def _stacked(each: dict[int, Joined], experts: int) -> Joined:
    """One pair of tensors from those of single experts, which have one scale."""
    rank, first = max(one.rank for one in each.values()), next(iter(each.values()))
    scale = first.alpha / first.rank
    a = np.zeros((experts, rank, first.tensors["lora_A.weight"].shape[1]), np.float32)
    b = np.zeros((first.tensors["lora_B.weight"].shape[0], rank, experts), np.float32)
    parts: dict[str, dict[str, Any]] = {}
    for expert, one in each.items():
        a[expert, : one.rank] = one.tensors["lora_A.weight"]
        b[:, : one.rank, expert] = one.tensors["lora_B.weight"]
        parts |= one.parts
    tensors = {"lora_A.weight": a.reshape(experts * rank, -1)}
    tensors["lora_B.weight"] = b.reshape(len(b), rank * experts)
    return first._replace(tensors=tensors, rank=rank, alpha=scale * rank, parts=parts)


def is_parameter(module: str) -> bool:
    """Whether a packed module is a parameter in transformers 5: of experts, or a router."""
    return module.endswith(tuple(f".experts.{name}" for name in PARAMETERS)) or is_router(module)


def is_router(module: str) -> bool:
    """Whether a module is the router of a mixture of experts, by transformers' names."""
    return re.fullmatch(r".*\.(mlp|block_sparse_moe)\.(gate|router)", module) is not None


def parameter_of(module: str) -> str:
    """The name of a packed module in `target_parameters`."""
    return f"{module}.weight" if is_router(module) else module


def stored_at(module: str, modules: Mapping[str, Any]) -> str:
    """The module below which PEFT stores the tensors of a packed module; modules: all of them."""
    container, _, name = module.rpartition(".")
    if name not in PARAMETERS or not container.endswith(".experts"):
        return module
    around = [other for other in PARAMETERS[PARAMETERS.index(name) + 1 :]]
    return container + _INNER * sum(f"{container}.{other}" in modules for other in around)


# ---------------------------------------------------------------------------------------- reading


class Part(NamedTuple):
    """One expert's part of the tensors of a parameter: A[rows] (r, in) and B[:, columns] (out, r),
    of arrays or of places in a file; s: its scale."""

    A: Any
    B: Any
    rows: range
    columns: range
    s: float

    def factors(self) -> Factors:
        """Those of arrays, oriented as ours."""
        a, b = self.A[self.rows.start : self.rows.stop].T, self.B[:, self.columns].T
        return Factors(np.ascontiguousarray(a), np.ascontiguousarray(b), self.s)


def unpack(
    modules: Mapping[str, dict], config: Mapping[str, Any], places: Places, directory: pathlib.Path
) -> tuple[dict[str, dict], dict[str, Part]]:
    """(the modules of a file {module: {"A", "B", "m"}} that are single matrices, {"...experts.5.
    gate_up_proj": part} of the experts in the others); only shapes are looked at.

    Raises ValueError if experts are missing: the tensors of a targeted parameter, or the update of
    some experts of a layer.
    """
    targets, rest, depths = config.get("target_parameters") or [], dict(modules), {}
    for module in modules:
        container = module.replace(_INNER, "")
        if container.endswith(".experts"):
            depths.setdefault(container, []).append(module)
            del rest[module]
    parts: dict[str, Part] = {}
    for container, stored in depths.items():
        names = [name for name in PARAMETERS if _targeted(f"{container}.{name}", targets)]
        if len(names) != len(stored):
            raise ValueError(
                f"{directory / WEIGHTS}: {container}: updates of {len(stored)} parameters, and "
                f"{CONFIG} has {', '.join(names) or 'none'} of them in target_parameters"
            )
        for name, module in zip(names, sorted(stored, key=len, reverse=True), strict=True):
            parameter = f"{container}.{name}"
            each = _split(parameter, modules[module], config, places, directory)
            parts |= {f"{container}.{e}.{name}": one for e, one in each.items()}
    _check_complete(rest, places, directory / WEIGHTS)
    return rest, parts


def _targeted(parameter: str, targets) -> bool:
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _split(parameter: str, sides: dict, config, places: Places, directory: pathlib.Path):
    """{expert: its part} of one parameter."""
    file, (A, B) = directory / WEIGHTS, (sides.get(side) for side in "AB")
    r = from_patterns(config.get("rank_pattern"), parameter, config.get("r", 8))
    if A is None or B is None or len(A.shape) != 2 or len(B.shape) != 2 or "m" in sides:
        raise ValueError(f"{file}: {parameter}: need A (E r, in) and B (out, r E), and no more")
    known = places.experts.get(re.sub(r"\.\d+\.", ".{}.", parameter))
    experts = known or A.shape[0] // r
    if A.shape[0] != experts * r or B.shape[1] != experts * r or not experts:
        raise ValueError(
            f"{file}: {parameter}: A {A.shape} and B {B.shape} given; "
            f"{experts} experts of rank {r} have A ({experts * r}, in), B (out, {experts * r})"
        )
    scale = scale_of(config, parameter, r, directory / CONFIG)
    rows = lambda e: range(e * r, (e + 1) * r)
    columns = lambda e: range(e, experts * r, experts)
    return {e: Part(A, B, rows(e), columns(e), scale) for e in range(experts)}


def _check_complete(modules: Mapping[str, Any], places: Places, file: pathlib.Path) -> None:
    """Raises ValueError if a file of transformers 4 has only some experts of a layer."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_ONE.fullmatch, modules)):
        numbers.setdefault((match["experts"], match["name"]), set()).add(int(match["expert"]))
    for (container, name), given in numbers.items():
        most = max([*places.experts.values(), max(given) + 1])
        missing = sorted(set(range(most)) - given)
        if missing:
            raise ValueError(
                f"{file}: {container}: {name} of experts {', '.join(map(str, missing))} has no "
                "update, of the others it has; PEFT adapts all experts of a layer"
            )
