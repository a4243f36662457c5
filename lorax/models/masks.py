"""Which queries of attention see which keys: a bool array, or for long sequences a `Mask`, whose
memory grows with their length and not with its square.

Axes: B batch, T queries, S keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

#: Queries x keys up to which a mask is an array (measured on a CPU: `lorax.bench attention`).
SHORT = 512 * 512
#: A column after all others, and a window without an end.
LAST = 2**31 - 1


class Places(NamedTuple):
    """Where tokens stand, (B or 1, T) int32 each. column: in their row. text: 0 for padding, a
    negative number for a prefix that all texts of a row share. position: in their text."""

    column: jax.Array
    text: jax.Array
    position: jax.Array

    def padded(self, n: int) -> "Places":
        """With n more tokens at the end, which no query sees."""
        pad = lambda x, value: jnp.pad(x, ((0, 0), (0, n)), constant_values=value)
        return Places(pad(self.column, LAST), pad(self.text, 0), pad(self.position, 0))

    def block(self, start, size: int) -> "Places":
        """Those of `size` tokens from `start`."""
        return Places(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query sees the keys of its text whose columns are not after its own, and that are less than
    `window`, () int32, positions before it. queries: T `Places`; keys: S. span: (static) the
    window, `LAST` for none, if each row is one text and its keys are those of the queries, so that
    causality and window say all; else None."""

    queries: Places
    keys: Places
    window: jax.Array
    span: int | None = dataclasses.field(default=None, metadata={"static": True})

    def seen(self) -> jax.Array:
        """The mask as an array, (B or 1, T, S) bool."""
        query = Places(*(x[:, :, None] for x in self.queries))
        key = Places(*(x[:, None, :] for x in self.keys))
        near = query.position - key.position < self.window
        return (query.column >= key.column) & same_text(query.text, key.text) & near

    def block(self, query, key, size: int) -> jax.Array:
        """The same for `size` queries and as many keys, from the numbers of the first of each."""
        return Mask(self.queries.block(query, size), self.keys.block(key, size), self.window).seen()


def same_text(query, key):
    """Whether a query of one text may see a key of another: equal numbers, or a shared prefix."""
    return (query == key) | (key < 0) | ((query < 0) & (key != 0))


def mask_of(queries: Places, keys: Places, window: int | None = None, alone: bool = False):
    """The mask of these queries and keys, an array if they are few. window: None for none. alone:
    whether each row is one text in which no query sees later keys."""
    width = LAST if window is None else window
    mask = Mask(queries, keys, jnp.int32(width), width if alone else None)
    return mask.seen() if queries.column.shape[1] * keys.column.shape[1] <= SHORT else mask


def everyone(queries: int, keys: int):
    """The mask with which all queries see all keys."""
    one = lambda n: Places(*jnp.ones((3, 1, n), jnp.int32))
    return mask_of(one(queries), one(keys))


def ahead(mask, n: int, on):
    """The mask with n keys in front that all queries see if `on`, () bool, and none otherwise."""
    if not isinstance(mask, Mask):
        seen = jnp.broadcast_to(on, (*mask.shape[:2], n))
        return jnp.concatenate([seen, mask], axis=-1)
    column = jnp.where(on, -1, LAST)
    put = lambda x, value: jnp.concatenate([jnp.full((len(x), n), value, x.dtype), x], axis=1)
    column, text, position = map(put, mask.keys, (column, -1, LAST // 2))
    return dataclasses.replace(mask, keys=Places(column, text, position), span=None)


def stacked(masks):
    """Masks of the same queries and keys as one, with a leading axis."""
    if isinstance(masks[0], Mask):
        masks = [dataclasses.replace(mask, span=None) for mask in masks]
    return jax.tree.map(lambda *x: jnp.stack(x), *masks)


def dense(mask) -> jax.Array:
    """The mask as an array."""
    return mask.seen() if isinstance(mask, Mask) else mask
