"""Programs for as many members as fit into memory, according to the compiler."""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import numpy as np
from jax.sharding import Mesh

from lorax import hosts, memory, sharding, tree
from lorax.devices import of_kind
from lorax.models import Base
from lorax.sharding import Shape
from lorax.tasks import kinds
from lorax.train import layouts, mesh_costs
from lorax.train.layouts import Layout, cut, layout
from lorax.train.programs import Programs, compile_programs
from lorax.train.stacks import Stack


def memory_limit(train, devices) -> memory.Free:
    """Bytes that one program may use on each device, and what sets them: `train.memory_gb`, or most
    of the free memory. A CPU's devices share its memory. Of several processes, the one with the
    least sets it."""
    devices = [device for device in devices if device.process_index == hosts.process()]
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats:
        available, share = memory.Free(stats["bytes_limit"], "has the device"), 0.9
    else:
        available, share = memory.free(), 0.8
        available = available._replace(bytes=available.bytes // len(devices))
    available = available._replace(bytes=hosts.least(available.bytes))
    limit = memory.Free(int(train.memory_gb * 1e9), "are given by train.memory_gb")
    if limit.bytes:
        return min(limit, available)
    return available._replace(bytes=int(share * available.bytes))


def base_mesh(c, described: Callable[[], Base], n_members: int, devices=None) -> Mesh | None:
    """The mesh to load a base over: `train.mesh`, or that of `mesh_costs.divide`; None if each
    device has room for all of it.

    c: the config of one of so many members. described() -> the base with shapes, called if they
    decide. Raises ValueError for a `train.mesh` of more devices than there are.
    """
    train, devices = c.train, tuple(devices or jax.devices())
    if train.mesh != "auto":
        return sharding.mesh(sharding.parse(train.mesh), devices)
    free = devices[0].platform == "cpu" and not train.memory_gb  # they share one memory
    if len(devices) == 1 or train.parallel != "auto" or free:
        return None
    limit, kind = memory_limit(train, devices).bytes, of_kind(devices[0].device_kind)
    load, many = load_of(c, described(), n_members), hosts.are_many()
    shape = mesh_costs.divide(load, len(devices), kind, limit, many)
    return shape and sharding.mesh(shape, devices)


def load_of(c, base: Base, n_members: int) -> mesh_costs.Load:
    """What a step costs, as far as it is known before adapters are made, which are small; full
    fine-tuning has two moments in float32."""
    tokens, dtype = layouts.row_tokens(c.train, base), np.dtype(c.dtype)
    state = 12 * tree.count(base.params) if c.method.name == "full" else 0
    halved = dtype != np.float32 or c.operands == "bfloat16"
    sizes = state // 3, state, dtype.itemsize
    return mesh_costs.Load(base, c.train, tokens, halved, n_members, n_members, *sizes)


def more_divided(c, train, base: Base, chosen: Layout, n_members: int, devices) -> Shape | None:
    """The fastest mesh that divides the base into more parts than a layout does; None if there is
    none, or if the config says how to divide it. train: the config's section."""
    if train.mesh != "auto" or train.parallel != "auto":
        return None
    now = chosen.shape if chosen.mode == "mesh" else Shape()
    load, kind = load_of(c, base, n_members), of_kind(devices[0].device_kind)
    return mesh_costs.wider(load, len(devices), kind, now, hosts.are_many())


def fit(
    stacked: Stack,
    base: Base,
    train,
    batches,
    eval_batches,
    kind: kinds.Kind,
    devices=None,
    legs: Sequence[tuple[int, int]] = (),
    share: Fraction = Fraction(1),
    compared: int = 0,
) -> Programs:
    """`compile_programs` for as many members at once as fit into memory, as the compiler reports.

    stacked: its members are those of the whole group; its arrays may be of fewer, which then run in
    the group's program, cut to their number. legs: as for `layout`. share: of the devices of the
    machine that would train the whole group, those that are here. compared: as for
    `compile_programs`.

    Halves first the number of members side by side, then the members in one program; the caller
    runs the others in further calls of the same program. Where not even one member fits, a base
    that nothing says how to divide (`train.mesh`, `train.parallel`) is divided over more devices.
    Raises MemoryError if that does not help, with a hint at what would fit.
    """
    n = max((members for members, _ in legs), default=len(stacked.members))
    n = all_ = math.ceil(n * share)
    compiled = functools.partial(compile_programs, compared=compared)
    given, devices, here = train, tuple(devices or jax.devices()), stacked.state.step.shape[0]
    while True:
        chosen = cut(layout(n, train, base, devices, legs), here)
        programs = compiled(stacked, base, chosen, batches, eval_batches, kind)
        limit = memory_limit(train, chosen.devices)
        if programs.bytes <= limit.bytes:
            return programs
        if chosen.width > 1:
            train = train.copy_and_resolve_references()
            train.width = chosen.width // 2
        elif n > 1:
            n = math.ceil(n / 2)
        elif wider := more_divided(stacked.config, given, base, chosen, all_, devices):
            train, n = given.copy_and_resolve_references(), all_
            train.mesh = str(wider)
        else:
            ask = functools.partial(compiled, stacked, base, chosen)
            needs = lambda batches, ask=ask: ask(batches, eval_batches, kind).bytes
            raise MemoryError(
                f"one member needs {programs.bytes / 1e9:.2f} GB and {limit.bytes / 1e9:.2f} GB "
                f"{limit.limit}: {would_fit(train, batches, needs, limit.bytes, kind)}"
                + (", or set train.remat to full" if train.remat == "none" else "")
            )


def would_fit(train, batches, needs: Callable[[dict], int], limit: int, kind: kinds.Kind) -> str:
    """Hint at a smaller batch that would fit. needs(shapes of batches) -> bytes, by the compiler.

    First tries to split batches into more parts, down to one row each, then to halve the rows.
    """
    size = train.batch_size
    parts = [a for a in range(train.accumulate + 1, size + 1) if size % a == 0]

    def divided(a, width=None):
        parted = lambda x: jax.ShapeDtypeStruct((x.shape[0], a, size // a, *x.shape[3:]), x.dtype)
        return jax.tree.map(parted, kinds.narrowed(kind, batches, width))

    least = parts[-1] if parts else train.accumulate
    if parts and needs(divided(least)) <= limit:
        # More parts need less memory.
        a = next(a for a in parts if a == least or needs(divided(a)) <= limit)
        return f"train.accumulate={a} would fit"
    length = (kinds.columns(kind, batches) or 0) - kind.ahead
    while length >= 16:
        length //= 2
        if needs(divided(least, length + kind.ahead)) <= limit:
            return f"train.seq_len={length} with train.accumulate={least} would fit"
    return "nor would a smaller batch fit; take a smaller base, or param_dtype=bfloat16"
