"""LN-tuning in PEFT's format: a norm that is trained whole has its tensors at `ln_tuning_layers`.

    write(whole, places) -> (tensors, config, rest)
    read(stored, config, where) -> tensors by the base's names

whole: {Hugging Face's tensor: value} of all parameters trained in full; rest: those not of norms.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS, check_targets
from lorax.interop.places import Places


def write(whole: Mapping[str, np.ndarray], places: Places):
    """`<norm>.ln_tuning_layers.weight` (features,), and `bias` if the norm has one.

    A norm of which only some parameters are trained is in the rest. Raises ValueError if no norm is
    trained."""
    parent = lambda name: name.rpartition(".")[0]
    is_scale = lambda name: any(path.endswith("/scale") for path in places.at(name))
    norms = {parent(name) for name in whole if is_scale(name)}
    norms = {norm for norm in norms if set(places.below(norm)) <= set(whole)}
    if not norms:
        raise ValueError("ln-tuning: nothing to save, no norm is trained")
    tensors = {
        f"{parent(name)}.ln_tuning_layers.{name.rpartition('.')[2]}": x
        for name, x in whole.items()
        if parent(name) in norms
    }
    rest = {name: x for name, x in whole.items() if parent(name) not in norms}
    return tensors, {"target_modules": sorted(norms)}, rest


def read(stored: Mapping[str, np.ndarray], config, where: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of norms with the names that the base has for them, and all others.

    Raises ValueError for a file without norms, a norm that occurs twice, and one that the config
    leaves out."""
    file, word = where / WEIGHTS, ".ln_tuning_layers."
    norms = {key: key.replace(word, ".") for key in stored if word in key}
    if not norms:
        raise ValueError(f"{file}: holds no tensors of LN_TUNING")
    for key, name in norms.items():
        if name in stored:
            raise ValueError(f"{file}: {name} occurs twice, once as {key}")
    modules = [key.partition(word)[0] for key in norms]
    check_targets(config, modules, where / CONFIG)
    return {norms.get(key, key): x for key, x in stored.items()}
