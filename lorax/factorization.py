"""How LoKr divides the size of a matrix in two: as PEFT does (tuners/lokr/layer.py)."""

import math


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size: m is `factor` if that divides size, otherwise the largest divisor up
    to `factor` and the square root; -1: up to the square root. As PEFT's function of this name.

    Raises ValueError for a factor that is neither positive nor -1.
    """
    if factor < 1 and factor != -1:
        raise ValueError(f"method.factor: {factor} given, must be at least 1, or -1 for the root")
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max(d for d in range(1, most + 1) if size % d == 0)
    return m, size // m
