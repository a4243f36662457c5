"""Whether a base's weights fit: into each device, and into the memory of this machine."""

import jax
import jax.numpy as jnp

from lorax import memory, tree
from lorax.models import streaming

ON_DEVICE = "are free on a device"


def free() -> memory.Free:
    """The memory that is left on the first device; of a CPU, that of the machine."""
    device = jax.local_devices()[0]
    if stats := device.platform != "cpu" and device.memory_stats():
        return memory.Free(stats["bytes_limit"] - stats["bytes_in_use"], ON_DEVICE)
    return memory.free()


def check(name: str, params, shardings=None) -> None:
    """Raises MemoryError if a device or this machine has no room for its part of the weights of
    base `name`; allocates nothing. params: their shapes. shardings: as for `streaming.placed`."""
    leaves = jax.tree.leaves(params)
    places = jax.tree.leaves(shardings) or [None] * len(leaves)
    pairs = [*zip(leaves, places, strict=True)]
    each = [tree.nbytes(_part(leaf, at)) for leaf, at in pairs]  # on a device
    copies = [1 if at is None else len(streaming.blocks(leaf.shape, at)) for leaf, at in pairs]
    left = free()
    if left.limit == ON_DEVICE:
        rooms = [(sum(each), left)]
        rooms += [(2 * max(each), memory.free())]  # a block is read while the last one is copied
    else:
        rooms = [(sum(n * k for n, k in zip(each, copies, strict=True)), left)]
    floats = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    smaller = ", or param_dtype=bfloat16" * (jnp.float32 in floats)
    for needs, left in rooms:
        if needs > left.bytes:
            raise MemoryError(
                f"base: {name} has {needs / 1e9:.2f} GB of weights in {floats[0].name}"
                f"{' here' * (shardings is not None)} and "
                f"{left.bytes / 1e9:.2f} GB {left.limit}; take a smaller base{smaller}"
            )


def _part(leaf, sharding) -> jax.ShapeDtypeStruct:
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)
