"""Parameters trained in full with an adapter: PEFT's `modules_to_save`, biases and tied heads."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from lorax.interop.adapter import Adapter, Factors
from lorax.interop.peft.config import CONFIG
from lorax.interop.places import HEAD, Places, as_index, fused_width, templates

#: First words of the modules that PEFT adds to `modules_to_save` for some task types.
HEADS = ("classifier", "score", "qa_outputs")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
TYING = "ensure_weight_tying"


# -------------------------------------------------------------------------------------- tied heads


def with_head(factors, weights, embedding: str):
    """(factors, weights) with those of the embedding also for the head that shares its weight."""
    factors, weights = dict(factors), dict(weights)
    if embedding in factors and HEAD not in factors:
        a, b, s, m = factors[embedding]
        if m is not None:
            raise ValueError(
                f"{embedding}: DoRA of an embedding that is the head as well can't be stored: PEFT "
                "would give lengths to the head's columns, not to the embedding's"
            )
        factors[HEAD] = Factors(b.T, a.T, s)
    if f"{embedding}/embedding" in weights and f"{HEAD}/kernel" not in weights:
        weights[f"{HEAD}/kernel"] = weights[f"{embedding}/embedding"].T
    return factors, weights


def without_head(adapter: Adapter, embedding: str) -> Adapter:
    """Inverse of `with_head` if the head has the embedding's update and weight; otherwise the
    returned config says that they are not tied."""
    factors, weights = dict(adapter.factors), dict(adapter.weights)
    tied = bool(adapter.config.get(TYING))
    same = lambda x, y: x is y if x is None or y is None else np.array_equal(x, y)
    head, embedded = factors.get(HEAD), factors.get(embedding)
    w_head, w_own = weights.get(f"{HEAD}/kernel"), weights.get(f"{embedding}/embedding")
    if head is not None or w_head is not None:
        tied = same(w_head, None if w_own is None else w_own.T) and (head is None) == (
            embedded is None
        )
        if tied and head is not None:
            plain = head.m is None and embedded.m is None and math.isclose(head.s, embedded.s)
            tied = plain and same(head.a, embedded.b.T) and same(head.b, embedded.a.T)
    if tied:
        factors.pop(HEAD, None)
        weights.pop(f"{HEAD}/kernel", None)
    return Adapter(factors, weights, adapter.config | {TYING: tied})


# ---------------------------------------------------------------------------------------- writing


def stored_weights(weights: Mapping[str, np.ndarray], places: Places) -> dict[str, np.ndarray]:
    """{Hugging Face's tensor: value} of parameters trained in full, fused ones joined."""
    tensors: dict[str, np.ndarray] = {}
    for path in weights:
        source = places.of(path)
        if source is None:
            raise ValueError(f"{path}: the base has no such parameter")
        if source.experts:
            raise ValueError(
                f"{path}: PEFT can't store a single expert that was trained in full; save the "
                "whole model, or adapt experts by LoRA"
            )
        if source.name in tensors:
            continue
        sources = places.at(source.name)
        missing = [other for other in sources if other not in weights]
        if missing:
            raise ValueError(f"{path}: PEFT can only store it with {', '.join(missing)}")
        whole = np.asarray(weights[path], np.float32)
        if source.part is not None:
            whole = np.zeros((*whole.shape[:-1], fused_width(sources)), np.float32)
            for part, place in sources.items():
                whole[..., place.part] = weights[part]
        tensors[source.name] = whole.transpose(np.argsort(source.axes or range(whole.ndim)))
    return tensors


def how_saved(whole: Mapping[str, np.ndarray], targets: set[str], places: Places, task_type):
    """(modules_to_save, bias) of PEFT's config for tensors trained in full."""
    heads = lambda module: module.split(".")[0] in HEADS
    saved, biases = [], []
    for module, _, last in (name.rpartition(".") for name in whole):
        if module in targets:
            biases += [module] * (last == "bias")
        elif last == "bias" and f"{module}.weight" not in whole and not heads(module):
            biases.append(module)
        else:
            saved.append(module.split(".")[0] if heads(module) else module)
    saved = sorted(set(saved))
    for module in saved:
        missing = sorted(set(places.below(module)) - set(whole))
        if missing:
            raise ValueError(f"{module}: PEFT stores the whole module; missing is {missing}")
    if task_type in _HEAD_TASKS and not any(heads(module) for module in saved):
        raise ValueError(
            f"task_type {task_type}: PEFT reads the head ({' or '.join(HEADS)}) from the adapter, "
            "and its weights are not among those to save"
        )
    bias = "none" if not biases else "lora_only" if set(biases) <= targets else "all"
    return saved, bias


# ---------------------------------------------------------------------------------------- reading


def check_saved(config, names: Iterable[str], places: Places, file: pathlib.Path) -> None:
    """Raises ValueError if a parameter of one of the config's `modules_to_save`, which PEFT stores
    whole, is missing from a file's `names`."""
    stored = {template for name in names for template, _ in templates(name, ".")}
    stored |= {places.bare[name] for name in stored & places.bare.keys()}
    tied = {f"{HEAD}.weight", getattr(places.sources.get(f"{places.tied}/embedding"), "name", "")}
    if config.get(TYING) and stored & tied:
        stored |= tied
    for module in config.get("modules_to_save") or ():
        ends = "|".join(re.escape(template) for template, _ in templates(module, "."))
        inside = re.compile(rf".*({ends})\..+")  # in PEFT the end of a name
        for name in places.tensors:
            if inside.fullmatch(name) and name not in stored:
                given = f"{CONFIG} says that {module} was trained whole (modules_to_save)"
                raise ValueError(f"{file}: {given}, and {name} is missing")


def oriented(name: str, tensor: np.ndarray, places: Places, file: pathlib.Path):
    """{path: value} of the parameters in a tensor that was trained in full."""
    sources = places.at(name)
    if not sources:
        raise ValueError(
            f"{file}: {name} was trained in full, and the base has no such parameter"
            + (": load it with its head" if name.split(".")[0] in HEADS else "")
        )
    return {
        path: ours(tensor, source.axes, as_index(source.part)) for path, source in sources.items()
    }


def ours(tensor: np.ndarray, axes, columns: slice | np.ndarray) -> np.ndarray:
    """A parameter in our orientation from its tensor: its axes reordered, then its columns."""
    axes = range(tensor.ndim) if axes is None else axes
    return np.ascontiguousarray(tensor.transpose(tuple(axes))[..., columns])
