"""Quantised weights in the order that a GPU's or TPU's kernel reads them.

`placed` reorders a model's leaves once, when its base is put on a device, because the kernels can't
read the order of bitsandbytes. A product with few rows uses the kernel (fused: codes are decoded
just before the matrix unit). A product with many rows, and the backward pass, decode w to bfloat16
once and use the library's product (two passes). Values are bfloat16 in both cases.

A kernel is a custom call, which `jit` can't divide over a mesh. There each device calls it for its
own part of w and all rows, or decodes its part along "tensor" after it has gathered the others.
"""

import dataclasses
import functools
import math
import warnings
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lorax import divided, gather, leaves, ops, sharding, tree
from lorax.quant import matmul, nf4

_TRIED = 16  # rows of the product that is compiled to test the kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(leaves.FrozenWeight):
    """A linear layer's frozen kernel in 4 bits, for products in bfloat16.

    words: int32, scales: float32, layer axes first, as returned by the `repack` of `on`. kernel,
    n_in, kind, by: (static) as in `nf4.Quantised`. on: (static) "gpu" or "tpu", the kernel.
    """

    words: jax.Array
    scales: jax.Array
    kernel: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_in: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    on: str = dataclasses.field(metadata={"static": True})
    by: tuple[str, str] = dataclasses.field(default=sharding.LINEAR, metadata={"static": True})

    dtype = np.dtype(jnp.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-2], *self.kernel)

    @property
    def n_out(self) -> int:
        return math.prod(self.kernel) // self.n_in

    @property
    def table(self) -> np.ndarray:
        return nf4.CODES[self.kind].values

    def decoded(self):
        weight = lambda words, scales: kernels(self.on).weight(words, scales, self.table)
        weight = ops.over_layers(weight, self.words.ndim - 2)
        return weight(self.words, self.scales).reshape(self.shape)

    def product(self, x, axis: int):
        return matmul.product(x, self, axis)

    def of_rows(self, x, axis: int):
        """(rows, n) -> (rows, the other), in x's dtype."""
        can = not kernels(self.on).can_use(len(x), self.n_in, self.n_out, 64)
        two_passes = functools.partial(self.two_passes, axis=axis)
        if axis == 0 and matmul.path(len(x)) == matmul.FUSED and can:
            # On another device (a run continued without this one) use the plain product.
            on = {"cuda" if self.on == "gpu" else "tpu": self.fused}
            return jax.lax.platform_dependent(x, **on, default=two_passes)
        return two_passes(x)

    def fused(self, x, **options):
        """(rows, in) -> (rows, out), in x's dtype, by the kernel. options: of its `matmul`."""
        y = kernels(self.on).matmul(
            x.astype(jnp.bfloat16), self.words, self.scales, self.table, jnp.float32, **options
        )
        return y.astype(x.dtype)

    def two_passes(self, x, axis: int):
        """(rows, n) -> (rows, the other), in x's dtype: w decoded, then multiplied."""
        w = self.decoded().reshape(self.n_in, self.n_out).astype(x.dtype)
        return matmul.dot(x, w, (1, axis))

    def specs(self, by, sizes):
        """As the codes that it was made of (`nf4.Quantised.specs`), if the kernel can use a part;
        whole on each device otherwise."""
        axes = _axes(self.on, self.n_in, self.n_out, by, sizes)
        words, scales = _specs(self.on, axes, self.words.ndim - 2)
        return dataclasses.replace(self, words=words, scales=scales)

    def on_mesh(self, x, axis: int):
        """The product where a mesh divides w; x (..., n)."""
        sizes = divided.here()._asdict()
        axes = _axes(self.on, self.n_in, self.n_out, self.by, sizes)
        if matmul.path(x.size // x.shape[-1]) == matmul.FUSED:
            return self._of_parts(x, axis, axes, sizes)
        axes = tuple(name if name == "tensor" else None for name in axes)
        decode = lambda words, scales: self._part(words, scales, axes, sizes).decoded()
        w = divided.on_each(decode, _specs(self.on, axes), P(*axes))(self.words, self.scales)
        return matmul.dot(x, w.astype(x.dtype), (x.ndim - 1, axis))

    def _of_parts(self, x, axis: int, axes, sizes):
        """Few rows, all of them times the part of w that each device has."""
        contracted, made = axes if axis == 0 else axes[::-1]

        def of_device(x, words, scales):
            y = self._part(words, scales, axes, sizes).of_rows(x, axis)
            return divided.summed(y, contracted)

        specs = P(None, contracted), *_specs(self.on, axes)
        y = divided.on_each(of_device, specs, P(None, made))(
            x.reshape(-1, x.shape[-1]), self.words, self.scales
        )
        return y.reshape(*x.shape[:-1], -1)

    def _part(self, words, scales, axes, sizes) -> "Packed":
        """A leaf of a device's part of one matrix."""
        kernel = _part_shape(self.n_in, self.n_out, axes, sizes)
        return dataclasses.replace(self, words=words, scales=scales, kernel=kernel, n_in=kernel[0])


def _part_shape(n_in: int, n_out: int, axes, sizes) -> tuple[int, int]:
    """(in, out) of a part of a matrix whose (inputs, outputs) are divided by these axes."""
    parts = [1 if axis is None else sizes[axis] for axis in axes]
    return n_in // parts[0], n_out // parts[1]


def _axes(on: str, n_in: int, n_out: int, by, sizes) -> tuple[str | None, str | None]:
    """The axes that divide (inputs, outputs) for a kernel: `by`, or none."""
    whole = not n_in % sizes[by[0]] and not n_out % sizes[by[1]]
    can = whole and not kernels(on).can_use(_TRIED, *_part_shape(n_in, n_out, by, sizes), 64)
    return tuple(by) if can else (None, None)


def _specs(on: str, axes, stack: int = 0) -> tuple[P, P]:
    """How (words, scales) are divided where (inputs, outputs) are divided by these axes."""
    lead = (None,) * stack
    words = axes[::-1] if on == "gpu" else axes
    return P(*lead, *words), P(*lead, *axes)


def kernels(on: str) -> ModuleType:
    """The module of a kernel, imported only when needed: it takes a second."""
    if on == "gpu":
        from lorax.quant import mosaic as module
    else:
        from lorax.quant import tpu as module
    return module


def placed(params, device: jax.Device, dtype) -> dict:
    """The parameters for products in `dtype` on a device, or on the mesh of such devices that
    divides them; leaves that its kernel supports become `Packed`. If the kernel does not compile
    for the device, nothing changes except for a warning.
    """
    on = device.platform
    if jnp.dtype(dtype) != jnp.bfloat16 or on not in ("gpu", "tpu"):
        return params
    if on == "gpu" and not kernels(on).hopper(device):
        return params
    flat = tree.flatten(params)
    for path, leaf in flat.items():
        if not isinstance(leaf, nf4.Quantised) or leaf.code.bits != 4:
            continue
        part = _device_part(leaf, on)
        if part is None or kernels(on).can_use(_TRIED, *part, leaf.block):
            continue
        if why := _fails(on, *part, leaf.kind, device):
            warnings.warn(f"4-bit products are decoded first, {on} kernel: {why}", stacklevel=2)
            return params
        flat[path] = pack(leaf, on)
    return tree.unflatten(flat)


def _device_part(leaf: nf4.Quantised, on: str) -> tuple[int, int] | None:
    """(in, out) of the part of a leaf on one device; None if the kernel's order can't be divided as
    the codes are."""
    mesh = gather.mesh_of(leaf)
    if mesh is None:
        return leaf.n_in, leaf.n_out
    axes = _axes(on, leaf.n_in, leaf.n_out, leaf.by, mesh.shape)
    if leaf.specs(leaf.by, mesh.shape).codes[-2:] != axes[::-1]:
        return None
    return _part_shape(leaf.n_in, leaf.n_out, axes, mesh.shape)


def pack(leaf: nf4.Quantised, on: str) -> Packed:
    """The leaf in a kernel's order, with double-quantised scales as float32. Where a mesh divides
    it, each device reorders its own part."""
    n_in, n_out = _device_part(leaf, on)

    def repack(codes, scales):
        return kernels(on).repack(codes.reshape(-1), scales.reshape(-1), n_in, n_out)

    stack, mesh = leaf.codes.ndim - 2, gather.mesh_of(leaf)
    of_layers = ops.over_layers(repack, stack)
    if mesh is not None:
        codes = P(*(None,) * stack, *leaf.by[::-1])
        packed = _specs(on, leaf.by, stack)
        of_layers = jax.shard_map(
            of_layers, mesh=mesh, in_specs=(codes, codes), out_specs=packed, check_vma=False
        )
    words, scales = jax.jit(of_layers)(leaf.codes, leaf.scales())
    return Packed(words, scales, leaf.kernel, leaf.n_in, leaf.kind, on, leaf.by)


@functools.cache
def _fails(on: str, n_in: int, n_out: int, kind: str, device) -> str:
    """Why the kernel does not compile for a device, '' if it does."""
    module, at = kernels(on), jax.sharding.SingleDeviceSharding(device)
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)
    packed = jax.eval_shape(
        functools.partial(module.repack, n_in=n_in, n_out=n_out),
        jax.ShapeDtypeStruct((n_in * n_out // 2,), jnp.uint8),
        jax.ShapeDtypeStruct((n_in * n_out // 64,), jnp.float32),
    )
    words, scales = (shape(x.shape, x.dtype) for x in packed)
    run = lambda x, words, scales: module.matmul(x, words, scales, nf4.CODES[kind].values)
    try:
        jax.jit(run).lower(shape((_TRIED, n_in), jnp.bfloat16), words, scales).compile()
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
