"""Models whose head is their embedding, with adapters that update the two differently.

PEFT adapts modules, not weights: its adapter may update only the embedding, only the head, or both
differently. The shared weight then becomes a `leaves.Untied` leaf.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax import leaves, tree
from lorax.adapters.stacking import stacks
from lorax.adapters.task_types import check_task
from lorax.interop.adapter import Adapter, Factors
from lorax.interop.peft.whole import TYING
from lorax.interop.places import HEAD
from lorax.models import Base


class Head(NamedTuple):
    """The head of a tied model once it differs from the embedding.

    path: of the embedding. weight: (V, features) that replaces the embedding's, or None. factors:
    of an update to that weight, or None.
    """

    path: str
    weight: np.ndarray | None
    factors: Factors | None


def split(base: Base, adapter: Adapter) -> tuple[Adapter, Head | None]:
    """(the adapter without the parts that are only for a tied head, that head or None).

    Raises ValueError for a task that the base has no head for.
    """
    check_task(base, adapter.config.get("task_type"))
    embedding = "" if getattr(base.config, "head", "") == "none" else base.places.tied
    path = f"{embedding}/embedding"
    head, w_head = adapter.factors.get(HEAD), adapter.weights.get(f"{HEAD}/kernel")
    has_head = head is not None or w_head is not None
    touched = embedding in adapter.factors or path in adapter.weights
    apart = touched and not adapter.config.get(TYING, True)
    if not embedding or not (has_head or apart):
        return adapter, None
    without = lambda named, name: {key: value for key, value in named.items() if key != name}
    weights = without(adapter.weights, f"{HEAD}/kernel")
    rest = Adapter(without(adapter.factors, HEAD), weights, adapter.config)
    shape = tree.flatten(base.params)[path].shape
    if w_head is not None and w_head.T.shape != shape:
        raise ValueError(f"{HEAD}/kernel: {w_head.shape} given, the base's {shape[::-1]}")
    if head is not None and head.m is not None:
        raise ValueError(f"{HEAD}: DoRA of a head that is the embedding is not supported")
    twin = None if head is None else Factors(head.b.T, head.a.T, head.s)
    return rest, Head(path, None if w_head is None else w_head.T, twin)


def read_out(base: Base, head: Head):
    """The head's leaf of a tied model with a separate update of its head."""
    leaf = tree.flatten(base.params)[head.path]
    if head.weight is not None:
        leaf = jnp.asarray(head.weight).astype(leaf.dtype)
    if head.factors is not None:
        factors_of = {head.path.removesuffix("/embedding"): head.factors}
        twin = stacks(base, factors_of)[head.path]
        leaf = leaves.LowRank(leaf, *map(jnp.asarray, (twin.a, twin.b, twin.s)))
    return leaf
