"""Arrays that are read block by block to where they belong: a process reads the blocks that its
devices hold, and never has more than two of them beside the arrays."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Readable(Protocol):
    """An array that is not in memory. read(index) -> its block there, for one slice an axis."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray: ...


def array(source: Readable, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """The array of a source, on the devices of a sharding; None: on JAX's default device.

    A block that several devices of this process hold is read once. On a CPU the array is the memory
    that was read into; other devices get a copy.
    """
    if sharding is None:
        return jax.device_put(source.read((slice(None),) * len(source.shape)), may_alias=True)
    held, before = {}, None
    for block, places in blocks(source.shape, sharding).items():
        values = source.read(tuple(slice(*ends) for ends in block))
        copies = [jax.device_put(values, device, may_alias=True) for device in places]
        held |= dict(zip(places, copies, strict=True))
        jax.block_until_ready(before)  # its host memory is free
        before = copies
    return jax.make_array_from_single_device_arrays(source.shape, sharding, [*held.values()])


def blocks(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> dict[tuple, list]:
    """{(first, end) along each axis: its devices} of the blocks that this process holds."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        block = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        devices.setdefault(block, []).append(device)
    return devices


@dataclasses.dataclass(frozen=True, eq=False)
class Coming:
    """An array that is still to be read to the devices of a sharding; None: the default device."""

    source: Readable
    sharding: NamedSharding | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def array(self) -> jax.Array:
        """All of it."""
        return array(self.source, self.sharding)

    def layers(self) -> Iterator[jax.Array]:
        """Its parts along the first axis, each read when it is asked for."""
        place = self.sharding
        if place is not None:
            place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
        for i in range(self.shape[0]):
            yield array(Layer(self.source, i), place)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A part of an array along its first axis, as a `Readable`."""

    source: Readable
    i: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """As `Readable` says."""
        return self.source.read((slice(self.i, self.i + 1), *index))[0]


def coming(source, sharding=None):
    """A tree of sources as `Coming`. sharding: a tree of them, None for the default device."""
    if sharding is None:
        return jax.tree.map(lambda x: Coming(x, None), source)
    return jax.tree.map(Coming, source, sharding)


def arrived(params):
    """A tree with the arrays that were `Coming`."""
    return jax.tree.map(lambda x: x.array() if isinstance(x, Coming) else x, params)


def placed(source, sharding=None):
    """A tree of sources as arrays. sharding: as for `coming`."""
    return arrived(coming(source, sharding))


def drawn(init, shardings=None):
    """The tree of arrays that init() draws. shardings: a tree of them, None for the default device.

    The numbers are the same on any devices: with JAX's threefry in its partitionable form, which is
    the default, each is a function of the key and of its place in the array.
    """
    return jax.jit(init, out_shardings=shardings)()
