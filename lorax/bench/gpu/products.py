"""Products with a weight in 4 bits: right against float64, and how fast beside a bfloat16 weight.

A call goes through so many distinct weights that none is still in the cache when it is needed
again, and each is multiplied with rows of its own, so that the compiler can't join products. Data
are random: a product with zeros runs faster.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.bench import timing
from lorax.bench.gpu.rows import SkippedError, attempted, repeated, row
from lorax.bench.gpu.sizes import Sizes
from lorax.quant import matmul, mosaic, nf4, packed

BF16 = "bf16"
U = 2.0**-8  # bfloat16's unit roundoff
CHECKED = 64  # rows that are compared with float64
CODED = 0.5 + 4 / 64  # bytes of a weight: a code, and a share of a float32 scale
NF4 = nf4.CODES["nf4"].values


class Kernel(NamedTuple):
    """on: whose kernel, as `packed.Packed.on`, '' if there is none, for the reason `why`. options:
    of its `matmul`. roundings: to bfloat16 of a weight that it decodes."""

    on: str
    why: str
    options: dict
    roundings: int


def kernel() -> Kernel:
    """The kernel of JAX's device. On a CPU it is the TPU's, interpreted: right, and slow."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Kernel("tpu", "", {"interpret": True}, 1)
    if device.platform == "tpu":
        return Kernel("tpu", "", {}, 1)
    if not mosaic.hopper(device):
        return Kernel("", f"no kernel for {device.device_kind}, only for Hopper GPUs", {}, 1)
    return Kernel("gpu", "", {}, 3)


class Path(NamedTuple):
    """product(x (rows, in), leaf) -> (rows, out), bfloat16. leaves: distinct weights. right: the
    first of them, (in, out) float64. relative: the error of a decoded weight. phases: bytes and
    FLOPs at least, in turn."""

    product: Callable
    leaves: list
    right: np.ndarray
    relative: float
    phases: list[tuple[float, float]]


# ---------------------------------------------------------------------------------- what is reached


def ceilings(sizes: Sizes) -> Iterator[dict]:
    """The rates that all others are shares of: of a copy, of products, of nothing at all."""
    n, key = sizes.square, jax.random.key(0)
    x = jax.random.normal(key, (sizes.copied // 4,))
    timed = lambda run, *args: repeated(timing.once(lambda: run(*args)), sizes.seconds)
    yield row("copy", "float32", timed(jax.jit(jnp.negative), x), [(2 * x.nbytes, 0)])
    for dtype in ("bfloat16", "float32"):
        a, b = (jax.random.normal(k, (n, n), dtype) for k in jax.random.split(key))
        seconds = timed(jax.jit(jnp.matmul), a, b)
        yield row(f"square product of {n}", dtype, seconds, [(0, 2 * n**3)])
    many = 32
    small = list(jax.random.normal(key, (2 * many, 16, 16), "bfloat16"))
    tiny = jax.jit(lambda xs: [a @ b for a, b in zip(xs[::2], xs[1::2], strict=True)])
    yield row("launch of a small product", "bfloat16", timed(tiny, small) / many)


# ----------------------------------------------------------------------------------------- products


def product(sizes: Sizes, shape: tuple[int, int], rows: int) -> Iterator[dict]:
    """x w for some rows by each path, checked and timed."""
    case = product_case(shape, rows)
    for name, make in paths(sizes, shape, rows).items():
        measure = functools.partial(_measured, sizes, case, rows, name, make)
        yield from attempted(case, name, measure)


def product_case(shape: tuple[int, int], rows: int) -> str:
    return f"product {shape[0]} x {shape[1]}, {rows} row{'s' * (rows != 1)}"


def paths(sizes: Sizes, shape, rows: int) -> dict[str, Callable[[], Path]]:
    """{name: a function that makes the path}, for all that compute x w; SkippedError says why there
    is none. The kernel comes last, since it is what may hang."""
    (n_in, n_out), least = shape, phases(shape, rows)

    def bf16():
        leaves = denses(sizes, shape)
        return Path(jnp.matmul, leaves, np.float64(leaves[0]), 0.0, least[BF16])

    def two_passes():
        leaves, roundings = stored(sizes, shape), kernel().roundings if kernel().on else 1
        by = packed.Packed.two_passes if kernel().on else nf4.Quantised.of_rows
        run = lambda x, leaf: by(leaf, x, axis=0)
        off = _relative(roundings)
        return Path(run, leaves, exact(sizes, shape), off, least[matmul.TWO_PASSES])

    def fused():
        here = kernel()
        if not here.on:
            raise SkippedError(here.why)
        if why := packed.kernels(here.on).can_use(rows, n_in, n_out, 64):
            raise SkippedError(why)
        run = lambda x, leaf: leaf.fused(x, **here.options)
        leaves, off = stored(sizes, shape), _relative(here.roundings)
        return Path(run, leaves, exact(sizes, shape), off, least[matmul.FUSED])

    return {BF16: bf16, matmul.TWO_PASSES: two_passes, matmul.FUSED: fused}


def phases(shape: tuple[int, int], rows: int) -> dict[str, list[tuple[float, float]]]:
    """{path: [(bytes moved, FLOPs)]} of x w at least: a weight in bfloat16 is read; codes are
    decoded, written and read again; codes are read."""
    n_in, n_out = shape
    size, flops, ends = n_in * n_out, 2 * rows * n_in * n_out, 2 * rows * (n_in + n_out)
    dense = (2 * size + ends, flops)
    return {
        BF16: [dense],
        matmul.TWO_PASSES: [((CODED + 2) * size, 0), dense],
        matmul.FUSED: [(CODED * size + ends, flops)],
    }


def _measured(sizes: Sizes, case: str, rows: int, name: str, make: Callable[[], Path]) -> dict:
    path = make()
    run, args = program(path, rows)
    first, again = run(*args)[0], run(*args)[0]
    more = {"error": error(first, args[0][0], path)}
    more["repeats"] = bool(jnp.array_equal(first, again))
    if not more["error"] <= 1 or not more["repeats"]:
        raise ArithmeticError(
            f"wrong: error {more['error']:.3g} of what rounding explains, "
            f"{'the same' if more['repeats'] else 'not the same'} when repeated"
        )
    seconds = repeated(timing.once(lambda: run(*args)), sizes.seconds)
    return row(case, name, seconds / len(path.leaves), path.phases, **more)


def program(path: Path, rows: int) -> tuple[Callable, tuple]:
    """The products with every weight, compiled, and their arguments. Each has an x of its own."""
    n_in = path.leaves[0].shape[0]
    keys = jax.random.split(jax.random.key(rows), len(path.leaves))
    xs = [_normal(key, (rows, n_in)) for key in keys]
    one = jax.jit(path.product)  # lowered once for all of them
    apart = lambda x, leaf: one(*jax.lax.optimization_barrier((x, leaf)))
    every = lambda xs, leaves: [apart(*pair) for pair in zip(xs, leaves, strict=True)]
    return jax.jit(every), (xs, path.leaves)


def error(y, x, path: Path) -> float:
    """The largest error over what its roundings explain; some rows, all columns, against float64.

    A float32 sum of n terms is off by at most n 2^-24 of their magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, eq. 3.5); weights are off by `relative`, the result by U.
    """
    picked = np.unique(np.linspace(0, len(x) - 1, CHECKED).astype(int))
    if not bool(jnp.isfinite(y).all()):
        return math.inf
    w = path.right
    x, y = np.float64(x[picked]), np.float64(y[picked])
    magnitude = np.abs(x) @ np.abs(w) * (1 + path.relative)
    bound = magnitude * (path.relative + len(w) * 2.0**-24 + U) + 1e-30
    return float(np.max(np.abs(y - x @ w) / bound))


# ------------------------------------------------------------------------------------------- decode


def decode(sizes: Sizes, shape: tuple[int, int]) -> Iterator[dict]:
    """w decoded to bfloat16 and written, from the order of a file and from that of the kernel."""
    case, size = decode_case(shape), math.prod(shape)
    orders = {"order of files": coded}
    if kernel().on:
        orders["order of the kernel"] = stored

    def measured(name):
        leaves = orders[name](sizes, shape)
        one = jax.jit(lambda leaf: leaf.decoded())
        run = jax.jit(lambda leaves: [one(jax.lax.optimization_barrier(leaf)) for leaf in leaves])
        w, right = np.float64(run(leaves)[0]), exact(sizes, shape)
        roundings = kernel().roundings if orders[name] is stored else 1
        off = float(np.max(np.abs(w - right) / (np.abs(right) * _relative(roundings) + 1e-30)))
        if not off <= 1:
            raise ArithmeticError(f"wrong: error {off:.3g} of what rounding explains")
        seconds = repeated(timing.once(lambda: run(leaves)), sizes.seconds) / len(leaves)
        return row(case, name, seconds, [((CODED + 2) * size, 0)], error=off)

    for name in orders:
        yield from attempted(case, name, functools.partial(measured, name))


def decode_case(shape: tuple[int, int]) -> str:
    return f"decode {shape[0]} x {shape[1]}"


# ------------------------------------------------------------------------------ times without gaps


def on_device(sizes: Sizes, shape: tuple[int, int]) -> Iterator[dict]:
    """The time of the kernels alone, as CUPTI counts it, without the gaps between them."""
    if jax.devices()[0].platform != "gpu":
        raise SkippedError("CUPTI is for NVIDIA GPUs")
    from jax.experimental.mosaic.gpu import profiler

    counter = profiler.Cupti(finalize=False)

    def measured(case, rows, name, make):
        path = make()
        run, args = program(path, rows)
        ms = [counter.measure(run)(*args)[1] for _ in range(3)]
        if None in ms:
            raise SkippedError("CUPTI has counted no kernel")
        return row(case, name, np.array(ms) / 1e3 / len(path.leaves), path.phases)

    for rows in sizes.rows[:3]:
        case = f"{product_case(shape, rows)}, kernels alone"
        for name, make in paths(sizes, shape, rows).items():
            measure = functools.partial(measured, case, rows, name, make)
            yield from attempted(case, name, measure)


# ------------------------------------------------------------------------------------------ weights


def count(sizes: Sizes, shape) -> int:
    return math.ceil(sizes.cycled / (CODED * math.prod(shape)))


@functools.cache
def coded(sizes: Sizes, shape) -> list[nf4.Quantised]:
    """Distinct random weights in the order of files."""
    n_in, n_out = shape

    @jax.jit
    def draw(key):
        of_codes, of_scales = jax.random.split(key)
        codes = jax.random.bits(of_codes, (n_out, n_in // 2), jnp.uint8)
        scales = jnp.exp(jax.random.normal(of_scales, (n_out, n_in // 64)) - 3)
        return nf4.Quantised(codes, scales, shape, n_in, "nf4", 64, np.dtype(jnp.bfloat16))

    return [draw(key) for key in jax.random.split(jax.random.key(1), count(sizes, shape))]


@functools.cache
def stored(sizes: Sizes, shape) -> list:
    """The same weights as a base has them on this device: in the kernel's order if it has one."""
    on, leaves = kernel().on, coded(sizes, shape)
    pack = jax.jit(lambda leaf: packed.pack(leaf, on))  # compiled once for all of them
    return [pack(leaf) for leaf in leaves] if on else leaves


@functools.cache
def denses(sizes: Sizes, shape) -> list:
    """The same weights in bfloat16."""
    decoded = jax.jit(lambda leaf: leaf.decoded())
    return [decoded(leaf) for leaf in coded(sizes, shape)]


@functools.cache
def exact(sizes: Sizes, shape) -> np.ndarray:
    """The first weight, (in, out) float64: value times scale, not rounded."""
    leaf = coded(sizes, shape)[0]
    codes = np.asarray(leaf.codes)
    values = np.float64(NF4)[np.stack([codes >> 4, codes & 15], axis=-1)].reshape(shape[::-1])
    return (values * np.repeat(np.float64(leaf.absmax), 64, axis=1)).T


def _relative(roundings: int) -> float:
    """The relative error of a weight after so many roundings to bfloat16."""
    return (1 + U) ** roundings - 1


@functools.partial(jax.jit, static_argnums=1)
def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16)
