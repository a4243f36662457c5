"""Weights in 4 or 8 bits: codes for a fixed table of values, and one scale per block.

    w = table[code] * scale    scale = the largest |w| of 64 neighbours

A weight (in, out) is stored as in bitsandbytes (0.50), bit for bit: the values of W (out, in) in
order, two codes per byte, the first in the high half. Where an output's weights fill whole bytes
and blocks, codes and scales have an axis of outputs, so that a mesh of devices can divide them by
outputs and by inputs. The rule of bitsandbytes, checked on ties,
blocks of zeros and tails: the code is that of the value nearest to x * (1 / s), ties go to the
smaller value, and a short last block divides by s instead. Numbers below 1.2e-38 count as zero, as
in XLA on a CPU.

nf4: 4 bits, the values are quantiles of a normal distribution (QLoRA, arXiv:2305.14314, section 3;
its equation 4 differs from the authors' table, which is used here and everywhere). fp4: 4 bits, one
for the sign, two for the exponent, one for the mantissa. int8: 8 bits, 255 equidistant values.

Double quantisation (QLoRA, section 3): the scales minus their mean are stored in 8 bits, in blocks
of 256 with a float32 scale each: 0.127 bits per parameter instead of 0.5. The paper says FP8; this
is the 8-bit dynamic map of bitsandbytes (arXiv:2110.02861). The quantiser of bitsandbytes is off by
one code in 0.2 % of the cases; here the code is always the nearest.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import divided, gather, leaves, ops, sharding, tree
from lorax.methods.targets import matching, resolve
from lorax.quant import matmul

Array = jax.Array
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales that share a scale
_MOST = 2.0**126  # above it 1 / s is subnormal, which XLA treats as zero


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """bits: of one code. values: (2^bits,) float32 by code."""

    bits: int
    values: np.ndarray

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    def nearest(self, x: Array) -> Array:
        """Codes uint8 of the values next to x float32 in [-1, 1]; ties to the smaller value."""
        order = np.argsort(self.values, kind="stable").astype(np.uint8)
        values = self.values[order]
        between = (values[:-1] + values[1:]) / np.float32(2)
        ranks = _rank(x, between) if self.bits == 4 else jnp.searchsorted(between, x)
        if np.array_equal(order, np.arange(len(order))):
            return ranks.astype(jnp.uint8)
        return jnp.take(order, ranks, mode="clip")


def _rank(x: Array, bounds: np.ndarray) -> Array:
    """How many of 15 ascending bounds are below x: a binary search that selects its bounds instead
    of looking them up, so that it compiles to vector instructions."""
    bits = []
    for step in (8, 4, 2, 1):
        candidates = [jnp.float32(bound) for bound in bounds[step - 1 :: 2 * step]]
        for bit in reversed(bits):
            pairs = zip(candidates[::2], candidates[1::2], strict=True)
            candidates = [jnp.where(bit, high, low) for low, high in pairs]
        bits.append(x > candidates[0])
    return sum(bit.astype(jnp.int32) << (3 - i) for i, bit in enumerate(bits))


def _evenly(start: float, stop: float, n: int) -> np.ndarray:
    """n values from start to stop, rounded as `torch.linspace` rounds them in float32."""
    start, stop = np.float32(start), np.float32(stop)
    step, i = float((stop - start) / np.float32(n - 1)), np.arange(n)
    up, down = float(start) + step * i, float(stop) - step * (n - 1 - i)
    return np.where(i < n // 2, up, down).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """(256,) float32, ascending: 2^i values in each of seven decades, and their negatives."""
    values = [np.zeros(1), np.ones(1)]
    for i in range(7):
        edges = _evenly(0.1, 1, 2**i + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values)).astype(np.float32)


_NF4 = (
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)
_FP4 = [0, 1 / 16, 8, 12, 4, 6, 2, 3]  # in twelfths; the upper half of the codes is negative

#: The kinds of `quantise`.
CODES = {
    "nf4": Code(4, np.float32(_NF4)),
    "fp4": Code(4, np.float32(_FP4 + [-x for x in _FP4]) / np.float32(12)),
    "int8": Code(8, np.append(np.arange(-127, 128), 127).astype(np.float32) / np.float32(127)),
}
DYNAMIC = Code(8, _dynamic_map())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales in 8 bits: values[codes] * absmax + offset.

    codes: uint8, in the shape of the scales that they stand for (`Quantised.absmax`). absmax:
    float32 (layers..., ceil(blocks / 256)). offset: float32 (layers...), the mean of the scales.
    """

    codes: Array
    absmax: Array
    offset: Array

    def decoded(self) -> Array:
        """The scales, float32."""
        axes = self.codes.ndim - self.offset.ndim
        blocks = math.prod(self.codes.shape[self.offset.ndim :])
        each = jnp.repeat(self.absmax, NESTED_BLOCK, axis=-1)[..., :blocks]
        each = each.reshape(self.codes.shape)
        offset = self.offset.reshape(*self.offset.shape, *(1,) * axes)
        return _rounded(jnp.take(DYNAMIC.values, self.codes, mode="clip") * each) + offset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised(leaves.FrozenWeight):
    """A linear layer's frozen kernel as codes. Its product: `lorax.quant.matmul`.

    codes: uint8 (layers..., out, in / codes in a byte), of W (out, in) row by row.
    absmax: the scales, float32 (layers..., out, in / block) or `Nested`.
    kernel: (static) the kernel's own shape, its inputs' axes first. n_in: (static) their product.
    kind: (static) of `CODES`. block: (static). dtype: (static) to which decoded values are rounded.
    by: (static) axes of a mesh that would divide inputs and outputs (`lorax.sharding`).
    Where an output's weights don't fill whole bytes and blocks (`in_rows` is False), they have no
    axis of outputs: (layers..., ceil(in out / codes in a byte)), (layers..., ceil(in out / block)).
    """

    codes: Array
    absmax: Array | Nested
    kernel: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_in: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    by: tuple[str, str] = dataclasses.field(default=sharding.LINEAR, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: -2 if self.in_rows else -1], *self.kernel)

    @property
    def in_rows(self) -> bool:
        """Whether codes and scales have an axis of outputs."""
        return fills_rows(self.n_in, self.kind, self.block)

    @property
    def code(self) -> Code:
        return CODES[self.kind]

    @property
    def n_out(self) -> int:
        return math.prod(self.kernel) // self.n_in

    def scales(self) -> Array:
        """In the shape of `absmax`, float32."""
        return self.absmax.decoded() if isinstance(self.absmax, Nested) else self.absmax

    def rows_of_outputs(self) -> Array:
        """W, (layers..., out, in) in `dtype`: table[code] * scale in float32, rounded once."""
        return _decode(
            self.codes, self.scales(), self.n_in, self.n_out, self.kind, self.block
        ).astype(self.dtype)

    def decoded(self) -> Array:
        return jnp.swapaxes(self.rows_of_outputs(), -1, -2).reshape(self.shape)

    def specs(self, by, sizes):
        """The kernel's rule, for parts that have whole outputs, blocks and bytes; codes without an
        axis of outputs are divided by outputs alone. Scales of scales are replicated."""
        ins, outs = by
        part = lambda n, axis: 0 if n % sizes[axis] else n // sizes[axis]
        if self.in_rows:
            whole = part(self.n_out, outs), part(self.n_in, ins)
            whole = whole[0], fills_rows(whole[1], self.kind, self.block) and whole[1]
            axes = [axis if n else None for axis, n in zip((outs, ins), whole, strict=True)]
        else:
            whole = part(self.n_out, outs) * self.n_in
            axes = [outs if whole and fills_rows(whole, self.kind, self.block) else None]
        split = P(*(None,) * (self.codes.ndim - len(axes)), *axes)
        absmax = Nested(split, P(), P()) if isinstance(self.absmax, Nested) else split
        return dataclasses.replace(self, codes=split, absmax=absmax)

    def parts_of_outputs(self, gather: bool) -> Array:
        """`rows_of_outputs` of one matrix that a mesh divides: each device decodes its part along
        "tensor", after it has gathered the codes along "fsdp", or only what it has."""
        specs = self.specs(self.by, divided.here()._asdict())
        place = divided.gathered if gather else lambda x, axes: divided.constrained(x, *axes)
        w = jax.tree.map(place, self, specs).rows_of_outputs()
        return place(w, specs.codes if self.in_rows else (*specs.codes, None))

    def tensor_parts(self):
        sizes = divided.here()._asdict()
        specs = self.specs(self.by, sizes)
        if not self.in_rows:
            return super().tensor_parts()
        outs, ins = (axis if axis == "tensor" else None for axis in specs.codes[-2:])
        part = lambda n, axis: n if axis is None else n // sizes[axis]
        kernel = part(self.n_in, ins), part(self.n_out, outs)
        scales = divided.constrained(self.scales(), *specs.codes)
        leaf = dataclasses.replace(self, absmax=scales, kernel=kernel, n_in=kernel[0])
        split = P(*(None,) * (self.codes.ndim - 2), outs, ins)
        return leaf, dataclasses.replace(leaf, codes=split, absmax=split), (ins, outs)

    def product(self, x, axis: int):
        return matmul.product(x, self, axis)

    def of_rows(self, x, axis: int):
        return matmul.of_rows(x, self, axis)

    def on_mesh(self, x, axis: int):
        return matmul.on_mesh(x, self, axis)


def fills_rows(n_in: int, kind: str, block: int) -> bool:
    """Whether the weights of one output, n_in of them, fill whole bytes and whole blocks."""
    return n_in % math.lcm(block, CODES[kind].per_byte) == 0


def from_flat(codes, absmax, kernel: tuple[int, int], kind: str, block: int, dtype) -> Quantised:
    """A kernel (in, out) from its codes and scales in the order of bitsandbytes.

    codes: uint8 (ceil(in out / codes in a byte),). absmax: float32 (ceil(in out / block),), or
    `Nested` with codes of that shape.
    """
    n_in, n_out = kernel
    if fills_rows(n_in, kind, block):
        rows = lambda x: x.reshape(n_out, -1)
        codes = rows(codes)
        nested = isinstance(absmax, Nested)
        absmax = dataclasses.replace(absmax, codes=rows(absmax.codes)) if nested else rows(absmax)
    return Quantised(codes, absmax, kernel, n_in, kind, block, dtype)


# --------------------------------------------------------------------------------------- to codes


def quantize(params, kind: str = "nf4", double: bool = False, block: int = 64, sites=None):
    """The parameters with `Quantised` leaves for the kernels of linear layers.

    Heads, embeddings, routers of experts, parameters that are not matrices (QLoRA, section 3) and
    quantised kernels are unchanged. sites: {path: `ops.Site`}, None for `ops.sites_from_shapes`.
    Kernels are quantised one at a time, and one that is still to be read (`streaming.Coming`) layer
    by layer; codes of a kernel that a mesh divides are divided like it, as in `quantise`. Raises
    ValueError for an unknown kind or block and, with its path, for a kernel that is not finite or
    whose output axes come before its input axes.
    """
    flat = tree.flatten(params)
    sites = ops.sites_from_shapes(params) if sites is None else sites
    after = sharding.after(sites)
    kinds = ("linear", "experts")
    linear = {path: site for path, site in sites.items() if site.kind in kinds}
    routers = matching("router", linear)
    for path, site in resolve(("all-linear",), linear).items():
        if path in routers:
            continue
        if isinstance(flat[path], Quantised):
            continue
        w = flat[path]
        if site.ins + site.outs != tuple(range(len(site.ins + site.outs))):
            raise ValueError(f"quant: {path}: axes {site.outs} are outputs, before its inputs")
        by = sharding.AFTER if path in after else sharding.LINEAR
        try:
            leaf = _coded(w, site, kind, block, double, by)
        except ValueError as error:
            raise ValueError(f"quant: {path}: {error}") from error
        flat[path] = dataclasses.replace(leaf, kernel=w.shape[site.stack :])
    return tree.unflatten(flat)


def _coded(w, site, kind: str, block: int, double: bool, by) -> Quantised:
    """A kernel in codes. w: an array, or one that is not read yet."""
    if not hasattr(w, "layers"):
        return quantise(site.to_matrix(w), kind, block, double, by)
    if not site.stack:
        return quantise(site.to_matrix(w.array()), kind, block, double, by)
    alone = site._replace(stack=site.stack - 1)
    code = lambda layer: quantise(alone.to_matrix(layer), kind, block, by=by)
    first, *rest = (code(layer) for layer in w.layers())
    stacked = jax.tree.map(_stacked, first, *rest)
    # Of all layers at once, as in `quantise`: a mean of one layer alone rounds differently.
    return _like(first.codes, _with_nested(stacked) if double else stacked)


def _stacked(*layers):
    """Arrays as one, divided over the mesh that divides each, if there is one."""
    at = layers[0].sharding
    if not isinstance(at, NamedSharding):
        return jnp.stack(layers)
    place = NamedSharding(at.mesh, P(None, *at.spec))
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=place)(*layers)


def by_words(kernels: dict, sites) -> dict:
    """{path: leaf}, each with the axes of a mesh that its word asks for. sites: {path: `Site`}."""
    after = sharding.after(sites)
    by = lambda path: sharding.AFTER if path in after else sharding.LINEAR
    return {path: dataclasses.replace(leaf, by=by(path)) for path, leaf in kernels.items()}


def quantise(
    w, kind: str = "nf4", block: int = 64, double: bool = False, by=sharding.LINEAR
) -> Quantised:
    """(in, out), or (layers..., in, out), in float32, bfloat16 or float16, as codes.

    A w that a mesh divides (a global array with a `NamedSharding` over a `sharding.mesh`, also of
    several processes, all of which call this) is quantised where it is: every device makes the
    codes of its own part, divided over that mesh as `Quantised.specs` says, and no device has more
    of w. With `double`, each device sees all scales, a 64th of the numbers of w. The codes are the
    same bit for bit as those of one device. by: as in `Quantised`, the rule of w's axes.

    Raises ValueError for an unknown kind or block, and for numbers that are not finite or so large
    that their inverse is subnormal.
    """
    if kind not in CODES:
        raise ValueError(f"{kind!r} is not one of {', '.join(CODES)}")
    if block not in BLOCKS:
        raise ValueError(f"blocks of {block} are not one of {', '.join(map(str, BLOCKS))}")
    w, code = jnp.asarray(w), CODES[kind]
    *layers, n_in, n_out = w.shape
    stack = w.reshape(-1, n_in, n_out)
    if fills_rows(n_in, kind, block):
        # Several programs: in a single one XLA would recompute the scale for each number.
        scales = _scales(stack, block)
        codes = _turned(_pack(stack, scales, code, block))
        absmax = jnp.swapaxes(scales, 1, 2)
    else:
        codes, absmax = jax.lax.map(lambda matrix: _flat(matrix, code, block), stack)
    fits = jnp.all(absmax < _MOST)
    if not isinstance(fits, jax.core.Tracer) and not fits:
        raise ValueError(f"holds numbers that are not finite, or above {_MOST:.0e}")
    held = (x.reshape(*layers, *x.shape[1:]) for x in (codes, absmax))
    leaf = Quantised(*held, (n_in, n_out), n_in, kind, block, w.dtype, by)
    return _like(w, _with_nested(leaf) if double else leaf)


def _with_nested(leaf: Quantised) -> Quantised:
    """The leaf with its scales in 8 bits."""
    axes = leaf.codes.ndim - (2 if leaf.in_rows else 1)
    layers, each = leaf.absmax.shape[:axes], leaf.absmax.shape[axes:]
    # Flat before the program of `_nest`: within it, the mean would be summed in another order.
    nested = jax.vmap(_nest)(_whole(leaf.absmax).reshape(-1, math.prod(each)))
    nested = jax.tree.map(lambda x: x.reshape(*layers, *x.shape[1:]), nested)
    nested = dataclasses.replace(nested, codes=nested.codes.reshape(*layers, *each))
    return dataclasses.replace(leaf, absmax=nested)


def _whole(x):
    """x on every device of its mesh, so that a mean over it rounds as on one device."""
    mesh = gather.mesh_of(x)
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, P()))


def _like(w, leaf: Quantised) -> Quantised:
    """The leaf, divided over w's mesh, if there is one."""
    mesh = gather.mesh_of(w)
    if mesh is None:
        return leaf
    specs = leaf.specs(leaf.by, mesh.shape)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), leaf, specs)


@functools.partial(jax.jit, static_argnames="block")
def _scales(w, block: int):
    """(layers, in, out) -> (layers, in / block, out) float32. Compares halves of a block, because
    XLA is slow at reducing an inner axis."""
    x = jnp.abs(_blocks(w, block))
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        x = jnp.maximum(x[:, :, :half], x[:, :, half:])
    return x[:, :, 0]


@functools.partial(jax.jit, static_argnames=("code", "block"))
def _pack(w, scales, code: Code, block: int):
    """(layers, in, out) -> (layers, in / codes in a word, out): 32 bits of codes, the first ones in
    its lowest byte and there in the high half."""
    x = _blocks(w, block) * (1 / _or_one(scales))[:, :, None]
    per_word = 4 * code.per_byte
    x = x.reshape(len(w), -1, per_word, w.shape[2])
    words = 0
    for i in range(per_word):
        byte, place = divmod(i, code.per_byte)
        shift = 8 * byte + (8 - code.bits * (place + 1))
        words |= code.nearest(x[:, :, i]).astype(jnp.uint32) << shift
    return words


@jax.jit
def _turned(words):
    """(layers, words, out) -> (layers, out, bytes) uint8. Transposes words, which is faster."""
    bytes_ = jax.lax.bitcast_convert_type(jnp.swapaxes(words, 1, 2), jnp.uint8)
    return bytes_.reshape(*bytes_.shape[:2], -1)


def _blocks(w, block: int):
    """(layers, in, out) -> (layers, in / block, block, out) float32."""
    return w.astype(jnp.float32).reshape(len(w), -1, block, w.shape[2])


@functools.partial(jax.jit, static_argnames=("code", "block"))
def _flat(w, code: Code, block: int):
    """(codes, scales) of a matrix whose outputs don't fill whole blocks."""
    codes, absmax = _nearest(code, w.astype(jnp.float32).T.reshape(-1), block)
    if code.per_byte == 2:
        nothing = code.nearest(jnp.zeros(codes.size % 2))
        high, low = jnp.concatenate([codes, nothing]).reshape(-1, 2).T
        codes = high << 4 | low
    return codes, absmax


def _nearest(code: Code, x, block: int):
    """(codes (n,) uint8, scales (ceil(n / block),) float32) of x (n,) float32."""
    full = x.size // block * block
    blocks, tail = x[:full].reshape(-1, block), x[full:]
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * (1 / _or_one(absmax))[:, None]
    codes = code.nearest(scaled.reshape(-1))
    if not tail.size:
        return codes, absmax
    last = jnp.max(jnp.abs(tail))
    # XLA replaces division by a scalar by a product with its inverse, which rounds differently.
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(_or_one(last), tail.shape))
    codes = jnp.concatenate([codes, code.nearest(tail / divisor)])
    return codes, jnp.append(absmax, last)


def _or_one(scale):
    return jnp.where(scale > 0, scale, 1)


@jax.jit
def _nest(absmax) -> Nested:
    """The scales (blocks,) of one layer."""
    offset = jnp.mean(absmax)
    codes, outer = _nearest(DYNAMIC, absmax - offset, NESTED_BLOCK)
    return Nested(codes, outer, offset)


# ------------------------------------------------------------------------------------- from codes


def _decode(codes, scales, n_in: int, n_out: int, kind: str, block: int):
    """(layers..., out, in) float32."""
    values = jnp.take(jnp.asarray(pairs(kind)), codes, axis=0, mode="clip")
    values = values.reshape(*codes.shape[:-1], -1)
    if fills_rows(n_in, kind, block):
        return values * jnp.repeat(scales, block, axis=-1)
    each = jnp.repeat(scales, block, axis=-1)[..., : n_in * n_out]
    w = values[..., : n_in * n_out] * each
    return w.reshape(*codes.shape[:-1], n_out, n_in)


@functools.cache
def pairs(kind: str) -> np.ndarray:
    """(256, codes in a byte) float32: the values that each byte stands for."""
    code = CODES[kind]
    byte = np.arange(256)
    if code.per_byte == 1:
        return code.values[:, None]
    return np.stack([code.values[byte >> 4], code.values[byte & 15]], axis=1)


def _rounded(x):
    """x itself, hidden from the compiler, which would fuse a product and a sum and round once."""
    return jnp.where(x == x, x, 0)
