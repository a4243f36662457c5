"""How a base is divided over a mesh of devices: one axis of the mesh for each way of dividing.

    member   members of a sweep: each device trains its own, the base is there whole
    fsdp     rows of a batch, and the base: each device keeps a part of every weight, and the parts
             of one layer are gathered when it is computed (ZeRO-3, arXiv:1910.02054; FSDP,
             arXiv:2304.11277)
    tensor   the base within a layer: each device multiplies by its own columns of q, k, v, gate and
             up and its own rows of o and down (Megatron-LM, arXiv:1909.08053)

Everything here is a function of shapes; nothing is allocated.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import ops, tree
from lorax.divided import AFTER, EMBEDDING, LINEAR
from lorax.meshes import AXES, Shape, parse
from lorax.methods.targets import matching

__all__ = [
    "AXES", "Shape", "device_bytes", "mesh", "parse", "shape_of", "shardings", "specs",
]  # fmt: skip

#: Words whose kernels are divided as `AFTER`.
AFTER_WORDS = ("o", "down", "experts.down")
LARGE = 1 << 22  # numbers of an array without a site that is divided as well


def mesh(shape: Shape, devices=None) -> Mesh:
    """A mesh of the first devices (default: of all processes), with the axes of `AXES`.

    Raises ValueError if there are too few.
    """
    devices = list(jax.devices() if devices is None else devices)
    check(shape, len(devices))
    automatic = (AxisType.Auto,) * len(AXES)
    devices = devices[: shape.size]
    return jax.make_mesh(tuple(shape), AXES, axis_types=automatic, devices=devices)


def check(shape: Shape, devices: int) -> None:
    """Raises ValueError if there are too few devices for a mesh."""
    if devices < shape.size:
        raise ValueError(
            f"train.mesh: {shape} needs {shape.size} devices, and there "
            f"{'are' if devices > 1 else 'is'} {devices}"
        )


def shape_of(mesh: Mesh) -> Shape:
    """The shape of a mesh that `mesh` made."""
    return Shape(**mesh.shape)


def device_bytes(placed) -> int:
    """Bytes on one device of a tree of arrays, or of shapes with shardings."""
    on_one = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return tree.nbytes(jax.tree.map(on_one, placed))


def shardings(params: dict, sites, mesh: Mesh) -> dict:
    """The tree of `specs` with a `NamedSharding` for every array."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(params, sites, shape_of(mesh))
    )


def specs(params: dict, sites, shape: Shape) -> dict:
    """The tree of `params` with a `PartitionSpec` for every array, those of quantised weights too.

    params: arrays or shapes. sites: {path: `ops.Site`}. Kernels are divided by their word
    (`lorax.methods.targets`): q, k, v, gate and up (inputs over fsdp, outputs over tensor), o and
    down (inputs over tensor, outputs over fsdp), embeddings and heads (tokens over tensor, features
    over fsdp), any other kernel as up. Norms, biases and other small arrays are replicated, and
    larger ones divided over fsdp by their last axis. Axes of layers and experts are not divided,
    nor is an axis whose length is not a multiple of the devices.
    """
    sizes = shape._asdict()
    behind = after(sites)
    flat = tree.flatten(params)
    for path, leaf in flat.items():
        if path in sites:
            site = sites[path]
            by = EMBEDDING if site.kind == "embed" else AFTER if path in behind else LINEAR
            if ops.is_operator(leaf):
                flat[path] = leaf.specs(by, sizes)
            else:
                flat[path] = _of_kernel(leaf.shape, site, by, sizes)
        elif leaf.size >= LARGE and leaf.shape[-1] % shape.fsdp == 0:
            flat[path] = P(*(None,) * (leaf.ndim - 1), "fsdp")
        else:
            flat[path] = P()
    return tree.unflatten(flat)


def after(sites) -> set[str]:
    """Paths of the kernels whose inputs are outputs of layers that "tensor" divides."""
    return {path for word in AFTER_WORDS for path in matching(word, sites)}


def _of_kernel(shape, site: ops.Site, by: tuple[str, str], sizes: dict[str, int]) -> P:
    """by: axes of the mesh for the inputs and the outputs, each of which divides the first of their
    axes that it can; of a convolution's inputs only the channels."""
    spec = [None] * len(shape)
    ins = site.ins[-1:] if site.kind == "conv" else site.ins
    for axes, name in zip((ins, site.outs), by, strict=True):
        can = [site.stack + i for i in axes if shape[site.stack + i] % sizes[name] == 0]
        if can:
            spec[can[0]] = name
    return P(*spec)
