"""4-bit weights times a few rows of activations on Hopper GPUs, decoded in registers.

    y = x w,    w[k, n] = bf16(bf16(table[code[n, k]]) bf16(scale[k // 64, n]))

A Mosaic GPU kernel. `wgmma` takes one operand from registers, so the product is transposed,
y^T = W x^T: codes are copied to the multiprocessor with 4 bits per weight and converted to bfloat16
just before the tensor core. With few rows the product is limited by loading weights, so a quarter
of the bytes takes a quarter of the time; from about a thousand rows on, decoding W once followed by
a plain product is faster.

A block of 128 columns of y has two warpgroups that decode and multiply, 64 columns each, and one
that prefetches x, codes and scales. The loop over k is inside the kernel; if there are too few
blocks for the machine it is split, and XLA adds the float32 parts, in order.

It has been lowered for CUDA and assembled for sm_90a (no register spills); its decoding has been
emulated, bit for bit. It has not yet run on a GPU; the clock cycles below are estimates.
"""

import inspect
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

Array = jax.Array

BLOCK = 64  # weights that share a scale, and the k of one decoded operand
WARPGROUPS = 2  # that compute
N_TILE = 64 * WARPGROUPS  # columns of y of a thread block: wgmma has 64 rows
MAX_ROWS = 1024
SHARED = 227 * 1024  # bytes of shared memory of a thread block
MULTIPROCESSORS = 132  # H100 SXM, H200

# Each thread loads the words whose weights it passes to wgmma: rows of W are spread over warps and
# lanes as in wgmma's tile, and a word of 8 codes replaces 2 neighbours in 4 tiles of 8.
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# Until jax 0.11 `load` wanted an index; () is all of a reference.
_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


# ------------------------------------------------------------------------------------------ layout


def can_use(rows: int, n_in: int, n_out: int, block: int) -> str:
    """'' if `matmul` supports a product of these sizes, otherwise the reason as a phrase.

    rows: of x, including members of a sweep; n_in, n_out: of w; block: weights that share a scale.
    It only checks sizes; `hopper` checks the GPU.
    """
    if block != BLOCK:
        return f"blocks of {block} weights, the kernel decodes blocks of {BLOCK}"
    if n_in % (2 * BLOCK) or n_in < 4 * BLOCK:
        return f"{n_in} inputs, no multiple of {2 * BLOCK} from {4 * BLOCK} on"
    if n_out % N_TILE:
        return f"{n_out} outputs, no multiple of {N_TILE}"
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} rows, the kernel is for 1 to {MAX_ROWS}"
    return ""


def hopper(device: jax.Device) -> bool:
    """Whether a device is a GPU of compute capability 9.0, the only one with `wgmma`."""
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def repack(codes, absmax, n_in: int, n_out: int) -> tuple[Array, Array]:
    """bitsandbytes' codes and scales in the kernel's order; `unpack` is the inverse.

    codes: (n_in n_out / 2,) uint8 of W (n_out, n_in) in rows, the first weight of a pair in the
    high half; absmax: (n_in n_out / 64,) float32. Returns words (n_out, n_in / 8) int32 and scales
    (n_in / 64, n_out) float32.

    Of 32 neighbouring inputs, a lane of wgmma holds 2 in each of the 4 tiles of 8: word q has
    inputs 8 t + 2 q + e at bits 4 (2 t + e), t < 4, e < 2.
    """
    _check("codes", codes, jnp.uint8, (n_in * n_out // 2,))
    _check("absmax", absmax, jnp.float32, (n_in * n_out // BLOCK,))
    if why := can_use(1, n_in, n_out, BLOCK):
        raise ValueError(f"n_in, n_out: {why}")
    each = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(n_out, n_in // 32, 4, 4, 2)
    nibbles = each.swapaxes(2, 3).reshape(n_out, n_in // 8, 8).astype(jnp.uint32)
    words = (nibbles << jnp.arange(0, 32, 4, dtype=jnp.uint32)[None, None]).sum(
        -1, dtype=jnp.uint32
    )
    scales = absmax.reshape(n_out, n_in // BLOCK).T
    return jax.lax.bitcast_convert_type(words, jnp.int32), scales


def unpack(words, scales) -> tuple[Array, Array]:
    """codes (n_in n_out / 2,) uint8, absmax (n_in n_out / 64,) float32: the inverse of `repack`."""
    each = codes_of(words).reshape(-1, 2).astype(jnp.uint8)
    return each[:, 0] << 4 | each[:, 1], scales.T.reshape(-1)


def codes_of(words) -> Array:
    """The codes (n_out, n_in) int32, in their order, of words (n_out, n_in / 8) int32."""
    nibbles = (words[..., None] >> jnp.arange(0, 32, 4, dtype=jnp.int32)[None, None]) & 15
    n_out = words.shape[0]
    return nibbles.reshape(n_out, -1, 4, 4, 2).swapaxes(2, 3).reshape(n_out, -1)


# --------------------------------------------------------------------------------------- reference


def weight(words, scales, table) -> Array:
    """w (n_in, n_out) bfloat16 with the kernel's roundings: table, scale and product."""
    codes = jnp.asarray(_table(table)).astype(jnp.bfloat16)[codes_of(words)].T
    return codes * jnp.repeat(scales.astype(jnp.bfloat16), BLOCK, axis=0)


def reference(x, words, scales, table, out_dtype=jnp.bfloat16) -> Array:
    """What `matmul` computes, without the kernel; sums in float32, in another order.

    A weight's relative error against table * scale is at most (1 + u)^3 - 1, u = 2^-8, from
    bfloat16's rounding of table, scale and product.
    """
    w = weight(words, scales, table)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(out_dtype)


# ------------------------------------------------------------------------------------------ decode


def planes(table) -> tuple[tuple[int, ...], ...]:
    """The table in bfloat16 as two tables of 16 bytes, low and high ones: 4 words of 32 bits each.

    table: 16 float32.
    """
    bits = np.asarray(_table(table).astype(jnp.bfloat16)).view(np.uint16)
    each = [np.ascontiguousarray(b).astype(np.uint8).view("<u4") for b in (bits & 255, bits >> 8)]
    return tuple(tuple(int(word) for word in plane) for plane in each)


def decode(word, planes, permute) -> list:
    """The 8 codes of a word, lowest first, as 4 words of two bfloat16 each, the first one low.

    word: 32 bits with operators &, |, >> (logical). planes: `planes(table)`, of the type of word.
    permute(a, b, selectors): PRMT of PTX; byte i of the result is byte `selectors >> 4 i & 7` of
    b a, 4 bytes of a below 4 bytes of b, i < 4.

    A selector reaches 8 bytes, so a byte is looked up in both halves of its table, and a further
    permutation picks by the code's highest bit.
    """
    within = word & 0x77777777
    half = ((word & 0x88888888) >> 1) | 0x32103210  # i, or 4 + i where the highest bit is set
    pairs = []
    for shift in (0, 16):
        w, h = (within >> shift, half >> shift) if shift else (within, half)
        low, high = (permute(permute(p[0], p[1], w), permute(p[2], p[3], w), h) for p in planes)
        pairs += [permute(low, high, 0x5140), permute(low, high, 0x7362)]
    return pairs


def register_moves(i: int):
    """(register of a word, the 4 registers of its weights) for all words of operand i of a step.

    Registers of a thread are (1, tiles of columns, 1, 1, halves of 8 rows): a column tile is 4
    words, or 8 weights of which a thread has 2.
    """
    for chunk, rows in itertools.product(range(BLOCK // 32), range(2)):
        weights = [(0, 4 * chunk + tile, 0, 0, rows) for tile in range(4)]
        yield (0, BLOCK // 32 * i + chunk, 0, 0, rows), weights


class _Word:
    """A 32-bit value of the kernel with the operators that `decode` needs."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def of(cls, x):
        return x if isinstance(x, cls) else cls(mgpu.c(x - (x >> 31 << 32), _i32()))

    def __and__(self, x):
        return _Word(arith.andi(self.value, _Word.of(x).value))

    def __or__(self, x):
        return _Word(arith.ori(self.value, _Word.of(x).value))

    def __rshift__(self, x):
        return _Word(arith.shrui(self.value, _Word.of(x).value))

    @staticmethod
    def permute(a, b, selectors):
        return _Word(mgpu_utils.prmt(a.value, b.value, _Word.of(selectors).value))


def _i32():
    return ir.IntegerType.get_signless(32)


def _decoded(words, scales_ref, i: int, table):
    """Operand i of a step: (64, 64) bfloat16 weights in wgmma's layout.

    words: (64, k / 8) in `_WORDS`; scales_ref: (64,) float32 in shared memory.
    """

    @plgpu.inline_mgpu(
        arg_types=(_WORDS, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((64, BLOCK), jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def body(_, words, scales_ref):
        tables = tuple(tuple(_Word.of(w) for w in plane) for plane in planes(table))
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((64, BLOCK)), dtype=object)
        for source, places in register_moves(i):
            held = words.registers[source].item()
            word = _Word(vector.extract(held, dynamic_position=[], static_position=[0]))
            for place, value in zip(places, decode(word, tables, _Word.permute), strict=True):
                registers[place] = mgpu_utils.bitcast(value.value, pair)
        codes = mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )
        scales = mgpu.FragmentedArray.load_untiled(
            scales_ref, layout=mgpu.WGMMA_ROW_LAYOUT, optimized=False
        )
        return codes * scales.astype(ir.BF16Type.get()).broadcast_minor(BLOCK)

    return body(words, scales_ref)


# ------------------------------------------------------------------------------------------ kernel


class Blocks(NamedTuple):
    """How a product is divided: rows and k of a step, parts of k, prefetched steps."""

    rows: int
    k: int
    parts: int
    stages: int


def blocks(rows: int, n_in: int, n_out: int) -> Blocks:
    """The division with the fewest estimated clock cycles.

    Rows up to 64 are one block, the smallest of 8, 16, 32, 64 that holds them; above that blocks
    of 64, 128 or 256. A step of 64 in k takes 4 cycles a row (wgmma at full rate) or 340 (decoding
    128 x 64 weights, 64 byte permutations a cycle), whichever is more.
    """
    whole = [b for b in (8, 16, 32, 64) if b >= rows][:1]

    def cut(b, parts):
        k = 64 if b == 256 else 256 if b <= 64 and n_in % 256 == 0 < n_in - 256 else 128
        stage = b * k * 2 + N_TILE * k // 2 + N_TILE * (k // BLOCK) * 4
        stages = (SHARED - 1024 - _staging(b)) // stage
        return Blocks(b, k, parts, min(stages, 6, n_in // k // parts))

    def cycles(b, parts):
        waves = math.ceil(math.ceil(rows / b) * (n_out // N_TILE) * parts / MULTIPROCESSORS)
        block_cycles = math.ceil(n_in / BLOCK / parts) * max(4 * b, 340) + 1500
        # A part of k writes float32, another kernel reads it, 2600 bytes a cycle.
        return waves * block_cycles + (parts > 1) * (8 * parts * rows * n_out / 2600 + 3500)

    cuts = itertools.product(whole or (64, 128, 256), range(1, 9))
    fits = [c for c in cuts if cut(*c).stages >= 2]
    return cut(*min(fits, key=lambda c: cycles(*c)))


def _staging(rows: int) -> int:
    """Bytes of shared memory of a block's results on their way out, 64 rows of them at a time."""
    return WARPGROUPS * min(rows, 64) * 64 * 4


def matmul(x, words, scales, table, out_dtype=jnp.bfloat16, cut: Blocks | None = None) -> Array:
    """y = x w, (M, n_in) -> (M, n_out) in `out_dtype`, sums in float32.

    x: (M, n_in) bfloat16. words: (n_out, n_in / 8) int32 and scales: (n_in / 64, n_out) float32 of
    `repack`. table: 16 float32, known when the kernel is compiled. out_dtype: bfloat16 or float32.
    cut: in place of `blocks(M, n_in, n_out)`. Weights are `weight(words, scales, table)`.

    It needs a Hopper GPU; it has been lowered and assembled for one, but not yet run.
    """
    n_out, n_in = words.shape[0], 8 * words.shape[1]
    rows = x.shape[0]
    _check("words", words, jnp.int32, (n_out, n_in // 8))
    _check("scales", scales, jnp.float32, (n_in // BLOCK, n_out))
    _check("x", x, jnp.bfloat16, (rows, n_in))
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype: {jnp.dtype(out_dtype)}; bfloat16 or float32")
    if why := can_use(rows, n_in, n_out, BLOCK):
        raise ValueError(f"x, words: {why}")
    table = _table(table)
    cut = cut or blocks(rows, n_in, n_out)

    # Copies go by 8 rows. A single tile may reach past the end of x, where zeros are read and
    # nothing is written; several have to be whole.
    if rows > 8:
        x = jnp.pad(x, ((0, -rows % 8), (0, 0)))
    part = _product(x, words, scales, table, jnp.float32 if cut.parts > 1 else out_dtype, cut)
    return (part.sum(0) if cut.parts > 1 else part[0])[:rows].astype(out_dtype)


def _product(x, words, scales, table, out_dtype, cut: Blocks) -> Array:
    """(M, n_in) -> (parts, M, n_out): the kernel."""
    (rows, n_in), n_out = x.shape, words.shape[0]
    steps, operands, staged = n_in // cut.k, cut.k // BLOCK, min(cut.rows, 64)
    swizzled = lambda columns, dtype: _swizzled(columns, jnp.dtype(dtype).itemsize)

    def kernel(x_gmem, words_gmem, scales_gmem, y_gmem, y_smem):
        warpgroup = jax.lax.axis_index("warpgroup")
        row, column, part = (jax.lax.axis_index(a) for a in ("rows", "columns", "part"))
        first, last = (jax.lax.div((part + i) * steps, cut.parts) for i in (0, 1))
        mine = pl.ds(warpgroup * 64, 64)

        def step(_, x_smem, words_smem, scales_smem, sums):
            if operands == 1:
                plgpu.wgmma_wait(0)  # the registers of the step before are about to be overwritten
            held = plgpu.load(words_smem.at[mine], *_WHOLE, layout=_WORDS)
            for i in range(operands):
                w = _decoded(held, scales_smem.at[i, mine], i, table)
                plgpu.wgmma(sums, w, x_smem.at[:, pl.ds(i * BLOCK, BLOCK)].T)
                plgpu.wgmma_wait(1)  # the next operand is decoded while this one is multiplied
            return sums

        def compute(run):
            sums = pl.run_scoped(lambda sums: run(sums)[...], plgpu.ACC((64, cut.rows)))
            for i in range(cut.rows // staged):
                tile = sums[:, i * staged : (i + 1) * staged].astype(out_dtype)
                y_smem.at[warpgroup].T[...] = plgpu.layout_cast(tile, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                to = pl.ds(row * cut.rows + i * staged, staged)
                plgpu.copy_smem_to_gmem(
                    y_smem.at[warpgroup],
                    y_gmem.at[part, to, pl.ds(column * N_TILE + warpgroup * 64, 64)],
                )
                plgpu.wait_smem_to_gmem(0)

        spec = lambda shape, index, dtype=None: plgpu.BlockSpec(
            shape,
            index,
            transforms=swizzled(shape[1], dtype) if dtype else (),
            delay_release=1,
        )
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(last - first if steps % cut.parts else steps // cut.parts,),
            memory_registers=40,
            in_specs=[
                spec((cut.rows, cut.k), lambda k: (row, first + k), jnp.bfloat16),
                spec((N_TILE, cut.k // 8), lambda k: (column, first + k), jnp.int32),
                spec((operands, N_TILE), lambda k: (first + k, column)),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=cut.stages,
            compute_context=compute,
        )(x_gmem, words_gmem, scales_gmem)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((cut.parts, rows, n_out), out_dtype),
        grid=(math.ceil(rows / cut.rows), n_out // N_TILE, cut.parts),
        grid_names=("rows", "columns", "part"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            y_smem=plgpu.SMEM(
                (WARPGROUPS, staged, 64), out_dtype, transforms=swizzled(64, out_dtype)
            )
        ),
    )(x, words, scales)


def _swizzled(columns: int, itemsize: int) -> tuple:
    """Tiles of 8 rows of shared memory, swizzled so that wgmma has no bank conflicts."""
    width = min(128, columns * itemsize)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)


# ------------------------------------------------------------------------------------------ checks


def _table(table) -> np.ndarray:
    table = np.asarray(table, np.float32)
    if table.shape != (16,):
        raise ValueError(f"table: shape {table.shape}; (16,), a value for each code of 4 bits")
    return table


def _check(name, x, dtype, shape):
    if x.dtype != dtype or x.shape != shape:
        given = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{name}: {given}; {jnp.dtype(dtype)} {shape}")
