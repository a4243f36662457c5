"""Singular values of an update from its factors, against the dense product."""

import numpy as np

from lorax import analysis
from lorax.bench import timing

SVD_WIDTHS = (768, 1024, 2048, 4096)


def bench_svd(shapes: list[str], rounds: int) -> list[timing.Row]:
    """SVD of an update dW = a @ b from its factors (r = 8 and 64) against numpy's SVD of the dense
    product, both in float64. The first is the fastest of three calls, the second a single call;
    4096 x 4096 takes so long that it gets one round."""
    rows, rng = [], np.random.default_rng(0)
    for n in SVD_WIDTHS:
        for r in (8, 64):
            a, b = rng.standard_normal((n, r)), rng.standard_normal((r, n))
            sides = {
                "factors": timing.timed(lambda a=a, b=b: analysis.factor_svd(a, b)),
                "dense": timing.once(lambda a=a, b=b: np.linalg.svd(a @ b, full_matrices=False)),
            }
            seconds = timing.measure(sides, min(rounds, 1) if n >= 4096 else rounds)
            label = f"SVD of dW, {n} x {n}, r = {r}"
            rows.append(timing.row(label, seconds["factors"], seconds["dense"], "numpy, dense"))
    return rows
