"""Taking learned updates apart: spectra, subspaces, amplification. numpy only, no training code."""

from lorax.analysis.amplification import Amplification, amplification
from lorax.analysis.spectrum import (
    effective_rank,
    energy_rank,
    factor_svd,
    numerical_rank,
    stable_rank,
)
from lorax.analysis.subspace import (
    Band,
    basis_similarity,
    expected_similarity,
    gaussian_similarity,
    output_similarity,
    subspace_similarity,
    update_similarity,
)

__all__ = [
    "Amplification",
    "Band",
    "amplification",
    "basis_similarity",
    "effective_rank",
    "energy_rank",
    "expected_similarity",
    "factor_svd",
    "gaussian_similarity",
    "numerical_rank",
    "output_similarity",
    "stable_rank",
    "subspace_similarity",
    "update_similarity",
]
