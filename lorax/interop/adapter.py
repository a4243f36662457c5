"""The contents of adapter files of any format: low-rank factors, or dense updates.

`Adapter` and `Dense` have the same interface: `updates` by layer, `notes` on other changes, `idle`,
and `facts` for a report.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Factors(NamedTuple):
    """The update of one matrix, dW = s * a @ b: a (in, r) and b (r, out), float32; s a float.

    m: (out,) float32, the lengths that DoRA gives the columns of w + dW, or None.
    """

    a: np.ndarray
    b: np.ndarray
    s: float
    m: np.ndarray | None = None


Updates = Mapping[str, Factors | np.ndarray]  # of one member or adapter, by layer


def shape_of(update: Factors | np.ndarray) -> tuple[int, ...]:
    """(in, out, r) of factors, (in, out) of a dense update."""
    if isinstance(update, Factors):
        return (update.a.shape[0], update.b.shape[1], update.a.shape[1])
    return update.shape


def shapes_of(updates: Updates) -> dict[str, tuple[int, ...]]:
    """{layer: `shape_of` its update}; nothing is read of updates that have `shapes`."""
    if isinstance(updates, Unread):
        return updates.shapes
    return {layer: shape_of(update) for layer, update in updates.items()}


class Unread(Mapping):
    """{layer: its update}, or its weight, each read when it is asked for, and not kept.

    readers: {layer: a function that returns it}. shapes: {layer: its `shape_of`}.
    """

    def __init__(self, readers: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]):
        self.readers, self.shapes = dict(readers), dict(shapes)

    def __getitem__(self, layer: str) -> Factors | np.ndarray:
        return self.readers[layer]()

    def __contains__(self, layer) -> bool:
        return layer in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def only(updates: Updates, layers: Container[str]) -> Updates:
    """The updates of some layers."""
    if isinstance(updates, Unread):
        readers = {layer: x for layer, x in updates.readers.items() if layer in layers}
        return Unread(readers, {layer: updates.shapes[layer] for layer in readers})
    return {layer: update for layer, update in updates.items() if layer in layers}


def renamed(updates: Updates, names: Mapping[str, str]) -> Updates:
    """The updates under other names: {layer: name}."""
    if isinstance(updates, Unread):
        readers = {names[layer]: reader for layer, reader in updates.readers.items()}
        return Unread(readers, {names[layer]: x for layer, x in updates.shapes.items()})
    return {names[layer]: update for layer, update in updates.items()}


class Adapter(NamedTuple):
    """Low-rank factors, and parameters that were trained in full.

    factors: {layer: Factors}, e.g. "h/0/attn/q", the path of its parameter without "/kernel".
    weights: {parameter with its layer: float32 array in lorax's orientation} of the parameters that
        were trained in full: "h/0/attn/q/bias", "head/dense/kernel".
    config: the other fields of the file: base_model_name_or_path, task_type, ...
        "ensure_weight_tying" says whether an update of the embedding also updates a tied head; it
        does if the field is missing.
    """

    factors: dict[str, Factors]
    weights: dict[str, np.ndarray]
    config: dict[str, Any]

    @property
    def updates(self) -> dict[str, Factors]:
        """{layer: `Factors`}; of rank 0 if DoRA stores only a layer's lengths."""
        return self.factors

    @property
    def has_lengths(self) -> bool:
        """Whether a layer has DoRA's lengths."""
        return any(factors.m is not None for factors in self.factors.values())

    def notes(self) -> list[str]:
        """Other changes than the updates, one line each."""
        dora = "DoRA: the columns of w + dW are scaled as well, which is not in dW."
        notes = [dora] * self.has_lengths
        return notes + [f"trained in full: {name} {_size(x)}" for name, x in self.weights.items()]

    def idle(self) -> str:
        """Why the adapter changes nothing, "" if it may change something."""
        every = self.factors.values()
        if self.weights or self.has_lengths:
            return ""
        if all(factors.s == 0 for factors in every):
            return "alpha is 0, which scales every update to 0"
        if not any(factors.b.any() for factors in every):
            return "every B is 0, as before the first training step"
        moves = (a.any() and b.any() and s for a, b, s, _ in every)
        return "" if any(moves) else "alpha, A or B of every layer is 0"

    def facts(self) -> dict[str, Any]:
        """{name in a report: value} from the file's config, None for missing fields."""
        return {
            "Base": self.config.get("base_model_name_or_path"),
            "Kind": "DoRA" if self.config.get("use_dora") else "LoRA",
            "Task type": self.config.get("task_type"),
            "α": self.config.get("lora_alpha"),
            "rsLoRA": "yes" if self.config.get("use_rslora") else None,
        }


class Dense(NamedTuple):
    """Updates of a method without low-rank factors.

    method: its name. hp: its hyperparameters.
    updates: {layer: dW (in, out) float32} of the matrices that it changes; {} for a method that
        does not change weights.
    beside: {name: array}: the changes of other parameters (biases, norms), or for a method that
        does not change weights (prefixes) the trained arrays.
    changes_weights: whether the method changes weights.
    """

    method: str
    hp: dict[str, Any]
    updates: dict[str, np.ndarray]
    beside: dict[str, np.ndarray] = {}
    changes_weights: bool = True

    def notes(self) -> list[str]:
        """Other changes than the updates, one line each."""
        words = "changed as well" if self.changes_weights else "no change of weights"
        return [f"{words}: {name} {_size(x)}" for name, x in self.beside.items()]

    def idle(self) -> str:
        """Why the adapter changes nothing, "" if it may change something."""
        moves = self.updates or any(change.any() for change in self.beside.values())
        return "" if moves or not self.changes_weights else "every update is 0"

    def facts(self) -> dict[str, Any]:
        """{name in a report: value}."""
        values = (f"{name}={x}" for name, x in self.hp.items() if x not in (None, []))
        return {"Kind": self.method, "Hyperparameters": ", ".join(values)}


def _size(x) -> str:
    return " x ".join(map(str, x.shape)) or "1"
