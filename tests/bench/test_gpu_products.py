"""The 4-bit products of `lorax.bench gpu`: right, told apart from wrong, and lowered for a GPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax.bench.gpu import products, sizes
from lorax.quant import matmul, packed

SMALL = sizes.SMALL
SHAPE = SMALL.kernels[0]


def test_every_path_is_measured_and_right():
    found = {row["path"]: row for row in products.product(SMALL, SHAPE, 16)}
    assert list(found) == ["bf16", matmul.TWO_PASSES, matmul.FUSED]
    for row in found.values():
        assert row["case"] == "product 256 x 256, 16 rows"
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert 0 < row["error"] <= 1 and row["repeats"]


def test_a_wrong_product_is_a_row_that_failed_and_the_others_go_on(monkeypatch):
    right = packed.Packed.fused
    wrong = lambda leaf, x, **options: right(leaf, x, **options).at[3, 7].add(0.5)
    monkeypatch.setattr(packed.Packed, "fused", wrong)
    *others, last = products.product(SMALL, SHAPE, 16)
    assert [row["path"] for row in others] == ["bf16", matmul.TWO_PASSES]
    assert all("ms" in row for row in others) and "ms" not in last
    assert last["failed"].startswith("ArithmeticError: wrong: error ")


def test_more_rows_than_the_kernel_can_are_skipped_with_its_reason():
    last = list(products.product(SMALL, SHAPE, 1100))[-1]
    assert last["skipped"] == "1100 rows, the kernel is for 1 to 1024"


def test_decoding_is_measured_in_both_orders():
    found = {row["path"]: row for row in products.decode(SMALL, SHAPE)}
    assert list(found) == ["order of files", "order of the kernel"]
    moved = 256 * 256 * (0.5 + 4 / 64 + 2)  # a code, its share of a scale, bfloat16
    assert all(row["phases"] == [[moved, 0]] and row["error"] <= 1 for row in found.values())


def test_weights_are_more_than_a_cache_holds_and_all_different():
    leaves = products.coded(SMALL, SHAPE)
    assert sum(leaf.codes.nbytes + leaf.absmax.nbytes for leaf in leaves) >= SMALL.cycled
    assert not np.array_equal(leaves[0].codes, leaves[1].codes)
    for shape in sizes.FULL.kernels:
        each = 0.5625 * shape[0] * shape[1]
        assert products.count(sizes.FULL, shape) * each >= 200e6


@pytest.mark.parametrize("n", [1, 16, 256])
def test_on_a_hopper_gpu_the_timed_program_has_a_kernel_for_each_weight(monkeypatch, n):
    """Lowered for one that is not here."""
    hopper = products.Kernel("gpu", "", {}, 3)
    monkeypatch.setattr(products, "kernel", lambda: hopper)
    products.stored.cache_clear()
    made = {name: make() for name, make in products.paths(SMALL, SHAPE, n).items()}
    products.stored.cache_clear()  # before the next test asks for this device's
    text = {}
    for name, path in made.items():
        run, args = products.program(path, n)
        text[name] = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = text[matmul.FUSED].count("call @_lambda") + text[matmul.FUSED].count("mosaic_gpu")
    assert "mosaic_gpu" in text[matmul.FUSED] and calls >= len(made[matmul.FUSED].leaves)
    assert "mosaic_gpu" not in text[matmul.TWO_PASSES] + text["bf16"]


def test_the_least_time_is_that_of_the_published_rates():
    """4096 x 4096 and 4096 x 11008 at 4.8 TB/s and 790 TFLOP/s, in microseconds, worked by hand."""
    table = {
        (4096, 1): (7.0, 2.0, 16.0), (4096, 256): (10.9, 10.9, 19.8), (4096, 8192): (348, 348, 357),
        (11008, 1): (18.8, 5.3, 42.9), (11008, 2048): (234, 234, 258),
    }  # fmt: skip
    for (n_out, n), want in table.items():
        phases = products.phases((4096, n_out), n)
        each = [phases[path] for path in ("bf16", matmul.FUSED, matmul.TWO_PASSES)]
        least = [sum(max(b / 4.8e12, f / 790e12) for b, f in parts) * 1e6 for parts in each]
        np.testing.assert_allclose(least, want, rtol=0.02)


def test_an_error_is_that_of_float64():
    x = jnp.ones((3, 4), jnp.bfloat16)
    path = products.Path(None, [None], np.ones((4, 2)), 0.0, [])
    y = jnp.full((3, 2), 4, jnp.bfloat16)
    assert products.error(y, x, path) == 0
    assert products.error(y.at[2, 1].set(5), x, path) > 1
    assert products.error(y.at[0, 0].set(jnp.nan), x, path) == np.inf
