"""What an adapter is, whatever file it came from: low-rank factors by layer, and whole weights."""

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


class Adapter(NamedTuple):
    """What an adapter file holds.

    factors: {path of a layer without "/kernel": Factors}, e.g. "h/0/attn/q".
    weights: {path of a parameter with its layer: float32 array as we orient it}, of what was
        trained in full: "h/0/attn/q/bias", "head/dense/kernel".
    config: what the file says beside: base_model_name_or_path, task_type, ... Its
        "ensure_weight_tying" says whether an update of the embedding is one of a tied head as well;
        without that field it is.
    """

    factors: dict[str, Factors]
    weights: dict[str, np.ndarray]
    config: dict[str, Any]
