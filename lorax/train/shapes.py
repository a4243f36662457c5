"""Shapes of the arguments of a stack's programs, to compile them before allocating anything."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lorax.models import Base
from lorax.tasks import kinds
from lorax.train.layouts import Layout
from lorax.train.members import Placement, placement
from lorax.train.stacks import Stack


class Shapes(NamedTuple):
    """Trees of `jax.ShapeDtypeStruct` with the shardings of a layout.

    params: of the base. constants, hyper, state: of `size` members. rows: a member's batches of one
    call, (K, A, B, ...), at their widest. kind: of these rows. place: the shardings.
    """

    params: dict
    constants: dict
    hyper: tuple
    state: tuple
    rows: dict
    kind: kinds.Kind
    size: int
    place: Placement

    @property
    def widest(self) -> int | None:
        """Columns of the uncut batches; None for arrays."""
        return kinds.columns(self.kind, self.rows)

    def width_of(self, batches) -> int | None:
        """Columns of batches; None for arrays."""
        return kinds.columns(self.kind, batches)

    def batches(self, width: int | None) -> dict:
        """Batches of all members, cut to `width` columns: leaves (M, K, A, B, ...)."""
        cut = kinds.narrowed(self.kind, self.rows, width)
        return described(cut, self.place.batches, self.size)


class Training(NamedTuple):
    """A compiled call to train.

    train(params, constants, hyper, state, batches) -> (state, metrics (M, K)); donates the state.
    narrow(width): compile for batches of `width` columns. place(state on the devices) -> the state
    where it is stored between calls. bytes: memory of one call on one device.
    """

    train: Callable
    narrow: Callable
    place: Callable
    bytes: int


def shapes(stacked: Stack, base: Base, layout: Layout, rows, kind: kinds.Kind) -> Shapes:
    """The shapes of `layout.size` members. rows: of one member's call, see `Shapes`."""
    place = placement(layout, base)
    member = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), stacked[2:])
    trees = described(member, place.of_members(stacked[2:]), layout.size)
    params = described(base.params, place.base)
    return Shapes(params, *trees, rows, kind, layout.size, place)


def described(tree, shardings, size: int | None = None):
    """The shapes of a tree with a sharding for all or a tree of them, and with a leading member
    axis of `size` if set."""
    lead = () if size is None else (size,)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    struct = lambda x, s: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=s)
    return jax.tree.map(struct, tree, shardings)
