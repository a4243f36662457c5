"""Analysis of learned updates: spectra, subspaces, amplification, intruders; CKA of activations.

No training code; all arithmetic is numpy.
"""

from lorax.analysis.measures.amplification import Amplification, amplification
from lorax.analysis.measures.cka import linear_cka
from lorax.analysis.measures.drift import spectral_drift
from lorax.analysis.measures.intruders import (
    Intervention,
    Intruders,
    intervene,
    intruders,
    norm_matched,
)
from lorax.analysis.measures.overlap import (
    Band,
    basis_similarity,
    chance_similarity,
    expected_similarity,
    output_similarity,
    principal_angles,
    subspace_similarity,
    update_similarity,
)
from lorax.lanczos import Largest, largest_eigenvalues
from lorax.spectrum import (
    RandomisedSVD,
    effective_rank,
    energy_rank,
    factor_svd,
    leading_svd,
    numerical_rank,
    randomised_svd,
    stable_rank,
    update_svd,
)

__all__ = [
    "Amplification",
    "Band",
    "Intervention",
    "Intruders",
    "Largest",
    "RandomisedSVD",
    "amplification",
    "basis_similarity",
    "chance_similarity",
    "effective_rank",
    "energy_rank",
    "expected_similarity",
    "factor_svd",
    "intervene",
    "intruders",
    "largest_eigenvalues",
    "leading_svd",
    "linear_cka",
    "norm_matched",
    "numerical_rank",
    "output_similarity",
    "principal_angles",
    "randomised_svd",
    "spectral_drift",
    "stable_rank",
    "subspace_similarity",
    "update_similarity",
    "update_svd",
]
