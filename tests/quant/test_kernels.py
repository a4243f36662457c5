"""The 4-bit kernels of accelerators: layouts, decoding and rounding without one, results with one.

The GPU kernel cannot be interpreted. What it is made of is run in NumPy instead, the very functions
that write it; then it is lowered for every class of shapes. Tests marked `gpu` run it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from support import require

from lorax.quant import mosaic, tpu

# NF4 as QLoRA's code has it.
NF4 = np.float32(
    """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0""".split()
)
KERNELS = {"mosaic": mosaic, "tpu": tpu}
U = 2.0**-8  # bfloat16's unit roundoff
ROWS = (1, 16, 64, 128, 256, 512)
SIZES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (4096, 1024))

kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def stored(seed, n_in, n_out):
    """Random codes and scales as bitsandbytes stores them; a few scales are zero, some tiny."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, n_in * n_out // 2, dtype=np.uint8)
    absmax = np.exp(rng.normal(-3, 2, n_in * n_out // 64)).astype(np.float32)
    absmax[rng.random(absmax.size) < 0.05] = 0
    return jnp.asarray(codes), jnp.asarray(absmax)


def exact(codes, absmax, n_in, n_out, table=NF4):
    """w (n_in, n_out) = table scale in float64, element by element of bitsandbytes' order."""
    codes = np.asarray(codes)
    flat = np.empty(n_in * n_out, int)
    flat[0::2], flat[1::2] = codes // 16, codes % 16
    w = np.float64(table)[flat] * np.repeat(np.float64(absmax), 64)
    return w.reshape(n_out, n_in).T


def rows_of(seed, rows, n_in):
    x = np.random.default_rng(seed).standard_normal((rows, n_in))
    return jnp.asarray(x, jnp.bfloat16)


def check_product(y, x, w, relative, out_dtype):
    """y = x w, when weights are off by `relative` of themselves, sums are in float32 and rounded.

    A float32 sum of n terms is off by at most n 2^-24 of their magnitudes (Higham, eq. 3.5); the
    result is then rounded to `out_dtype`.
    """
    x = np.float64(x)
    magnitude = np.abs(x) @ np.abs(w) * (1 + relative)
    bound = magnitude * (relative + len(w) * 2.0**-24)
    bound += (out_dtype == jnp.bfloat16) * U * magnitude + 1e-30
    error = np.abs(np.float64(y) - x @ w)
    assert y.dtype == out_dtype
    assert np.all(error <= bound), np.max(error / bound)


OFF = {mosaic: (1 + U) ** 3 - 1, tpu: U}  # of a weight: three roundings to bfloat16, and one


# ------------------------------------------------------------------------------------------ layout


@kernels
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(((256, 128), (768, 128), (256, 384))), st.integers(0, 2**32 - 1))
def test_repack_is_a_bijection(kernel, sizes, seed):
    n_in, n_out = sizes
    codes, absmax = stored(seed, n_in, n_out)
    words, scales = kernel.repack(codes, absmax, n_in, n_out)
    assert words.dtype == jnp.int32 and words.size == n_in * n_out // 8
    assert scales.dtype == jnp.float32 and scales.shape == (n_in // 64, n_out)
    back = kernel.unpack(words, scales)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], absmax)
    # The other way: any words are some codes'.
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, words.shape, dtype=np.int32)
    again = kernel.repack(*kernel.unpack(jnp.asarray(words), scales), n_in, n_out)
    np.testing.assert_array_equal(again[0], words)


def register(layout, shape, warp, lane, place):
    """Places in a row-major array of `shape` that a thread's register holds, by a tiled layout.

    Tile after tile is split off the last axes; of the axes that come of it some are warps, some
    lanes, one is the register's own elements, and `place` names the register on the others.
    """
    held = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, last = held.shape[: -len(tile)], held.shape[-len(tile) :]
        held = held.reshape(
            *lead, *(n for s, t in zip(last, tile, strict=True) for n in (s // t, t))
        )
        axes = range(len(lead), held.ndim)
        held = held.transpose(*range(len(lead)), *axes[::2], *axes[1::2])
    at = [*place, *[0] * (held.ndim - len(place))]
    at[layout.warp_dims[0]] = warp
    lanes = np.unravel_index(lane, [held.shape[d] for d in layout.lane_dims])
    for axis, index in zip(layout.lane_dims, lanes, strict=True):
        at[axis] = index
    at[layout.vector_dim] = slice(None)
    return held[tuple(at)]


def permute(a, b, selectors):
    """PRMT of PTX in its default mode, on uint32: bytes of b above those of a."""
    both = np.uint64(b) << np.uint64(32) | np.uint64(a)
    out = np.zeros(np.broadcast(both, selectors).shape, np.uint64)
    for i in range(4):
        selector = np.uint64(selectors) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (np.uint64(8) * (selector & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        out |= np.where(selector >= 8, sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def decoded(words, table):
    """`mosaic.decode` in NumPy: uint32 words -> bfloat16 bits (*words.shape, 4, 2)."""
    planes = [[np.uint32(word) for word in plane] for plane in mosaic.planes(table)]
    pairs = np.stack(mosaic.decode(words, planes, permute), axis=-1)
    return np.stack([pairs & 0xFFFF, pairs >> 16], axis=-1).astype(np.uint16)


def bits(x):
    """bfloat16 -> uint16."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


@pytest.mark.parametrize("seed", range(4))
def test_permutations_decode_every_code_to_the_bit(seed):
    rng = np.random.default_rng(seed)
    table = NF4 if seed == 0 else rng.normal(size=16).astype(np.float32)
    words = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    codes = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(-1, 4, 2)
    np.testing.assert_array_equal(decoded(words, table), bits(table)[codes])


def test_permutations_decode_every_pair_of_neighbours():
    words = np.uint32([a | b << shift for shift in (4, 28) for a in range(16) for b in range(16)])
    codes = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(-1, 4, 2)
    np.testing.assert_array_equal(decoded(words, NF4), bits(NF4)[codes])


@pytest.mark.parametrize("k", (64, 128, 256))
def test_a_thread_decodes_the_weights_that_wgmma_takes_from_it(k):
    """All of a warpgroup's registers, against PTX's figure of operand A of wgmma.m64nNk16.

    There register 2 i + rows of a tile of 16 columns holds, in lane l of warp w, row
    16 w + l // 4 + 8 rows and columns 8 i + 2 (l % 4) + (0, 1).
    """
    n_in, n_out = 256, 128
    codes, absmax = stored(k, n_in, n_out)
    words, _ = mosaic.repack(codes, absmax, n_in, n_out)
    words = np.asarray(words).view(np.uint32)[:64, : k // 8]
    want = bits(NF4)[np.asarray(mosaic.codes_of(words.view(np.int32)))]
    plain = exact(codes, np.ones_like(absmax), n_in, n_out, np.arange(16))  # codes, their order
    np.testing.assert_array_equal(want, bits(NF4)[plain.T[:64, :k].astype(int)])

    weights = np.zeros((64, k), np.uint16)
    seen = np.zeros((64, k), int)
    layout, wgmma = mosaic._WORDS.to_mgpu(), plgpu.Layout.WGMMA.to_mgpu()
    for warp, lane, i in np.ndindex(4, 32, k // 64):
        for source, places in mosaic.register_moves(i):
            (at,) = register(layout, words.shape, warp, lane, source)
            values = decoded(words.reshape(-1)[at], NF4)
            for place, value in zip(places, values, strict=True):
                _, column, _, _, rows = place
                row, columns = 16 * warp + lane // 4 + 8 * rows, 8 * column + 2 * (lane % 4)
                columns = [columns, columns + 1]
                held = np.unravel_index(register(wgmma, (64, 64), warp, lane, place), (64, 64))
                np.testing.assert_array_equal(held, [[row, row], columns])
                weights[row, 64 * i + np.array(columns)] = value
                seen[row, 64 * i + np.array(columns)] += 1
    assert np.all(seen == 1)
    np.testing.assert_array_equal(weights, want)


# --------------------------------------------------------------------------------------- reference


@kernels
def test_weights_are_rounded_as_the_kernel_says(kernel):
    """Off the exact product by three roundings or by one, and one is bitsandbytes' to the bit."""
    codes, absmax = stored(1, 768, 256)
    w = kernel.weight(*kernel.repack(codes, absmax, 768, 256), NF4)
    true = exact(codes, absmax, 768, 256)
    assert w.dtype == jnp.bfloat16
    error = np.abs(np.float64(w) - true)
    assert np.all(error <= OFF[kernel] * np.abs(true))
    one = jnp.asarray(np.float32(true)).astype(
        jnp.bfloat16
    )  # table scale in float32, then bfloat16
    assert np.all(np.abs(np.float64(w) - np.float64(one)) <= (OFF[kernel] + U) * np.abs(true))
    if kernel is tpu:
        np.testing.assert_array_equal(bits(w), bits(one))


@kernels
@pytest.mark.parametrize("out_dtype", (jnp.bfloat16, jnp.float32))
def test_reference_is_the_product_of_decoded_weights(kernel, out_dtype):
    codes, absmax = stored(2, 1024, 256)
    x = rows_of(3, 5, 1024)
    words, scales = kernel.repack(codes, absmax, 1024, 256)
    y = kernel.reference(x, words, scales, NF4, out_dtype)
    check_product(y, x, exact(codes, absmax, 1024, 256), OFF[kernel], out_dtype)


@kernels
def test_weights_are_those_of_bitsandbytes(kernel):
    torch, functional = require("torch"), require("bitsandbytes").functional
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(384, 512)).astype(np.float32))
    codes, state = functional.quantize_4bit(w.bfloat16(), blocksize=64, quant_type="nf4")
    stored = [jnp.asarray(t.numpy()) for t in (codes.reshape(-1), state.absmax)]
    theirs = functional.dequantize_4bit(codes, state).float().numpy().T
    ours = np.float32(kernel.weight(*kernel.repack(*stored, 512, 384), state.code.numpy()))
    if kernel is tpu:
        np.testing.assert_array_equal(ours, theirs)
    assert np.all(np.abs(ours - theirs) <= (OFF[kernel] + 2 * U) * np.abs(theirs))


# -------------------------------------------------------------------------------------- TPU kernel


@pytest.mark.parametrize("interpret", (True, pltpu.InterpretParams()), ids=("plain", "tpu"))
@pytest.mark.parametrize(
    "rows, n_in, n_out", ((1, 1024, 256), (16, 256, 128), (100, 768, 384), (256, 1024, 256))
)
def test_tpu_kernel_interpreted(rows, n_in, n_out, interpret):
    codes, absmax = stored(rows, n_in, n_out)
    x = rows_of(rows, rows, n_in)
    words, scales = tpu.repack(codes, absmax, n_in, n_out)
    true = exact(codes, absmax, n_in, n_out)
    y = tpu.matmul(x, words, scales, NF4, jnp.float32, interpret=interpret)
    check_product(y, x, true, U, jnp.float32)
    # The reference has the same weights to the bit: only the order of the sums differs.
    reference = np.float64(tpu.reference(x, words, scales, NF4, jnp.float32))
    magnitude = np.abs(np.float64(x)) @ np.abs(true) * (1 + U)
    assert np.all(np.abs(y - reference) <= 2 * n_in * 2.0**-24 * magnitude + 1e-30)


def test_tpu_kernel_rounds_its_sums_once():
    codes, absmax = stored(0, 512, 128)
    words, scales = tpu.repack(codes, absmax, 512, 128)
    x = rows_of(0, 8, 512)
    y, sums = (
        tpu.matmul(x, words, scales, NF4, dtype, interpret=True)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_array_equal(bits(y), bits(sums))


# ---------------------------------------------------------------------------------------- lowering


def lowered(product, platform, rows, n_in, words, n_out):
    x = jax.ShapeDtypeStruct((rows, n_in), jnp.bfloat16)
    words = jax.ShapeDtypeStruct(words, jnp.int32)
    scales = jax.ShapeDtypeStruct((n_in // 64, n_out), jnp.float32)
    return jax.jit(product).trace(x, words, scales).lower(lowering_platforms=(platform,)).as_text()


def cuda(rows, n_in, n_out, **settings):
    product = functools.partial(mosaic.matmul, table=NF4, **settings)
    return lowered(product, "cuda", rows, n_in, (n_out, n_in // 8), n_out)


@pytest.mark.parametrize("n_in, n_out", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_mosaic_kernel_lowers_for_a_gpu(rows, n_in, n_out):
    assert not mosaic.can_use(rows, n_in, n_out, 64)
    text = cuda(rows, n_in, n_out)
    assert "mosaic_gpu" in text and f"{rows}x{n_out}xbf16" in text


@pytest.mark.parametrize("rows", (3, 9, 100, 1000))
def test_mosaic_kernel_lowers_for_rows_that_fill_no_block(rows):
    assert f"{rows}x1024xbf16" in cuda(rows, 4096, 1024)


@pytest.mark.parametrize("out_dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize(
    "rows, k", ((8, 128), (16, 256), (32, 64), (64, 256), (128, 128), (256, 64))
)
def test_mosaic_kernel_lowers_for_every_cut(rows, k, parts, out_dtype):
    text = cuda(256, 4096, 256, out_dtype=out_dtype, cut=mosaic.Blocks(rows, k, parts, 3))
    kind = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[out_dtype]
    assert "mosaic_gpu" in text and f"256x256x{kind}" in text


@pytest.mark.parametrize("rows, n_in, n_out", [(r, *s) for r in ROWS for s in SIZES[:3]])
def test_tpu_kernel_lowers_for_a_tpu(rows, n_in, n_out):
    product = functools.partial(tpu.matmul, table=NF4)
    text = lowered(product, "tpu", rows, n_in, (n_in // 8, n_out), n_out)
    assert "tpu_custom_call" in text


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1024), st.integers(2, 256), st.integers(1, 256))
def test_every_product_has_a_cut(rows, ins, outs):
    """Of steps that a pipeline can hold, that fit shared memory and leave no part of k empty."""
    n_in, n_out = 128 * ins, 128 * outs
    assert not mosaic.can_use(rows, n_in, n_out, 64)
    cut = mosaic.blocks(rows, n_in, n_out)
    assert n_in % cut.k == 0 and cut.k % 64 == 0 and cut.rows in (8, 16, 32, 64, 128, 256)
    assert cut.rows >= rows or rows > 64
    assert n_in // cut.k >= cut.parts * cut.stages and cut.stages >= 2
    steps = [(part * (n_in // cut.k)) // cut.parts for part in range(cut.parts + 1)]
    assert steps[-1] * cut.k == n_in and min(np.diff(steps)) >= cut.stages
    copied = cut.rows * cut.k * 2 + 128 * cut.k // 2 + 128 * cut.k // 64 * 4
    assert cut.stages * copied + 2 * min(cut.rows, 64) * 64 * 4 < 227 * 1024


# ---------------------------------------------------------------------------------------- refusals


@kernels
@pytest.mark.parametrize(
    "sizes, phrase",
    (
        ((1, 1024, 1024, 128), "blocks of 128 weights"),
        ((1, 1000, 1024, 64), "1000 inputs"),
        ((1, 128, 1024, 64), "128 inputs"),
        ((1, 1024, 1000, 64), "1000 outputs"),
        ((1025, 1024, 1024, 64), "1025 rows"),
        ((0, 1024, 1024, 64), "0 rows"),
    ),
)
def test_can_use_says_why_not(kernel, sizes, phrase):
    assert kernel.can_use(2, 1024, 1024, 64) == ""
    assert phrase in kernel.can_use(*sizes)


@kernels
def test_wrong_operands_are_named(kernel):
    codes, absmax = stored(0, 256, 128)
    with pytest.raises(ValueError, match="codes: int32"):
        kernel.repack(codes.astype(jnp.int32), absmax, 256, 128)
    with pytest.raises(ValueError, match="absmax: float32 \\(511,\\); float32 \\(512,\\)"):
        kernel.repack(codes, absmax[1:], 256, 128)
    with pytest.raises(ValueError, match="n_in, n_out: 64 inputs"):
        kernel.repack(codes[: 64 * 64], absmax[:128], 64, 128)
    words, scales = kernel.repack(codes, absmax, 256, 128)
    x = rows_of(0, 2, 256)
    for operands, phrase in (
        ((x.astype(jnp.float32), words, scales, NF4), "x: float32"),
        ((x[:, :128], words, scales, NF4), "x: bfloat16"),
        ((x, words.astype(jnp.uint32), scales, NF4), "words: uint32"),
        ((x, words, scales.T, NF4), "scales: float32"),
        ((x, words, scales, NF4[:15]), "table: shape"),
        ((x, words, scales, NF4, jnp.float16), "out_dtype: float16"),
    ):
        with pytest.raises(ValueError, match=phrase):
            kernel.matmul(*operands)


def test_hopper_is_a_gpu_of_compute_capability_9_0():
    class Device:
        def __init__(self, platform, capability):
            self.platform, self.compute_capability = platform, capability

    found = [mosaic.hopper(Device("gpu", c)) for c in ("8.0", "9.0", "10.0")]
    assert found == [False, True, False]
    assert not mosaic.hopper(jax.devices("cpu")[0])


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("n_in, n_out", ((4096, 4096), (11008, 256), (1408, 384)))
@pytest.mark.parametrize("rows", (1, 3, 8, 9, 16, 64, 100, 128, 256, 1000))
def test_mosaic_kernel_on_a_gpu(rows, n_in, n_out, out_dtype):
    require_hopper()
    codes, absmax = stored(rows, n_in, n_out)
    x = rows_of(rows, rows, n_in)
    product = jax.jit(functools.partial(mosaic.matmul, table=NF4, out_dtype=out_dtype))
    y = product(x, *mosaic.repack(codes, absmax, n_in, n_out))
    check_product(y, x, exact(codes, absmax, n_in, n_out), OFF[mosaic], out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize(
    "rows, k", ((8, 128), (16, 256), (32, 64), (64, 256), (128, 128), (256, 64))
)
def test_mosaic_kernel_on_a_gpu_for_every_cut(rows, k, parts):
    """Sums of a few products are exact in float32, so that any cut gives the same bits."""
    require_hopper()
    codes, _ = stored(k, 4096, 256)
    x = jnp.round(rows_of(rows, 256, 4096))
    table = jnp.arange(-8, 8, dtype=jnp.float32)
    words, scales = mosaic.repack(codes, jnp.full(4096 * 256 // 64, 0.5), 4096, 256)
    cut = mosaic.Blocks(rows, k, parts, 3)
    product = jax.jit(lambda *a: mosaic.matmul(*a, np.asarray(table), jnp.float32, cut))
    want = np.float64(x) @ exact(codes, np.full(4096 * 256 // 64, 0.5), 4096, 256, table)
    for _ in range(5):
        np.testing.assert_array_equal(product(x, words, scales), want)


def require_hopper():
    if not any(mosaic.hopper(device) for device in jax.devices()):
        pytest.skip("no Hopper GPU")
