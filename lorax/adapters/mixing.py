"""One batch in which every row has its own adapter."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lorax import leaves, tree
from lorax.adapters import tied
from lorax.adapters.stacking import Stack, stacks
from lorax.interop.adapter import Adapter
from lorax.models import Base


def mixed(base: Base, adapters: Sequence[Adapter | None], rows) -> dict:
    """Parameters for one forward pass in which row i of the batch uses adapter rows[i]. None among
    the adapters means the bare base.

    rows: (B,) integers below len(adapters), concrete (not traced); B is the batch size of the calls
    that use these parameters. Raises ValueError for an adapter that does not fit, or that has more
    than low-rank factors (DoRA, biases, a head), or updates experts: those can't differ from row to
    row.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows: (B,) integers are needed, not {rows.dtype} of shape {rows.shape}")
    if rows.size and not 0 <= rows.min() <= rows.max() < len(adapters):
        raise ValueError(f"rows: {rows.min()} to {rows.max()} given for {len(adapters)} adapters")
    stacked = [
        _low_rank(base, adapter or Adapter({}, {}, {}), f"adapters[{i}]")
        for i, adapter in enumerate(adapters)
    ]
    flat = tree.flatten(base.params)
    for path in dict.fromkeys(path for by_path in stacked for path in by_path):
        if base.sites[path].kind == "experts":
            raise ValueError(
                f"{path}: updates of experts can't differ from row to row: the rows of a batch are "
                "sorted by expert; use one adapter at a time"
            )
        layers, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        a, b, s = _side_by_side([by_path.get(path) for by_path in stacked], layers, n_in, n_out)
        every_layer = np.broadcast_to(rows.astype(np.int32), (*layers, len(rows)))
        flat[path] = leaves.Mixed(flat[path], *map(jnp.asarray, (a, b, s, every_layer)))
    return tree.unflatten(flat)


def _low_rank(base: Base, adapter: Adapter, where: str) -> dict[str, Stack]:
    """{parameter path: `Stack`} of an adapter that has only low-rank factors."""
    rest, head = tied.split(base, adapter)
    stacked = stacks(base, rest.factors)
    if rest.weights or head is not None or any(stack.has_m.any() for stack in stacked.values()):
        raise ValueError(
            f"{where}: only low-rank factors can differ from row to row, and it has DoRA "
            "magnitudes or weights of its own"
        )
    return stacked


def _side_by_side(stacked: list[Stack | None], layers: tuple, n_in: int, n_out: int):
    """a (layers..., N, in, r), b (layers..., N, r, out) and s (layers..., N) of N adapters of one
    parameter, zeros for those that do not adapt it."""
    n, rank = len(stacked), max(stack.a.shape[-1] for stack in stacked if stack is not None)
    a = np.zeros((*layers, n, n_in, rank), np.float32)
    b = np.zeros((*layers, n, rank, n_out), np.float32)
    s = np.zeros((*layers, n), np.float32)
    for i, stack in enumerate(stacked):
        if stack is not None:
            r = stack.a.shape[-1]
            a[..., i, :, :r], b[..., i, :r, :], s[..., i] = stack.a, stack.b, stack.s
    return a, b, s
