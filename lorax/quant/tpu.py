"""4-bit weights times activations on TPUs, decoded a tile at a time.

    y = x w,    w[k, n] = bf16(table[code[n, k]] scale[k // 64, n])

A Pallas kernel. Its grid runs in order, k innermost, so a tile of y is accumulated in place in
float32. A tile of w is decoded from words of 8 codes by shifts and a tree of 15 selections, which
the vector unit does without memory access, and rounded exactly as in bitsandbytes.

It has been interpreted, and lowered for TPUs, but not yet run on one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

BLOCK = 64  # weights that share a scale
GROUP = 256  # weights whose codes share words
WORDS = GROUP // 8
MAX_ROWS = 1024


# ------------------------------------------------------------------------------------------ layout


def can_use(rows: int, n_in: int, n_out: int, block: int) -> str:
    """'' if `matmul` supports a product of these sizes, otherwise the reason as a phrase.

    rows: of x, including members of a sweep; n_in, n_out: of w; block: weights that share a scale.
    It only checks sizes.
    """
    if block != BLOCK:
        return f"blocks of {block} weights, the kernel decodes blocks of {BLOCK}"
    if n_in % GROUP or not n_in:
        return f"{n_in} inputs, no multiple of {GROUP}"
    if n_out % 128 or not n_out:
        return f"{n_out} outputs, no multiple of 128"
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} rows, the kernel is for 1 to {MAX_ROWS}"
    return ""


def repack(codes, absmax, n_in: int, n_out: int) -> tuple[Array, Array]:
    """bitsandbytes' codes and scales in the kernel's order; `unpack` is the inverse.

    codes: (n_in n_out / 2,) uint8 of W (n_out, n_in) in rows, the first weight of a pair in the
    high half; absmax: (n_in n_out / 64,) float32. Returns words (n_in / 8, n_out) int32 and scales
    (n_in / 64, n_out) float32.

    Outputs are lanes. Word i of a group of 256 inputs has input 32 j + i at bits 4 j, j < 8, so
    that a shift of 32 words is a tile of 32 neighbouring inputs, all with one scale.
    """
    _check("codes", codes, jnp.uint8, (n_in * n_out // 2,))
    _check("absmax", absmax, jnp.float32, (n_in * n_out // BLOCK,))
    if why := can_use(1, n_in, n_out, BLOCK):
        raise ValueError(f"n_in, n_out: {why}")
    each = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(n_out, n_in).T
    nibbles = each.reshape(n_in // GROUP, 8, WORDS, n_out).astype(jnp.uint32)
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)[None, :, None, None]
    words = (nibbles << shifts).sum(1, dtype=jnp.uint32).reshape(n_in // 8, n_out)
    scales = absmax.reshape(n_out, n_in // BLOCK).T
    return jax.lax.bitcast_convert_type(words, jnp.int32), scales


def unpack(words, scales) -> tuple[Array, Array]:
    """codes (n_in n_out / 2,) uint8, absmax (n_in n_out / 64,) float32: the inverse of `repack`."""
    each = codes_of(words).T.reshape(-1, 2).astype(jnp.uint8)
    return each[:, 0] << 4 | each[:, 1], scales.T.reshape(-1)


def codes_of(words) -> Array:
    """The codes (n_in, n_out) int32, in their order, of words (n_in / 8, n_out) int32."""
    shifts = jnp.arange(0, 32, 4, dtype=jnp.int32)[None, :, None, None]
    nibbles = (words.reshape(-1, 1, WORDS, words.shape[1]) >> shifts) & 15
    return nibbles.reshape(-1, words.shape[1])


# --------------------------------------------------------------------------------------- reference


def weight(words, scales, table) -> Array:
    """w (n_in, n_out) bfloat16 with the kernel's one rounding, which is bitsandbytes'."""
    values = jnp.asarray(_table(table))[codes_of(words)]
    return (values * jnp.repeat(scales, BLOCK, axis=0)).astype(jnp.bfloat16)


def reference(x, words, scales, table, out_dtype=jnp.bfloat16) -> Array:
    """What `matmul` computes, without the kernel; sums in float32, in another order."""
    w = weight(words, scales, table)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(out_dtype)


# ------------------------------------------------------------------------------------------ kernel


def matmul(x, words, scales, table, out_dtype=jnp.bfloat16, interpret=False) -> Array:
    """y = x w, (M, n_in) -> (M, n_out) in `out_dtype`, sums in float32.

    x: (M, n_in) bfloat16. words: (n_in / 8, n_out) int32 and scales: (n_in / 64, n_out) float32 of
    `repack`. table: 16 float32, known when the kernel is compiled. out_dtype: bfloat16 or float32.
    interpret: True or `pltpu.InterpretParams()` where there is no TPU.

    It has been interpreted, and lowered for a TPU, but not yet run on one.
    """
    n_in, n_out = 8 * words.shape[0], words.shape[1]
    rows = x.shape[0]
    _check("words", words, jnp.int32, (n_in // 8, n_out))
    _check("scales", scales, jnp.float32, (n_in // BLOCK, n_out))
    _check("x", x, jnp.bfloat16, (rows, n_in))
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype: {jnp.dtype(out_dtype)}; bfloat16 or float32")
    if why := can_use(rows, n_in, n_out, BLOCK):
        raise ValueError(f"x, words: {why}")

    bm = min(128, math.ceil(rows / 16) * 16)  # bfloat16 comes in tiles of 16 rows
    bk = 2 * GROUP if n_in % (2 * GROUP) == 0 else GROUP
    bn = 256 if n_out % 256 == 0 else 128
    x = jnp.pad(x, ((0, -rows % bm), (0, 0)))
    # 4 scales of a group and an output: as an axis of its own it may be a block of any size.
    scales = scales.reshape(n_in // GROUP, GROUP // BLOCK, n_out)
    y = pl.pallas_call(
        functools.partial(_kernel, table=_table(table)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n_out), out_dtype),
        grid=(x.shape[0] // bm, n_out // bn, n_in // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda m, n, k: (m, k)),
            pl.BlockSpec((bk // 8, bn), lambda m, n, k: (k, n)),
            pl.BlockSpec((bk // GROUP, GROUP // BLOCK, bn), lambda m, n, k: (k, 0, n)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(x, words, scales)
    return y[:rows]


def _kernel(x_ref, words_ref, scales_ref, y_ref, sums_ref, *, table):
    """One (bm, bn) tile of y and one step in k."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    tiles = []
    for group, j in np.ndindex(scales_ref.shape[0], 8):
        words = words_ref[group * WORDS : (group + 1) * WORDS]  # (32, bn)
        scale = scales_ref[group, j * WORDS // BLOCK][None]  # (1, bn)
        values = _select(words >> (4 * j), table)
        tiles.append((values * scale).astype(jnp.bfloat16))
    w = jnp.concatenate(tiles)  # (bk, bn)
    sums_ref[...] += jnp.dot(x_ref[...], w, preferred_element_type=jnp.float32)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _select(codes, table):
    """table[codes & 15], float32, by a tree of selections on one bit after the other."""
    values = [jnp.float32(v) for v in table]
    for bit in range(4):
        on = (codes & (1 << bit)) != 0
        values = [jnp.where(on, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


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
