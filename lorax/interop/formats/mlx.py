"""Adapters of MLX (mlx_lm.lora): adapters.safetensors with adapter_config.json.

    <module>.lora_a (in, r), .lora_b (r, out)         lorax's own orientation
    <module>.m (out,)                                 DoRA's lengths, of an embedding (in,)
    <module>.lora_a (E, r, in), .lora_b (E, out, r)   of E experts: the other way round

s is `lora_parameters.scale`, which no rank divides; in the first months of 2024 it was
scale * alpha / rank, and alpha is in those configs. With `fine_tune_type: full` the file holds
weights. (mlx_lm/tuner/lora.py, dora.py and utils.py.)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import write_bytes, write_json
from lorax.interop.formats import factored, names, pairs, writing
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened
from lorax.interop.peft.config import CONFIG, NUMBER
from lorax.interop.peft.files import serialise

WEIGHTS = "adapters.safetensors"
_HELD = ("LoRA", "DoRA", "AdaLoRA")  # kinds that `write` takes
_IN_LAYER = re.compile(r"(?P<model>.*\blayers)\.\d+\.(?P<key>.+)")
_KEY = re.compile(r"(?P<layer>.+)\.(?P<name>lora_a|lora_b|m)")


def recognises(opened: Opened) -> bool:
    """Whether a file is MLX's."""
    ends = (".lora_a", ".lora_b")
    known = "lora_parameters" in opened.config or opened.config.get("fine_tune_type") == "full"
    return any(name.endswith(ends) for name in opened.tensors) or (
        known and "peft_type" not in opened.config
    )


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names it for tensors that it should not have
    and for a config that is damaged."""
    kind = opened.config.get("fine_tune_type", "lora")
    if kind == "full":
        beside = {name: tensor.shape for name, tensor in opened.tensors.items()}
        note = "trained in full: the file has new weights, so their update needs the base"
        return Found("MLX", opened.path, (), beside, opened.config, (note,))
    layers: dict[str, dict[str, pairs.Lazy]] = {}
    for key, tensor in opened.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{opened.file}: {key}: a tensor that MLX's adapters don't have; expected "
                ".lora_a, .lora_b or .m"
            )
        layers.setdefault(match["layer"], {})[match["name"]] = pairs.lazy(tensor)
    updates, beside = [], {}
    for layer, tensors in layers.items():
        updates += _updates(opened, layer, tensors, beside)
    return Found("MLX", opened.path, tuple(updates), beside, opened.config, _notes(opened.config))


def _updates(opened: Opened, layer: str, tensors, beside: dict) -> list[Update]:
    a, b, m = (tensors.get(name) for name in ("lora_a", "lora_b", "m"))
    if a is None or b is None:
        raise ValueError(f"{opened.file}: {layer}: needs both lora_a and lora_b")
    rank = a.shape[1] if len(a.shape) == 3 else a.shape[-1]
    scale, source, warnings = _scale(opened, rank)
    if len(a.shape) == len(b.shape) == 3 and m is None:
        turned = pairs.transposed
        return pairs.stack(layer, a, b, scale, source, turned, turned, warnings)
    lengths = None if m is None else pairs.row(m)
    if m is not None and m.shape != b.shape[-1:] and m.shape == a.shape[:1]:
        beside[f"{layer}.m"] = m.shape
        warnings = (*warnings, "DoRA of an embedding: the lengths of its rows are not in dW")
        lengths = None
    made = pairs.update(layer, pairs.as_is(a), pairs.as_is(b), scale, source, lengths, warnings)
    return [made if m is None else made._replace(kind="DoRA")]


def _scale(opened: Opened, rank: int) -> tuple[float, str, tuple[str, ...]]:
    """(s, where it is from, warnings)."""
    given = opened.config.get("lora_parameters", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"{opened.file.parent}: lora_parameters: {given!r} given, not an object")
    for name in ("scale", "alpha"):
        if name in given and not NUMBER.fits(given[name]):
            raise ValueError(
                f"{opened.file.parent}: lora_parameters.{name}: {given[name]!r} given; it should "
                f"be {NUMBER.words}"
            )
    if "scale" not in given:
        lost = "MLX keeps the scale in adapter_config.json, which is not here or does not say it"
        return 1.0, "default 1: the file has none", (lost,)
    scale = float(given["scale"])
    if "alpha" not in given:
        return scale, "config lora_parameters.scale", ()
    old = "alpha is in the config: s as mlx_lm of early 2024 took it; later ones take scale alone"
    return scale * float(given["alpha"]) / rank, "config scale * alpha / rank", (old,)


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    n = config.get("num_layers", config.get("lora_layers"))
    return (f"the last {n} layers of the base were adapted",) if type(n) is int and n > 0 else ()


# ---------------------------------------------------------------------------------------- writing


def write(out: Path, found: Found, base: Mapping[str, Any] | None = None) -> Path:
    """Write updates as the two files that mlx_lm loads; the directory.

    MLX has one scale and one rank for all matrices, and adapts a module in all layers or in the
    last few: matrices without an update get one that is 0. base: not needed, as names and rows are
    Hugging Face's. Raises ValueError that says what MLX can't hold.
    """
    refused = factored.refusal(found, "MLX")
    by_name = factored.named(found, "MLX", _name, kinds=_HELD)
    scale, rank = writing.one_scale(by_name, refused)
    dora = {update.kind == "DoRA" for update in by_name.values()}
    if len(dora) > 1:
        raise refused("DoRA in some of its matrices; MLX has it in all or none")
    arrays, keys = {}, []
    for name, update in by_name.items():
        down, up, m = writing.padded(update, rank)
        arrays |= {f"{name}.lora_a": down.T, f"{name}.lora_b": up.T}
        arrays |= {} if m is None else {f"{name}.m": m}
        match = _IN_LAYER.fullmatch(name)
        keys.append(match["key"] if match else name)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(set(keys))}
    fields = {
        "fine_tune_type": "dora" if dora.pop() else "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
    }
    if model := writing.base_name(found.config):
        fields["model"] = model
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    write_bytes(out / WEIGHTS, serialise(arrays, {"format": "mlx"}))
    write_json(out / CONFIG, fields)
    return out


def _name(layer: str) -> str | None:
    name = names.language(layer)
    return None if name is None or ".experts." in name else name
