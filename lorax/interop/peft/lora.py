"""LoRA and DoRA adapters in Hugging Face PEFT's on-disk format.

A directory holds `adapter_model.safetensors` and `adapter_config.json`. PEFT stores, for a module
with y = W x, `lora_A.weight` (r, in) and `lora_B.weight` (out, r) and scales by lora_alpha / r;
ours are y = x @ w + s * (x @ a) @ b, so A = a^T, B = b^T and lora_alpha = s * r. Neither is ever
stored transposed, whatever `fan_in_fan_out` says about the base's own weight. Of a convolution, A
is (r, in, height, width) and B is (out, r, 1, 1); the rows of our a are those of our kernel
(height, width, in, out).

A fused module (GPT-2's c_attn holds q, k and v side by side) is joined exactly: A has the rows of
all parts one after the other (only once if parts share them) and B is block-diagonal. PEFT reads
that as one module; the file's metadata says how to split it again. Experts: see `experts`.

A head that is tied to the embedding shares its update here. PEFT adapts modules, not weights, so
such an update is written for both, and read as one if both agree.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax.interop.adapter import Adapter, Factors
from lorax.interop.peft import experts, files
from lorax.interop.peft.config import (
    CONFIG,
    WEIGHTS,
    as_patterns,
    check_targets,
    read_config,
    scale_of,
)
from lorax.interop.peft.files import PREFIX
from lorax.interop.peft.metadata import rescale, take_apart
from lorax.interop.peft.whole import (
    TYING,
    check_saved,
    how_saved,
    oriented,
    stored_weights,
    with_head,
    without_head,
)
from lorax.interop.places import (
    Places,
    as_index,
    columns_as_json,
    fused_width,
    natural,
    place_as_json,
)

if TYPE_CHECKING:
    from lorax.interop.hf import Source  # it imports JAX, which reading an adapter can do without

_FACTOR = re.compile(
    r"(?P<module>.+)\."
    r"(lora_(embedding_)?(?P<side>[AB])(\.weight)?|(?P<m>lora_magnitude_vector)(\.weight)?)"
)


def save(
    directory: str | os.PathLike,
    adapter: Adapter | Mapping[str, Factors],
    sources: Mapping[str, Source],
    base_name: str,
    dropout: float = 0.0,
    task_type: str | None = "CAUSAL_LM",
) -> pathlib.Path:
    """Write an adapter that PEFT loads and `load` reads back.

    It comes back bit for bit if the parts of each fused module have one scale. Otherwise B is
    multiplied by the ratio of the scales and divided by it again, rounded to float32.

    Args:
      adapter: an `Adapter`, or only its factors. Its config is not written.
      sources: the places of the base's parameters in Hugging Face's tensors (`hf_tensors` of a
        family).
      base_name: what PEFT should load as the base model (a Hub id or a directory).
      dropout: on the adapter's input in training; recorded, without effect on the weights.
      task_type: PEFT's word for the kind of model: "CAUSAL_LM", "SEQ_CLS"... or None.

    Returns the directory. Raises ValueError that names the path if the base lacks it, shapes don't
    fit together, the rank is 0, the scale is not finite, or PEFT has no way to store it.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter(dict(adapter), {}, {})
    if not adapter.factors:
        raise ValueError("factors: nothing to save, no matrix is adapted")
    places = Places(sources)
    factors, weights, tied = _for_both_uses(adapter, places, "head/bias" in sources, task_type)
    modules: dict[str, dict[str, Factors]] = {}
    for layer, factor in factors.items():
        _check(layer, factor)
        modules.setdefault(places.module(layer), {})[layer] = factor
    plain = sorted(layer for layer, factor in factors.items() if factor.m is None)
    dora = len(plain) < len(factors)
    if dora and plain:
        raise ValueError(
            f"{plain[0]}: no magnitudes, but others have: PEFT has DoRA in all or none"
        )
    modules = experts.with_one_scale(modules)
    joined = {module: _join(module, places, parts) for module, parts in sorted(modules.items())}
    joined = experts.pack(joined, places)
    whole = stored_weights(weights, places)
    saved, bias = how_saved(whole, set(modules), places, task_type)
    tensors: dict[str, np.ndarray] = {}
    for module, stored in joined.items():
        below = experts.stored_at(module, joined)
        tensors |= {f"{below}.{name}": tensor for name, tensor in stored.tensors.items()}
    for name, tensor in whole.items():
        module, _, last = name.rpartition(".")
        tensors[f"{module}.base_layer.{last}" if module in modules else name] = tensor
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    metadata = {
        "factors": {
            layer: entry for stored in joined.values() for layer, entry in stored.parts.items()
        },
        "weights": {path: place_as_json(places.of(path)) for path in weights},
        "tied": tied,
    }
    config = _config(joined) | {
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        # PEFT has no dropout on the input of a parameter, and refuses a config with any.
        "lora_dropout": 0.0 if any(map(experts.is_parameter, joined)) else float(dropout),
        "bias": bias,
        "modules_to_save": saved or None,
        "use_dora": dora,
    }
    return files.write(directory, tensors, config, {"lorax": json.dumps(metadata)})


def _for_both_uses(adapter: Adapter, places: Places, masked: bool, task_type: str | None):
    """(factors, weights, path of the tied embedding or ""), where an update of the embedding is
    also one of the tied head. masked: whether the head is a masked language model's."""
    factors, weights, tied = adapter.factors, adapter.weights, places.tied
    if not tied or not adapter.config.get(TYING, True):
        return factors, weights, tied
    if tied in factors and masked:
        raise ValueError(
            f"{tied}: an update of an embedding that a masked language model's head shares "
            "can't be stored: PEFT would adapt the embedding alone"
        )
    tied = tied if task_type == "CAUSAL_LM" else ""
    return *with_head(factors, weights, tied), tied


def _config(joined: Mapping[str, Joined]) -> dict[str, Any]:
    """The fields of a config for these modules: the commonest rank and alpha, and patterns for the
    modules that differ."""
    modules = sorted(module for module in joined if not experts.is_parameter(module))
    parameters = sorted(experts.parameter_of(module) for module in joined if module not in modules)
    joined = {
        experts.parameter_of(m) if experts.is_parameter(m) else m: one for m, one in joined.items()
    }
    r, ranks = as_patterns({module: module_.rank for module, module_ in joined.items()})
    alpha, alphas = as_patterns({module: module_.alpha for module, module_ in joined.items()})
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "revision": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": modules,
        "fan_in_fan_out": any(module_.conv1d for module_ in joined.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
    } | ({"target_parameters": parameters} if parameters else {})


def load(directory: str | os.PathLike, sources: Mapping[str, Source] | None = None) -> Adapter:
    """Read a PEFT adapter: LoRA or DoRA, with any weights trained in full.

    `rank_pattern`, `alpha_pattern` and `use_rslora` are honoured. The parts of a fused module each
    get the shared `a` and their own columns of `b`, so they share one row space.

    Args:
      sources: the places of the base's parameters in Hugging Face's tensors (`hf_tensors` of a
        family). Without them an adapter written by `save` still has its paths; a foreign one has
        the names of its modules and tensors, with fused modules unsplit and full weights as stored.

    Names of tensors may be a running model's, with one adapter's name in them (`own_names`).

    Raises FileNotFoundError, or ValueError that names the file for a damaged file, another kind of
    adapter (AdaLoRA...), factors that belong to a changed base (PiSSA, OLoRA...), fields and
    tensors that contradict each other or are not supported, and a module that `sources` lack. Warns
    about config fields that PEFT does not have.
    """
    directory = pathlib.Path(directory)
    file = directory / WEIGHTS
    config = read_config(directory / CONFIG)
    if config["peft_type"] != "LORA":
        given = f"{directory / CONFIG}: peft_type {config['peft_type']!r} given"
        raise ValueError(f"{given}; LORA is read here, others by lorax.adapters.peft_methods")
    stored, metadata = files.read_tensors(file)
    modules, whole = by_module(stored, file)
    places = Places(sources or {})
    modules, parts = experts.unpack(modules, config, places, directory)
    check_targets(config, modules, directory / CONFIG)
    for module, sides in modules.items() if sources else ():
        A = sides.get("A")
        check_window(module, () if A is None else A.shape[2:], places, file)
    updates = {name: part.factors() for name, part in parts.items()}
    updates |= {
        module: _update(module, sides, config, directory) for module, sides in modules.items()
    }
    updates = dict(sorted(updates.items(), key=lambda item: natural(item[0])))
    check_saved(config, whole, places, file)
    tied = places.tied
    if "lorax" in metadata:
        factors, weights, own_tied = take_apart(updates, whole, metadata["lorax"], places, file)
        tied = own_tied if tied or sources is None else ""
    elif sources is None:
        return Adapter(updates, whole, config)
    else:
        factors, weights = {}, {}
        for module, update in updates.items():
            factors |= split(module, update, places, file)
        for name, tensor in whole.items():
            weights |= oriented(name, tensor, places, file)
    adapter = Adapter(factors, weights, config)
    return without_head(adapter, tied) if tied else adapter


# ---------------------------------------------------------------------------------------- writing


class Joined(NamedTuple):
    """A module as stored. tensors: {name below the module: value}. rank, alpha: of the module.
    conv1d: whether its weight is (in, out). parts: {our layer: how to extract it again}."""

    tensors: dict[str, np.ndarray]
    rank: int
    alpha: float
    conv1d: bool
    parts: dict[str, dict[str, Any]]


def _join(module: str, places: Places, parts: dict[str, Factors]) -> Joined:
    """One module of PEFT's from the layers in it."""
    sources = places.at(f"{module}.weight")
    embedding = next(iter(sources)).endswith("/embedding")
    layers = {path.rsplit("/", 1)[0]: source for path, source in sources.items()}
    is_linear = lambda source: source.linear or source.axes in (None, (1, 0))
    window = next(iter(layers.values())).window
    if window is None and not all(map(is_linear, layers.values())):
        raise ValueError(f"{', '.join(parts)}: {module} is no linear layer or convolution")
    n_in, n_out = next(iter(parts.values())).a.shape[0], fused_width(sources)
    # The module has the largest scale; B is multiplied by each part's ratio to it, at most 1.
    scale = max((float(parts[layer].s) for layer in layers if layer in parts), key=abs)
    A: list[np.ndarray] = []
    blocks: list[tuple[slice | np.ndarray, slice, np.ndarray]] = []  # rows and columns of B, values
    entries: dict[str, dict[str, Any]] = {}
    rank = 0
    for layer in (layer for layer in layers if layer in parts):
        a, b, s, _ = parts[layer]
        part = layers[layer].part
        outputs = b.shape[1] if part is None else np.empty(n_out)[part].size
        if a.shape[0] != n_in or b.shape[1] != outputs:
            want = f"a ({n_in}, r) and b (r, {outputs})"
            raise ValueError(f"{layer}: need {want} in {module}, got {a.shape} and {b.shape}")
        same = next((other for other in entries if np.array_equal(parts[other].a, a)), None)
        rows = entries[same]["rows"] if same else f"{rank}:{rank + a.shape[1]}"
        if not same:
            A.append(np.asarray(a, np.float32).T)
            rank += a.shape[1]
        entries[layer] = {"module": module, "rows": rows, "scale": float(s)}
        entries[layer]["columns"] = columns_as_json(part)
        blocks.append((as_index(part), as_index(rows), rescale(b, float(s), scale).T))
    B = np.zeros((n_out or blocks[0][2].shape[0], rank), np.float32)
    for rows, columns, values in blocks:
        B[rows, columns] = values
    if embedding:
        tensors = {"lora_embedding_A": np.concatenate(A), "lora_embedding_B": B}
    else:
        tensors = {"lora_A.weight": np.concatenate(A), "lora_B.weight": B}
    if next(iter(parts.values())).m is not None:
        tensors["lora_magnitude_vector"] = _magnitudes(module, layers, parts)
    if window is not None:
        tensors = _of_convolution(tensors, window)
    conv1d = not embedding and all(source.axes is None for source in layers.values())
    return Joined(tensors, rank, scale * rank, conv1d, entries)


def _of_convolution(tensors: dict[str, np.ndarray], window: tuple[int, ...]) -> dict:
    """A, B and lengths of a matrix as those of the convolution that it is."""
    ones = (1,) * len(window)
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    A = np.moveaxis(A.reshape(len(A), *window, -1), -1, 1)  # (r, in, height, width)
    tensors |= {
        "lora_A.weight": np.ascontiguousarray(A),
        "lora_B.weight": B.reshape(*B.shape, *ones),
    }
    if "lora_magnitude_vector" in tensors:
        lengths = tensors["lora_magnitude_vector"]
        tensors["lora_magnitude_vector"] = lengths.reshape(1, -1, *ones)
    return tensors


def _magnitudes(module: str, layers: dict[str, Source], parts: dict[str, Factors]) -> np.ndarray:
    """DoRA's lengths of all columns of a module."""
    missing = [layer for layer in layers if layer not in parts]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not adapted, but a part of {module}: DoRA also stores the "
            "lengths of its columns, which are not known here. Adapt all parts"
        )
    m = np.zeros(sum(parts[layer].m.size for layer in layers), np.float32)
    for layer, source in layers.items():
        m[as_index(source.part)] = parts[layer].m
    return m


def _check(path: str, factor: Factors) -> None:
    a, b, s, m = factor
    if np.ndim(a) != 2 or np.ndim(b) != 2 or np.shape(a)[1] != np.shape(b)[0]:
        shapes = f"{np.shape(a)} and {np.shape(b)}"
        raise ValueError(f"{path}: need a (in, r) and b (r, out), got {shapes}")
    if np.shape(a)[1] == 0 and m is None:
        raise ValueError(f"{path}: rank 0; leave out a matrix that is not adapted")
    if not math.isfinite(s):
        raise ValueError(f"{path}: scale {s}; it must be finite")
    if m is not None and np.shape(m) != (np.shape(b)[1],):
        raise ValueError(f"{path}: need magnitudes m ({np.shape(b)[1]},), got {np.shape(m)}")


# ---------------------------------------------------------------------------------------- reading


def by_module(stored: Mapping[str, Any], file: pathlib.Path, same=np.array_equal):
    """({module: {"A", "B", "m"}}, {tensor trained in full: value}) by Hugging Face's names. The
    arguments are those of `own_names`."""
    modules: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for name, tensor in files.own_names(stored, file, same).items():
        if match := _FACTOR.fullmatch(name):
            modules.setdefault(match["module"], {})[match["side"] or "m"] = tensor
        elif files.WHOLE.fullmatch(name):
            whole[name] = tensor
        else:
            raise ValueError(f"{file}: {name}: no factor of LoRA, and no module's weight or bias")
    if not modules:
        raise ValueError(f"{file}: holds no lora_A and lora_B tensors")
    return modules, whole


def _update(module: str, sides: dict, config: dict, directory: pathlib.Path) -> Factors:
    """The factors of one module of Hugging Face, oriented as ours."""
    A, B, m = (sides.get(side) for side in ("A", "B", "m"))
    fits = A is not None and B is not None and 2 <= A.ndim == B.ndim and A.shape[0] == B.shape[1]
    if not fits or A.size == 0 or B.size == 0 or B.size != B.shape[0] * B.shape[1]:
        shapes = {side: tensor.shape for side, tensor in sides.items()}
        raise ValueError(
            f"{directory / WEIGHTS}: {module}: need A (r, in) and B (out, r), got {shapes}"
        )
    check_lengths(module, m, len(B), config, directory)
    scale = scale_of(config, module, A.shape[0], directory / CONFIG)
    a = np.ascontiguousarray(np.moveaxis(A, 1, -1).reshape(len(A), -1).T)
    b = np.ascontiguousarray(B.reshape(B.shape[:2]).T)
    return Factors(a, b, scale, None if m is None else m.reshape(-1))


def check_lengths(module: str, m, outputs: int, config: dict, directory: pathlib.Path) -> None:
    """Raises ValueError for DoRA's lengths, an array or its place or None, if they don't fit."""
    dora, size = bool(config.get("use_dora")), None if m is None else math.prod(m.shape)
    if dora != (m is not None) or size not in (None, outputs):
        given = "no magnitudes" if m is None else f"magnitudes {m.shape}"
        raise ValueError(
            f"{directory / WEIGHTS}: {module}: {given} for {outputs} outputs, but {CONFIG} says "
            f"use_dora={dora}"
        )


def check_window(module: str, window: tuple, places: Places, file: pathlib.Path) -> None:
    """Raises ValueError for a convolution's window, () for no convolution, that is not the base's.
    One of single pixels is a linear layer."""
    sources = places.at(f"{module}.weight").values()
    right = next((source.window for source in sources if source.window), ())
    larger = lambda window: window if set(window) - {1} else ()
    if sources and larger(window) != larger(right):
        raise ValueError(f"{file}: {module}: its window is {window}, the base's {right}")


def split(module: str, update: Factors, places: Places, file: pathlib.Path) -> dict[str, Factors]:
    """The factors of a module's parts, by our paths."""
    sources = places.at(f"{module}.weight")
    if not sources:
        known = ", ".join(sorted(name.removesuffix(".weight") for name in places.tensors))
        raise ValueError(f"{file}: {module}: the base has no such module; it has {known}")
    a, b, s, m = update
    width = fused_width(sources)
    if width not in (0, b.shape[1]):
        raise ValueError(f"{file}: {module}: {b.shape[1]} outputs, the base's has {width}")
    parts = {}
    for path, source in sources.items():
        columns = as_index(source.part)
        lengths = None if m is None else m[columns]
        parts[path.rsplit("/", 1)[0]] = Factors(a, np.ascontiguousarray(b[:, columns]), s, lengths)
    return parts
