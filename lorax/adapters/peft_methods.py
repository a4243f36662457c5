"""Trained methods in PEFT's on-disk format (LoRA and DoRA: `lorax.interop.peft`).

`adapter_model.safetensors` holds a method's arrays by PEFT's modules, `adapter_config.json` their
meaning. They are written so that `PeftModel.from_pretrained` computes the same as `method.bind`,
and read so that `bind` computes the same as PEFT (0.21). In `lorax.interop.peft`, `matrices` has
the methods with arrays per module, such as VeRA, `tokens` prefixes, prompts and LLaMA-Adapter,
`norms` LN-tuning.

Parameters trained in full with a method become PEFT's `modules_to_save` or biases. If a file has a
parameter only for some layers (one norm of a stack), the others get the base's values.

PEFT has no LoHa, LoKr, MiSS, SHiRA, OFT or HRA for GPT-2's Conv1D, and no bottleneck adapters,
BitFit or full fine-tuning.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from lorax import catalogue, hosts, methods, tree
from lorax.adapters import peft_matrices, peft_states
from lorax.adapters.task_types import check_task, task_type
from lorax.interop import peft
from lorax.interop.peft import files, matrices, norms, tokens, whole
from lorax.interop.peft.modules import Arrays
from lorax.models import Base

#: lorax's name -> PEFT's peft_type, of methods that are not written as LoRA.
TYPES = {row.name: row.peft for row in catalogue.ROWS.values() if row.peft not in (None, "LORA")}


def save(
    directory: str | os.PathLike,
    method: methods.Method,
    state: methods.State,
    base: Base,
    base_name: str | None = None,
) -> pathlib.Path:
    """Write a trained method as PEFT's files; the directory.

    base_name: what PEFT should load as the base model (a Hub id or a directory); by default the
    name that the base was loaded by.
    Raises ValueError, before anything is written, for a method that lorax can't write for PEFT, and
    if PEFT would compute something different.
    """
    if method.name not in TYPES:
        hint = "" if method.factors is None else "; store it as LoRA, lorax.interop.peft.save"
        raise ValueError(f"{method.name}: lorax does not write it in PEFT's format{hint}")
    places = base.places
    weights = _weights(state, base)
    if base.causal and places.tied:
        _, weights = whole.with_head({}, weights, places.tied)
    kind = task_type(base, weights)
    stored = whole.stored_weights(weights, places)
    tensors, config, stored = _own_tensors(method, state, base, stored)
    targets = set(config["target_modules"]) if method.name in matrices.KINDS else set()
    config |= _beside(method.name, *whole.how_saved(stored, targets, places, kind))
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        tensors[f"{module}.base_layer.{last}" if module in targets else name] = tensor
    config |= {
        "peft_type": TYPES[method.name],
        "task_type": kind,
        "auto_mapping": None,
        "base_model_name_or_path": base_name or base.name,
        "revision": None,
        "inference_mode": True,
    }
    bare = ("prompt_embeddings", "base_model.")
    tensors = {
        name if name.startswith(bare) else peft.PREFIX + name: tensor
        for name, tensor in tensors.items()
    }
    return files.write(directory, tensors, config)


def _own_tensors(method, state, base: Base, stored: Arrays) -> tuple[Arrays, dict, Arrays]:
    """(the method's tensors, the fields of its config, the other stored tensors). stored: {Hugging
    Face's tensor: value} of all parameters trained in full."""
    if method.name in matrices.KINDS:
        return *peft_matrices.write(method, state, base), stored
    if method.name not in tokens.KINDS:
        return norms.write(stored, base.places)
    if stored:
        raise ValueError(f"{method.name}: PEFT stores no weights beside it: {', '.join(stored)}")
    leaves = tree.flatten(state.trainable) | tree.flatten(state.constants)
    arrays = {path.rpartition("/")[2]: np.asarray(leaf) for path, leaf in leaves.items()}
    return *tokens.KINDS[method.name].write(arrays, _attention(base)), stored


def _beside(name: str, saved: list[str], bias: str) -> dict:
    """The config fields for parameters trained in full with the method of that name."""
    fields: dict = {} if name in tokens.KINDS else {"modules_to_save": saved or None}
    only_targets = getattr(matrices.KINDS.get(name), "bias", None)
    if only_targets is not None:
        return fields | {"bias": only_targets if bias == "lora_only" else bias}
    if bias != "none":
        raise ValueError(f"{name}: PEFT trains no biases beside it, but whole modules")
    return fields


def load(directory: str | os.PathLike, base: Base) -> tuple[methods.Method, methods.State]:
    """Read a directory of PEFT's that holds one of `TYPES`.

    The method's hyperparameters are those of the config that have a meaning here. Its targets and
    layers have the smallest product that covers the stored arrays; the rest of the state is zero.

    Raises FileNotFoundError, or ValueError that names the file for another kind of adapter, a
    damaged file, and modules or shapes that the base does not have.
    """
    directory = pathlib.Path(directory)
    file = directory / peft.WEIGHTS
    config = peft.read_config(directory / peft.CONFIG)
    kind = config["peft_type"]
    name = next((name for name, theirs in TYPES.items() if theirs == kind), None)
    if name is None:
        given = f"{directory / peft.CONFIG}: peft_type {kind!r} given"
        known = ", ".join(sorted(TYPES.values()))
        raise ValueError(f"{given}; {known} are read here, LORA by lorax.interop.peft")
    check_task(base, config.get("task_type"), f"{directory / peft.CONFIG}: ")
    stored = peft.own_names(peft.read_tensors(file)[0], file)
    try:
        hp, arrays, rest = _read(name, stored, config, base, directory)
        weights = _read_weights(rest, config, base, file)
        return peft_states.build(name, hp, arrays, weights, base)
    except ValueError as error:
        named = str(error).startswith(str(directory))
        raise ValueError(str(error) if named else f"{directory}: {error}") from error


def _read(name: str, stored: Arrays, config: dict, base: Base, directory: pathlib.Path):
    """(hyperparameters, {path of a leaf or its end: {index in its stack: array}}, the tensors that
    belong to the base itself)."""
    if name in matrices.KINDS:
        return peft_matrices.read(name, stored, config, base, directory)
    if name not in tokens.KINDS:
        return {}, {}, norms.read(stored, config, directory)
    hp, arrays = tokens.KINDS[name].read(stored, config, _attention(base), directory)
    return hp, {last: {(): x} for last, x in arrays.items()}, {}


def _attention(base: Base) -> tokens.Attention:
    keys = [layer for layer in base.layers if layer.endswith("attn/k")]
    modules = tuple(base.places.module(layer).rpartition(".")[0] for layer in keys)
    scaled = getattr(base.config, "scale_embeddings", False)
    embedded = base.config.hidden_size**0.5 if scaled else 1.0
    raw = base.traits.config.get("text_config", base.traits.config)
    return tokens.Attention(base.family, base.causal, raw, modules, embedded)


def _weights(state: methods.State, base: Base) -> Arrays:
    """{parameter with its layer: value} of what is trained in full."""
    weights = {}
    for path, arrays in methods.joined(*state).items():
        if "layers" in arrays:
            first, rest = path.split("/", 1)
            numbered = zip(*hosts.whole((arrays["layers"], arrays["w"])), strict=True)
            weights |= {f"{first}/{i}/{rest}": x for i, x in numbered}
        elif "w" in arrays:
            weights |= base.parts_of(path, hosts.whole(arrays["w"]))
    return weights


def _read_weights(rest: Arrays, config: dict, base: Base, file: pathlib.Path) -> Arrays:
    """{parameter with its layer: value} of the tensors that belong to the base itself."""
    weights: Arrays = {}
    places, flat = base.places, tree.flatten(base.params)
    whole.check_saved(config, rest, places, file)
    for name, tensor in rest.items():
        if files.WHOLE.fullmatch(name) is None:
            raise ValueError(f"{file}: {name}: no tensor of {config['peft_type']}, weight or bias")
        weights |= whole.oriented(name, tensor, places, file)
    if places.tied and weights:
        weights = whole.without_head(peft.Adapter({}, weights, config), places.tied).weights
    for name, value in weights.items():
        if name not in base.parts:
            raise ValueError(f"{file}: {name}: the base's head is its embedding")
        path, index = base.parts[name]
        shape = flat[path].shape[len(index) :]
        if value.shape != shape:
            raise ValueError(f"{file}: {name} is {value.shape}, the base's {shape}")
    return weights
