"""Adapters of image models in the files of other programs, for one model of a pipeline.

    pytorch_lora_weights.safetensors    diffusers' (`formats.dotted`)
    .safetensors                        kohya's, ComfyUI's... (`formats.kohya`, `formats.dotted`)

Such a file may adapt several models of a pipeline, its U-Net and its text encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorax.interop.adapter import Adapter, Factors
from lorax.interop.formats import dotted, factored, kohya
from lorax.interop.formats.contract import Update
from lorax.interop.formats.opened import Opened, open_adapter
from lorax.interop.peft.lora import check_window, split
from lorax.interop.places import Places

if TYPE_CHECKING:
    from lorax.interop.hf import Source

FILE = dotted.FILE
FORMATS = kohya, dotted


def is_here(path: Path) -> bool:
    """Whether a path is such a file. Raises as `open_adapter` for one that is damaged."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    opened = open_adapter(path, {})
    return any(format.recognises(opened) for format in FORMATS)


def load(path: Path, sources: Mapping[str, Source] | None = None) -> Adapter:
    """The low-rank updates in a file.

    sources: the places of the base's parameters in its files; the updates are then those of this
    model, and a warning says what else the file has. Without them, all updates by diffusers' names
    of their modules, `unet.`, `text_encoder.`... in front.

    Raises ValueError that names file and module for what is damaged, unknown, of another kind than
    low-rank factors, or not of this base.
    """
    opened = open_adapter(path, {})._replace(as_stored=True)
    format = next(format for format in FORMATS if format.recognises(opened))
    by_name = factored.named(format.read(opened), "an adapter of lorax")
    if sources is None:
        return Adapter({name: _factors(name, x, path) for name, x in by_name.items()}, {}, {})
    places, factors = Places(sources), {}
    for module, update in _of_base(opened, by_name, places).items():
        check_window(module, update.kernel, places, path)
        factors |= split(module, _factors(module, update, path), places, path)
    return Adapter(factors, {}, {})


def _of_base(opened: Opened, by_name: Mapping[str, Update], places: Places) -> dict[str, Update]:
    """{module: update} of the component that is the base."""
    components: dict[str, dict[str, Update]] = {}
    for name, update in by_name.items():
        component, _, module = name.partition(".")
        components.setdefault(component, {})[module] = update
    known = lambda module: places.at(f"{module}.weight")
    fitting = [c for c, modules in components.items() if any(map(known, modules))]
    if len(fitting) != 1:
        which = f"{' and '.join(fitting)} fit" if fitting else "none of them fits"
        raise ValueError(
            f"{opened.file}: it adapts {', '.join(components)}, of which one must be the base, and "
            f"{which}"
        )
    chosen = components.pop(fitting[0])
    if components:
        others = ", ".join(f"{len(x)} matrices of {c}" for c, x in components.items())
        warnings.warn(f"{opened.file}: {others} left out, of another model", stacklevel=4)
    return chosen


def _factors(name: str, update: Update, path: Path) -> Factors:
    """An update in our order of rows: a convolution's channels come last."""
    factors = update.read()
    if not all(np.isfinite(x).all() for x in factors if x is not None):
        raise ValueError(f"{path}: {name}: a number in it is NaN or infinite")
    if not update.kernel:
        return factors
    a = factors.a.reshape(-1, *update.kernel, factors.a.shape[1])
    return factors._replace(a=np.moveaxis(a, 0, -2).reshape(factors.a.shape))
