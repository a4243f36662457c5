"""The training program of a group, compiled for a CPU: its buffers and its FLOPs."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.extend
import numpy as np
from jax.interpreters import partial_eval

from lorax import quant, sharding, tasks, tree, xla
from lorax.meshes import Shape
from lorax.models import Base
from lorax.train import offload, programs
from lorax.train.layouts import Layout
from lorax.train.shapes import shapes
from lorax.train.stacks import Stack

#: Options of the CPU's compiler: slow code with the same buffers, in a third of the time.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

#: Without this pass the compiler doesn't hoist float32 copies of all bfloat16 weights out of the
#: loop over layers.
_NARROW = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Measured(NamedTuple):
    """What XLA and the traced program need for `width` members side by side.

    temporaries: bytes of buffers other than the arguments. half, full: FLOPs of a step in products
    of 16-bit numbers and in others. moved: bytes that these products read and write.
    """

    temporaries: int
    half: float
    full: float
    moved: float


class Spread(NamedTuple):
    """How a group is spread: the mode and the mesh of a `lorax.train.layouts.Layout`."""

    mode: str = "none"
    shape: Shape = Shape()


ALONE = Spread()


class Bytes(NamedTuple):
    """On one device, of the base and of one member."""

    weights: int
    adapters: int
    constants: int
    optimizer: int
    batches: int


def measure(
    stacked: Stack, base: Base, batch, wanted: Iterable, spread: Spread = ALONE
) -> dict[tuple, Measured]:
    """{(width, widened): what the training program needs on each device}, for the wanted pairs.
    batch: shapes of one member's call. widened: with the copies of bfloat16 weights that only a CPU
    makes. Products are taken to be divided evenly over fsdp and tensor."""
    lowered, works, jobs = {}, {}, {}
    parts = spread.shape.fsdp * spread.shape.tensor
    with ThreadPoolExecutor(2) as pool:
        for width, widened in wanted:
            if width not in lowered:
                alone = trace(stacked, base, batch, width)
                traced = trace(stacked, base, batch, width, spread) if parts > 1 else alone
                steps = jax.tree.leaves(batch)[0].shape[0]
                lowered[width], works[width] = traced.lower(), work(alone.jaxpr) / steps / parts
            options = xla.known(_QUICK if widened else _QUICK | _NARROW)
            jobs[width, widened] = pool.submit(lowered[width].compile, compiler_options=options)
    beside = lambda m: m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        key: Measured(beside(job.result().memory_analysis()), *works[key[0]])
        for key, job in jobs.items()
    }


def layout_of(spread: Spread, width: int) -> Layout:
    """The layout of so many members side by side on each device, on CPU devices in place of those
    that are planned for. Members on other devices run the same program, so that none are there."""
    shape = spread.shape._replace(member=1)
    devices = jax.local_devices(backend="cpu")
    if shape.size > len(devices):
        raise ValueError(
            f"--mesh: {shape} is compiled for {shape.size} devices of a CPU, and JAX has started "
            f"with {len(devices)}: call jax.config.update('jax_num_cpu_devices', {shape.size}) "
            "before its first computation, or use python -m lorax.plan"
        )
    mode = spread.mode if shape.size > 1 else "none"
    return Layout(mode, tuple(devices[: shape.size]), width, width, shape)


def trace(stacked: Stack, base: Base, batch, width: int, spread: Spread = ALONE):
    """The program that `lorax.train` runs, traced for `width` members side by side. With
    `train.offload` it is the program that computes gradients, without the optimiser's state."""
    kind = tasks.kind_of(stacked.config.task)
    layout = layout_of(spread, width)
    given = shapes(stacked, base, layout, batch, kind)
    program = programs.program_of(stacked, base, width, kind)
    batches, state = given.batches(given.widest), given.state
    if stacked.config.train.offload:
        state = state.trainable, state.step
        f = offload.jitted(program, layout, given)
        return f.trace(given.params, given.constants, given.hyper, *state, batches)
    f = programs.jitted(program, layout, given)
    return f.trace(given.params, given.constants, given.hyper, state, batches)


def on_one_device(stacked: Stack, base: Base, batch, spread: Spread) -> Bytes:
    """Bytes of the arguments of the training program on each device, of one member."""
    kind = tasks.kind_of(stacked.config.task)
    given = shapes(stacked, base, layout_of(spread, 1), batch, kind)
    size = sharding.device_bytes
    return Bytes(
        size(given.params),
        size(given.state.trainable),
        size(given.constants),
        size(given.state.opt_state),
        size(given.batches(given.widest)),
    )


def work(closed):
    """(3,) float64: FLOPs in products of 16-bit numbers, in others, and bytes that products read
    and write, for a `ClosedJaxpr` without dead code. A loop's body counts once per iteration."""
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _work(live)


def _work(jaxpr) -> np.ndarray:
    total = np.zeros(3)
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            total += _of_product(equation)
        elif name.startswith("ragged_dot"):
            total += _of_groups(equation)
        elif name == "cond":
            total += np.max([_work(branch.jaxpr) for branch in given["branches"]], axis=0)
        else:
            turns = given["length"] if name == "scan" else 1
            inner = [getattr(x, "jaxpr", x) for x in given.values()]
            total += turns * sum(_work(x) for x in inner if isinstance(x, jax.extend.core.Jaxpr))
    return total


def _of_product(equation) -> np.ndarray:
    """`work` of one product or convolution."""
    left, right, out = (v.aval for v in (*equation.invars, *equation.outvars))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        each = math.prod(left.shape[i] for i in contracted)
    else:
        channels = equation.params["dimension_numbers"].rhs_spec[0]
        each = right.size // right.shape[channels]
    flops = 2 * out.size * each
    half = left.dtype.itemsize <= 2 and right.dtype.itemsize <= 2
    moved = sum(aval.size * aval.dtype.itemsize for aval in (left, right, out))
    return np.array([flops * half, flops * (not half), moved], float)


def _of_groups(equation) -> np.ndarray:
    """`work` of a product of rows by group: each row takes part once, and groups without rows are
    not read."""
    left, right, sizes, out = (v.aval for v in (*equation.invars[:3], *equation.outvars))
    rows = left.shape[0]
    of_rows = [aval.size for aval in (left, right, out) if aval.shape[0] == rows and aval.ndim == 2]
    flops = 2 * rows * math.prod(size // rows for size in of_rows)
    half = left.dtype.itemsize <= 2 and right.dtype.itemsize <= 2
    read = lambda aval: aval.size * (1 if aval.ndim == 2 else min(1, rows / sizes.size))
    moved = sum(read(aval) * aval.dtype.itemsize for aval in (left, right, out))
    return np.array([flops * half, flops * (not half), moved], float)


def widest_decoded(params, dtype: str) -> int:
    """Bytes of the largest quantised weight of one layer, with all its experts, when it is decoded;
    0 without any."""
    coded = [x for x in tree.flatten(params).values() if isinstance(x, quant.Quantised)]
    # Of the leading axes, (L,) or (L, E).
    experts = lambda leaf: math.prod(leaf.shape[1 : len(leaf.shape) - len(leaf.kernel)])
    widest = max((experts(leaf) * leaf.n_in * leaf.n_out for leaf in coded), default=0)
    return widest * np.dtype(dtype).itemsize
