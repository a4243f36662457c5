"""The update of one matrix, and numbers computed from it."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorax import spectrum
from lorax.analysis.tables.matrices import layer_and_target, shape_of
from lorax.interop.peft import Factors


class NoBaseError(Exception):
    """A statistic needs the base's kernel, which is not available; says why."""


@dataclass(frozen=True, eq=False)
class Update:
    """The update dW (in, out) of one matrix of one member.

    Everything else is computed from these once, on first use.

    Attributes:
      member: its member's number or name.
      path: the matrix, "h/0/attn/q".
      given: its `Factors` (a (in, r), b (r, out), s), or dW itself (in, out).
      kernel: the base's frozen kernel (in, out), or None.
      no_kernel: why there is no kernel.
      sigma: dW's singular values, if already known.
    """

    member: Hashable
    path: str
    given: Factors | np.ndarray
    kernel: np.ndarray | None = None
    no_kernel: str = "no base was given"
    sigma: np.ndarray | None = None

    @property
    def layer(self) -> int:
        """The number of the matrix's layer, from 0; -1 for one outside all layers (an
        embedding)."""
        return layer_and_target(self.path)[0]

    @property
    def target(self) -> str:
        """The last word of its path: "q"."""
        return layer_and_target(self.path)[1]

    @property
    def factors(self) -> Factors | None:
        """a (in, r), b (r, out), float32, and s: dW = s * a @ b. None for an update without
        factors."""
        return self.given if isinstance(self.given, Factors) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return shape_of(self.given)[:2]

    @property
    def rank(self) -> int:
        """The r of its factors; without factors min(in, out)."""
        return self.factors.a.shape[1] if self.factors else min(self.shape)

    @property
    def scale(self) -> float:
        """The s of its factors; 1 without factors."""
        return self.factors.s if self.factors else 1.0

    @cached_property
    def dw(self) -> np.ndarray:
        """dW (in, out), float64."""
        if self.factors is None:
            return np.asarray(self.given, np.float64)
        a, b, s, _ = self.factors
        return s * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))

    @cached_property
    def svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u (in, k), sigma (k,) and vt (k, out), thin, float64."""
        return spectrum.update_svd(tuple(self.factors) if self.factors else self.given)

    @cached_property
    def singular_values(self) -> np.ndarray:
        """(k,), descending: k = min(r, in, out) of factors, min(in, out) without."""
        if self.sigma is not None:
            return self.sigma
        if self.factors is None:
            return np.linalg.svd(self.dw, compute_uv=False)
        return self.svd[1]

    @cached_property
    def w(self) -> np.ndarray:
        """The base's frozen kernel (in, out), float64. Raises `NoBaseError` if it isn't
        available."""
        if self.kernel is None:
            raise NoBaseError(self.no_kernel)
        return np.asarray(self.kernel, np.float64)


# ---------------------------------------------------------------------- lorax's own statistics


def norm(update: Update) -> float:
    """||dW||_F."""
    return np.linalg.norm(update.singular_values)


def effective(update: Update) -> float:
    """The effective rank (Roy & Vetterli 2007)."""
    return spectrum.effective_rank(update.singular_values)


def stable(update: Update) -> float:
    """The stable rank."""
    return spectrum.stable_rank(update.singular_values)


def energy90(update: Update) -> int:
    """The fewest singular values that hold 90% of the energy."""
    return spectrum.energy_rank(update.singular_values, 0.9)


def numerical(update: Update) -> int:
    """The numerical rank, at the rounding of float32."""
    return spectrum.numerical_rank(update.singular_values, update.shape)


BUILT_IN = (norm, effective, stable, energy90, numerical)  # columns of analysis/ranks.csv
