"""How members and batches are spread over devices, and how many members run side by side."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from lorax import gather, hosts, sharding, tree
from lorax.devices import cores
from lorax.models import Base
from lorax.sharding import Shape

TOKEN_FEATURES = 200_000  # limit on tokens x features side by side on a CPU (lorax.bench sweep)
CPU_COPIES = 128e6  # limit in bytes on a CPU's copies of the base, one per device, under "auto"


def split_cpu() -> None:
    """Split a CPU into a device for each core that this process may use, at most 8, unless
    XLA_FLAGS sets a number.

    Two members on one core each are faster than one whose small products share two cores. Must
    be called before JAX's first computation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(8, cores()))


class Layout(NamedTuple):
    """How members, batches and the base are spread over devices.

    mode: "none", "members", "batch", "pmap" or "mesh". devices: the ones in use. size: members in
    one program, a multiple of the number of devices that share them. width: members side by side.
    shape: of the mesh of the devices. The base is divided over it in mode "mesh", and whole on each
    device in the others.
    """

    mode: str
    devices: tuple
    size: int
    width: int
    shape: Shape = Shape()

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices as a mesh."""
        return sharding.mesh(self.shape, self.devices)


def layout(
    n_members: int, train, base: Base, devices=None, legs: Sequence[tuple[int, int]] = ()
) -> Layout:
    """The layout set by config.train, chosen automatically for "auto" and width 0.

    legs: (members, steps) of each leg that the program trains, if members stop on the way.

    Raises ValueError for a mesh that needs more devices than there are, for "batch" if a batch
    can't be split evenly over the devices, and for a layout without devices of some process
    (`lorax.hosts`).
    """
    devices = tuple(devices or jax.devices())
    mode, shape = _spread(n_members, train, base, devices)
    devices = devices[: shape.size]
    if hosts.are_many():
        _check_processes(mode, train, devices)
    part = train.batch_size // train.accumulate
    if part % shape.fsdp:  # of a mesh, the config has said so already
        raise ValueError(
            f"train.parallel: 'batch' over {shape.fsdp} devices, but a batch has {part} sequences"
        )
    each = math.ceil(n_members / shape.member)
    tokens = part // shape.fsdp * row_tokens(train, base)
    width = train.width or good_width(tokens, base, devices[0].platform)
    each = packed(legs, shape.member, each, width) if legs else each
    return Layout(mode, devices, each * shape.member, even_width(width, each), shape)


def _check_processes(mode: str, train, devices: tuple) -> None:
    """Raises ValueError if a process has none of the devices that are used, or for pmap."""
    used = {device.process_index for device in devices}
    if len(used) < hosts.count() or mode == "pmap":
        key = f"train.mesh: {train.mesh}" if mode == "mesh" else f"train.parallel: {mode!r}"
        raise ValueError(
            f"{key} does not use the {jax.device_count()} devices of {hosts.count()} processes; "
            "give a train.mesh of so many, or start fewer processes"
        )


def _spread(n_members: int, train, base: Base, devices: tuple) -> tuple[str, Shape]:
    """(mode, shape of the mesh) of a `Layout`."""
    n, mode = len(devices), train.parallel
    if shape := mesh_shape(train, base):
        sharding.check(shape, n)
        return "mesh", shape
    part, copies = train.batch_size // train.accumulate, tree.nbytes(base.params) * n
    room = devices[0].platform != "cpu" or copies <= CPU_COPIES
    return copied(mode, n_members, part, n, hosts.are_many(), room)


def copied(
    mode: str, n_members: int, part: int, n: int, many: bool, room: bool = True
) -> tuple[str, Shape]:
    """(mode, shape of the mesh) of a `Layout` of n devices that each have all of the base. mode:
    `train.parallel`. part: rows of a part of a batch. many: whether the devices belong to several
    processes, none of which may be without a part. room: whether "auto" may use several devices."""
    if mode == "auto":
        alone = "members" if many else "none"
        if n == 1 or not room:
            mode = alone
        elif n_members >= n:
            mode = "members"
        else:
            mode = "batch" if part % n == 0 else alone
    shapes = {"none": Shape(), "batch": Shape(fsdp=n)}
    return mode, shapes.get(mode, Shape(member=n))


def mesh_shape(train, base: Base) -> Shape | None:
    """The mesh that `train.mesh` names, or else the one that the base is divided over; None if
    every device has all of it."""
    if train.mesh != "auto":
        return sharding.parse(train.mesh)
    mesh = gather.mesh_of(base.params)
    return mesh and sharding.shape_of(mesh)


def cut(chosen: Layout, members: int) -> Layout:
    """The layout for some of the members: as many side by side, in a program of no more than they
    need. What it computes of a member stays the same, bit for bit."""
    together = chosen.width * chosen.shape.member
    return chosen._replace(size=min(chosen.size, math.ceil(members / together) * together))


def on_cpu() -> bool:
    """Whether members are trained on a CPU."""
    return jax.local_devices()[0].platform == "cpu"


def packed(legs: Sequence[tuple[int, int]], shares: int, each: int, most: int) -> int:
    """Members on each of `shares` devices in one program, for members that stop on the way.

    legs: (members, steps) of each. each: of all members together; most: side by side. The number
    that leaves the fewest places empty over all steps; a call counts as a tenth of a member. One
    that runs members side by side is preferred if `each` does, at up to a fifth more: a member
    alone is computed in another order (`step.Program.merge`).
    """
    calls = lambda n: sum(steps * math.ceil(members / (n * shares)) for members, steps in legs)
    cost = lambda n: calls(n) * (n + 0.1)
    alone = lambda n: even_width(most, n) == 1
    best = min(range(1, each + 1), key=cost)
    alike = [
        n for n in range(1, each + 1) if alone(n) == alone(each) and cost(n) <= 1.2 * cost(best)
    ]
    return min(alike, key=cost, default=best)


def even_width(most: int, members: int) -> int:
    """Members side by side: the largest divisor of their number up to `most`. 12 members at width 8
    run as 6 and 6, so that no remainder needs a separate program."""
    return max(w for w in range(1, min(most, members) + 1) if members % w == 0)


def row_tokens(train, base: Base) -> int:
    """Most tokens in a row; an image counts as one, or as its number of patches."""
    return train.seq_len if base.input_shape is None else base.traits.array_positions


def good_width(tokens: int, base: Base, platform: str) -> int:
    """Limit on members side by side: on a CPU the working set should stay in cache; an accelerator
    has no limit."""
    if platform != "cpu":
        return 1 << 30
    features = min(leaf.shape[-1] for leaf in jax.tree.leaves(base.params) if leaf.ndim > 1)
    return max(1, min(8, TOKEN_FEATURES // (tokens * features)))
