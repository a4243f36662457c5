"""Checkpoints of loralib, the LoRA authors' code (github.com/microsoft/LoRA), as .npz or
.safetensors: the `lora_state_dict` of a model, which holds only trained parameters.

A layer stores `<module>.lora_A` (r, in) and `lora_B` (out, r); the scale alpha / r is not in the
file but in the training script. A fused layer (loralib's `MergedLinear`, on GPT-2's c_attn) adapts
some of its parts, each with r rows of lora_A and its own rows of lora_B: n parts give lora_A
(n r, in) and lora_B (n d, r). Which parts these are is not in the file either.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorax.interop.adapter import Adapter, Factors
from lorax.interop.peft.config import NUMBER
from lorax.interop.peft.whole import oriented
from lorax.interop.places import Places, natural
from lorax.interop.tensors import read_npz_weights, read_safetensors

if TYPE_CHECKING:
    from lorax.interop.hf import Source

_KEY = re.compile(r"(module\.)?(?P<module>.+)\.(?P<name>lora_[AB]|weight|bias)")
FUSED = ("q", "v")  # what the authors adapt of GPT-2's c_attn


def load(
    file: str | os.PathLike,
    alpha: float | None = None,
    sources: Mapping[str, Source] | None = None,
    fused: tuple[str, ...] = FUSED,
) -> Adapter:
    """Read a loralib checkpoint.

    Args:
      alpha: `lora_alpha` of the script; the scale of each layer is alpha over its rank. (The
        authors use 32 for GPT-2 and 16 in their RoBERTa scripts.) None: the scale is 1.
      sources: the places of the base's parameters in Hugging Face's tensors. Without them layers
        and weights have the modules' names, and weights their stored orientation.
      fused: last words of the parts that a fused layer adapts, if it does not adapt all.

    Raises FileNotFoundError, or ValueError that names the file if it is damaged, has pickled
    objects or no factors, if factors don't fit together, or for modules that `sources` lack.
    """
    file = pathlib.Path(file)
    if alpha is not None and not NUMBER.fits(alpha):
        raise ValueError(f"alpha: {alpha} given; it should be {NUMBER.words}")
    layers: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for key, tensor in _read(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file}: {key!r} is no factor, weight or bias of a module")
        module, name = match["module"], match["name"]
        tensors_of = layers.setdefault(module, {}) if name.startswith("lora") else whole
        name = name[-1] if name.startswith("lora") else f"{module}.{name}"
        if name in tensors_of:
            raise ValueError(f"{file}: {key} occurs twice, with and without 'module.'")
        tensors_of[name] = tensor
    if not layers:
        raise ValueError(f"{file}: holds no lora_A and lora_B tensors")

    places = None if sources is None else Places(sources)
    factors: dict[str, Factors] = {}
    for module, sides in sorted(layers.items(), key=lambda item: natural(item[0])):
        try:
            factors |= _updates(module, sides, alpha, places, fused)
        except ValueError as error:
            shapes = {f"lora_{side}": tensor.shape for side, tensor in sides.items()}
            raise ValueError(f"{file}: {module} has {shapes}: {error}") from None
    weights = whole
    if places is not None:
        weights = {}
        for name, tensor in whole.items():
            weights |= oriented(name, tensor, places, file)
    return Adapter(factors, weights, {"lora_alpha": alpha})


def _updates(module, sides, alpha, places: Places | None, fused) -> dict[str, Factors]:
    """{layer: Factors} of one module's lora_A and lora_B."""
    A, B = sides.get("A"), sides.get("B")
    fits = A is not None and B is not None and A.ndim == B.ndim == 2 and A.size and B.size
    if not fits or A.shape[0] % B.shape[1]:
        raise ValueError("need lora_A (r, in) and lora_B (out, r)")
    groups, names = A.shape[0] // B.shape[1], [module]
    if places is not None:
        names = [path.rsplit("/", 1)[0] for path in places.at(f"{module}.weight")]
        if not names:
            raise ValueError("the base has no such module")
        if groups < len(names):
            names = [name for name in names if name.rsplit("/", 1)[-1] in fused]
    elif groups > 1:
        raise ValueError(f"{groups} updates of a fused layer: only its base can tell them apart")
    if groups != len(names) or B.shape[0] % groups:
        raise ValueError(f"{groups} updates don't fit {', '.join(names)}")
    factors = {}
    for name, part_A, part_B in zip(names, np.split(A, groups), np.split(B, groups), strict=True):
        a, b = np.ascontiguousarray(part_A.T), np.ascontiguousarray(part_B.T)
        factors[name] = Factors(a, b, 1.0 if alpha is None else float(alpha) / b.shape[0])
    return factors


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """{key: float32 array}."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".npz":
        return read_npz_weights(file)
    if file.suffix == ".safetensors":
        return read_safetensors(file)[0]
    raise ValueError(
        f"{file}: only .npz and .safetensors are read: a pickled checkpoint (.bin, .pt) can run "
        "code when opened; save its state dict as one of the two"
    )
