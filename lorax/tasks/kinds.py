"""Kinds of rows: what the engine asks of a batch, whatever the task.

There are five: texts of a language model, random strings to be memorised by one, texts with a
label, arrays with a class or with values, and images to be denoised. Axes: B rows, T tokens, k
outputs. A row of zeros has no weight in any kind, so zeros fill up the last batch of an evaluation.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import denoising, losses


class Kind(NamedTuple):
    """What the engine needs to know about rows. All functions are pure and can be traced.

    name: "texts", "strings", "labelled", "arrays" or "noisy", with the settings of the loss if
        there are any. reads: what the base must read, "tokens", "arrays" or "noisy arrays".
    causal: whether the base must be a causal language model.
    per_token: names of the arrays (N, T) that have a column for each token; () for arrays.
    ahead: columns of a row that the model does not read: a language model's last token is only
        predicted.
    loss(module, params, batch, smoothing=0.0, training=False) -> (sum of losses, sum of weights,
        outputs (B, k) float32), all float32; outputs is None for texts. training: with the model's
        load-balancing loss (`losses.balance`).
    rows(module, params, batch, base=None) -> `losses.Rows`, what becomes of each row. base: a
        `losses.Reference`, for the KL from the base.
    states(module, params, batch) -> `losses.Reference.states`, of a base's parameters.
    real(batch) -> (B, T) bool: the positions that the model reads and that are not padding; an
        array is one position, (B, 1).
    inputs(batch) -> the arguments of the model's `hidden`; None where it has none.
    counted(rows) -> (N, T) bool: the columns that count in training or as context.
    scored: whether an evaluation returns the outputs, for `Task.scores`.
    drawn(batch, generator) -> the batch of a training step, leaves (A, B, ...), with what is drawn
        anew at every step by a `numpy.random.Generator`; None for rows that are trained on as they
        are.
    """

    name: str
    reads: str
    causal: bool
    per_token: tuple[str, ...]
    ahead: int
    loss: Callable
    rows: Callable
    states: Callable
    real: Callable
    inputs: Callable | None
    counted: Callable | None
    scored: bool = False
    drawn: Callable | None = None


def _text_inputs(batch) -> list[jax.Array]:
    inputs = batch["tokens"], batch.get("segments")
    return [x[:, :-1] for x in inputs if x is not None]


def _text_columns(rows) -> np.ndarray:
    return rows.get("segments", rows["mask"]) > 0


TEXTS = Kind(
    name="texts",
    reads="tokens",
    causal=True,
    per_token=("tokens", "mask", "segments"),
    ahead=1,
    loss=losses.lm_loss,
    rows=losses.lm_rows,
    states=losses.lm_states,
    real=losses.text_positions,
    inputs=_text_inputs,
    counted=_text_columns,
)
STRINGS = TEXTS._replace(
    name="strings", loss=losses.string_loss, rows=losses.string_rows, scored=True
)
LABELLED = Kind(
    name="labelled",
    reads="tokens",
    causal=False,
    per_token=("tokens", "segments", "types"),
    ahead=0,
    loss=losses.class_loss,
    rows=losses.class_rows,
    states=losses.class_states,
    real=lambda batch: batch["segments"] > 0,
    inputs=lambda batch: [batch["tokens"], batch["segments"], batch["types"]],
    counted=lambda rows: rows["segments"] > 0,
    scored=True,
)
ARRAYS = Kind(
    name="arrays",
    reads="arrays",
    causal=False,
    per_token=(),
    ahead=0,
    loss=losses.array_loss,
    rows=losses.array_rows,
    states=losses.array_states,
    real=lambda batch: batch["weight"][:, None] > 0,
    inputs=None,
    counted=None,
    scored=True,
)


def noisy(settings: denoising.Settings, none: np.ndarray | None = None) -> Kind:
    """The kind of images to be denoised (`lorax.denoising`). none: see `denoising.drawn`."""
    of = lambda function: functools.partial(function, settings)
    return Kind(
        name=f"noisy {settings}",
        reads="noisy arrays",
        causal=False,
        per_token=(),
        ahead=0,
        loss=of(denoising.loss),
        rows=of(denoising.rows),
        states=of(denoising.predicted),
        real=lambda batch: batch["weight"][:, None] > 0,
        inputs=None,
        counted=None,
        drawn=functools.partial(denoising.drawn, settings, none),
    )


NOISY = noisy(denoising.Settings())


def has_probabilities(kind: Kind, rows: Mapping[str, Any]) -> bool:
    """Whether the outputs of a model of such rows are logits, of tokens or classes, not values."""
    if kind.causal:
        return True
    return "label" in rows and np.issubdtype(rows["label"].dtype, np.integer)


# ------------------------------------------------------------------------------------------ columns


def columns(kind: Kind, rows: Mapping[str, Any]) -> int | None:
    """Number of columns of rows or batches of tokens, the same for all per-token arrays. None for
    arrays, which have no columns."""
    return rows[kind.per_token[0]].shape[-1] if kind.per_token else None


def narrowed(kind: Kind, rows: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    """Rows, or batches, with their first `width` columns; unchanged if that is None. Shapes
    (`jax.ShapeDtypeStruct`) give shapes."""

    def cut(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((*x.shape[:-1], min(width, x.shape[-1])), x.dtype)
        return x[..., :width]

    fewer = () if width is None else kind.per_token
    return {name: cut(x) if name in fewer else x for name, x in rows.items()}


def lengths(kind: Kind, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Columns of each row up to the last that counts, at least one: (N,) int64."""
    counts = kind.counted(rows)
    last = counts.shape[1] - np.argmax(counts[:, ::-1], axis=1)
    return np.where(counts.any(axis=1), last, 1)


def trim(kind: Kind, *sets: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Sets of rows without trailing columns that are padding in every row of all of them, to save
    computation. A model then reads a multiple of 8 tokens, or as many as before."""
    if not kind.per_token:
        return [dict(rows) for rows in sets]
    longest = max(lengths(kind, rows).max() for rows in sets)
    return [narrowed(kind, rows, eights(longest - kind.ahead) + kind.ahead) for rows in sets]


def eights(n: float) -> int:
    """The next multiple of 8."""
    return 8 * math.ceil(n / 8)


# ------------------------------------------------------------------------------------------- shapes


def token_shapes(
    kind: Kind, lead: tuple[int, ...], seq_len: int, packing: bool = False, label=np.int32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of batches of texts (*lead, T), lead being the axes of the batch. packing: whether
    rows hold several texts. label: dtype of the labels, int32 for classes, float32 for values."""
    row = lambda dtype: jax.ShapeDtypeStruct((*lead, seq_len + kind.ahead), dtype)
    if kind.causal:
        shapes = {"tokens": row(np.int32), "mask": row(np.float32)}
        return shapes | ({"segments": row(np.int32)} if packing else {})
    labels = {"label": jax.ShapeDtypeStruct(lead, label)}
    return {name: row(np.int32) for name in kind.per_token} | labels


def array_shapes(
    lead: tuple[int, ...], inputs: jax.ShapeDtypeStruct, label: jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of batches of arrays; inputs, label: of one row."""
    put = lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype)
    return {"inputs": put(inputs), "label": put(label)} | {
        "weight": jax.ShapeDtypeStruct(lead, np.float32)
    }


def noisy_shapes(
    lead: tuple[int, ...], inputs: jax.ShapeDtypeStruct, condition: jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of batches of images to be denoised; inputs, condition: of one row."""
    put = lambda shape, dtype: jax.ShapeDtypeStruct((*lead, *shape), dtype)
    return {
        "inputs": put(inputs.shape, inputs.dtype),
        "condition": put(condition.shape, condition.dtype),
        "weight": put((), np.float32),
        "t": put((), np.int32),
        "draw": put((), np.uint32),
    }
