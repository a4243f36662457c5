"""The base model's kernels, for comparing updates with them. The rest of the report needs no model
code and no JAX."""

import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

import lorax
from lorax import outside
from lorax.files import read_json
from lorax.interop import tensors
from lorax.interop.adapter import Unread
from lorax.interop.formats.opened import numbers
from lorax.xray import together

Kernels = Mapping[str, np.ndarray]  # frozen (in, out) matrices by path ("h/0/attn/q")


def of_config(config: dict[str, Any]) -> tuple[Kernels | None, str]:
    """The kernels of the base that a run's config.json names, or None and the reason."""
    name = config.get("config", {}).get("base")
    if not name:
        return None, "config.json names no base model"
    function = outside.base_name(name)
    if function is not None and not outside.is_known(function.function):
        return (
            None,
            f"{name} is a function of yours, which the report only calls if --base names it",
        )
    try:
        return load(name), ""
    except Exception as error:  # whatever the error, the rest of the report needs no base
        return None, f"the base model {name} could not be loaded: {type(error).__name__}: {error}"


def load(name: str) -> Kernels:
    """Kernels of a shipped model, a directory or a Hub id. Raises what `models.load` raises."""
    from lorax.models import kernels, unread

    return kernels(unread(name))


def check(base: str | None, layers: int | None) -> None:
    """Raises ValueError or FileNotFoundError for a base that is not there and for a number of its
    layers below 0; no weights are read."""
    if layers is not None and layers < 0:
        raise ValueError(f"--layers={layers}: a number of layers, 0 for none")
    if base is not None and not is_of_tensors(base):
        from lorax.models.load import skeleton

        skeleton(base)


def with_sources(name: str) -> tuple[Kernels, dict[str, Any], dict[str, Any] | None]:
    """`load`, where in Hugging Face's tensors the model's parameters are (`Base.sources`), and the
    fields of its config.json, None if it has none."""
    from lorax import models

    base = models.unread(name)
    fields = read_json(base.directory / "config.json") if base.directory else None
    return models.kernels(base), base.sources, fields


class Tensors(Unread):
    """{layer: (in, out) float32} of a model that lorax doesn't know, from its safetensors. It may
    lack layers that an adapter changes."""


def is_of_tensors(name: str) -> bool:
    """Whether a base is only known by its tensors: a .safetensors file, or a directory with some
    whose config.json has no model_type, as a part of a diffusers pipeline."""
    path = pathlib.Path(name)
    if path.is_file():
        return path.suffix == ".safetensors"
    config = path / "config.json"
    known = config.exists() and "model_type" in read_json(config)
    return path.is_dir() and not known and any(path.glob("*.safetensors"))


def of_tensors(name: str, layers: Iterable[str]) -> Tensors:
    """The weights of these layers of adapters in a base that is only known by its tensors, whose
    names must end as the layers do, each read when it is asked for. A convolution is (in kh kw,
    out). Raises ValueError if it has none of them."""
    path = pathlib.Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    by_name = {}
    for file in files:
        for key, tensor in tensors.stored(file).items():
            if key.endswith(".weight") and len(tensor.shape) > 1:
                by_name[together.same_matrix(key.removesuffix(".weight"))] = tensor
    found = {}
    for layer in layers:
        words = together.same_matrix(layer).split("_")
        ends = ("_".join(words[start:]) for start in range(3))  # without "unet", "diffusion_model"
        tensor = next((by_name[end] for end in ends if end in by_name), None)
        if tensor is not None:
            found[layer] = tensor
    if not found:
        some = ", ".join([*by_name][:3])
        raise ValueError(f"--base={name}: has no weight that the adapter changes; it has {some}...")
    readers = {layer: functools.partial(_matrix, tensor) for layer, tensor in found.items()}
    return Tensors(readers, {layer: _matrix_shape(tensor) for layer, tensor in found.items()})


def _matrix_shape(tensor: tensors.Stored) -> tuple[int, int]:
    return math.prod(tensor.shape[1:]), tensor.shape[0]


def _matrix(tensor: tensors.Stored) -> np.ndarray:
    return numbers(tensor).reshape(_matrix_shape(tensor)[::-1]).T


def here(name: str) -> str | None:
    """What to pass to `load` to get a model without network access: the name of a shipped model, a
    directory, or the path of the Hub's cached copy. None if it is in none of these places."""
    if (pathlib.Path(lorax.__file__).parent / "assets" / name / "config.json").exists():
        return name
    if pathlib.Path(name).expanduser().is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:  # not a Hub id, no cache, or not in the cache: not on this machine
        return None
