"""Converts methods with arrays per matrix between their state and PEFT's modules.

`lorax.interop.peft.matrices` has the format of a module's arrays in a file.
"""

import pathlib
import re

import numpy as np

from lorax import methods, tree
from lorax.interop import peft
from lorax.interop.peft import matrices
from lorax.interop.peft.config import check_targets
from lorax.interop.peft.modules import Arrays, Place
from lorax.interop.places import as_index, fused_width, natural
from lorax.models import Base


def write(method: methods.Method, state: methods.State, base: Base):
    """(tensors, config) of PEFT's, by the modules that the state adapts."""
    arrays, trained = methods.joined(*state), methods.joined(state.trainable)
    shared = {name: np.asarray(x) for name, x in arrays.pop(method.name, {}).items()}
    modules: dict[str, tuple[Place, dict[str, Arrays]]] = {}
    for layer, (path, index) in base.layers.items():
        layer_arrays = {name: np.asarray(x)[index] for name, x in arrays.get(path, {}).items()}
        if not layer_arrays or "w" in layer_arrays:
            continue
        if layer_arrays.get("on", any(layer_arrays[name].any() for name in trained[path])):
            place = _place(base.places.module(layer), base, method.name)
            modules.setdefault(place.name, (place, {}))[1][layer] = layer_arrays
    if not modules:
        raise ValueError(f"{method.name}: nothing to save, no matrix is adapted")
    kind = matrices.KINDS[method.name]
    tensors, config = kind.write([*modules.values()], shared, method.hp)
    config["target_modules"] = sorted(modules)
    if any(place.conv1d for place, _ in modules.values()):
        config["fan_in_fan_out"] = True
    return tensors, config


def read(name: str, stored: Arrays, config: dict, base: Base, directory: pathlib.Path):
    """(hyperparameters, {path/name: {index in the stack: array}}, the other tensors)."""
    kind, file = matrices.KINDS[name], directory / peft.WEIGHTS
    modules, shared, rest = _sort(kind.names, stored)
    if not modules:
        raise ValueError(f"{file}: holds no tensors of {config['peft_type']}")
    check_targets(config, modules, directory / peft.CONFIG)
    placed = [
        (_place(module, base, f"{file}: {name}"), modules[module])
        for module in sorted(modules, key=natural)
    ]
    hp, layers, shared = kind.read(placed, shared, config, directory)
    arrays = {f"{name}/{leaf}": {(): x} for leaf, x in shared.items()}
    for layer, layer_arrays in layers.items():
        path, index = base.layers[layer]
        for leaf, value in layer_arrays.items():
            arrays.setdefault(f"{path}/{leaf}", {})[index] = value
    hp |= _chosen(base, layers)
    if name == "ia3":
        paths = {base.layers[layer].path for layer in layers}
        inner = {path for path in paths if f"{path}/l_in" in arrays}
        both = sorted(path for path in inner if f"{path}/l" in arrays)
        if both:
            raise ValueError(f"{file}: {', '.join(both)}: some layers scale the input, some not")
        hp["feedforward"] = _exactly(inner)
    return hp, arrays, rest


def _sort(names: str, stored: Arrays):
    """({module: {name below it: tensor}}, {name: tensor} of no single module, the other tensors).
    names: a regex for the method's names below a module."""
    modules: dict[str, Arrays] = {}
    shared, rest = {}, {}
    for key, tensor in stored.items():
        if key.startswith("base_model."):
            shared[key.removeprefix("base_model.")] = tensor
        elif match := re.fullmatch(rf"(?P<module>.+)\.(?P<name>{names})", key):
            modules.setdefault(match["module"], {})[match["name"]] = tensor
        else:
            rest[key] = tensor
    return modules, shared, rest


def _chosen(base: Base, layers) -> dict:
    """The hyperparameters targets and layers whose product is the smallest that covers `layers`."""
    parts = [base.layers[layer] for layer in layers]
    paths, numbers = {path for path, _ in parts}, {i for _, index in parts for i in index}
    flat = tree.flatten(base.params)
    depth = max((flat[path].shape[0] for path in paths if base.sites[path].stack), default=0)
    every = len(numbers) in (0, depth)
    return {"targets": _exactly(paths), "layers": None if every else tuple(sorted(numbers))}


def _exactly(paths) -> tuple[str, ...]:
    """Words for exactly these parameter paths."""
    return tuple(f"re:{re.escape(path)}" for path in sorted(paths))


def _is_linear(base: Base, path: str) -> bool:
    return base.sites[path].kind == "linear"


def _place(module: str, base: Base, where: str) -> Place:
    """The `Place` of a linear module. Raises ValueError, which begins with `where`, for any other
    module."""
    flat, places = tree.flatten(base.params), base.places
    linear = {
        layer: part.path for layer, part in base.layers.items() if _is_linear(base, part.path)
    }
    parts = {p.rpartition("/")[0]: s for p, s in places.at(f"{module}.weight").items()}
    if not parts or not parts.keys() <= linear.keys():
        known = sorted({re.sub(r"\.\d+\.", ".{}.", places.module(layer)) for layer in linear})
        raise ValueError(f"{where}: {module} is none of the linear layers, {', '.join(known)}")
    path = linear[next(iter(parts))]
    _, inputs, outputs = base.sites[path].matrix_shape(flat[path].shape)
    fused = any(source.part is not None for source in parts.values())
    return Place(
        module,
        inputs,
        fused_width(parts) if fused else outputs,
        {layer: as_index(source.part) for layer, source in parts.items()},
        fused,
        conv1d=all(source.axes is None for source in parts.values()),
    )
