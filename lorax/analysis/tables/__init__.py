"""Tables of what members have learned: pandas DataFrames with one row per member and matrix.

Updates are {member: {path: Factors, or dW (in, out)}}. Either all updates of a member have factors
or none has. A "member" is any name: members of several runs and other adapters can be combined if
they use the same paths for their layers. kernels are the frozen (in, out) weights by path;
`base_svds` decomposes each once for all functions that need it, and `update_svds` the updates. With
small matrices, use one BLAS thread (`threadpoolctl`): more threads only wait for each other.
"""

from lorax.analysis.tables.along_training import cka, kept_rank, trajectory
from lorax.analysis.tables.clusters import over_layers
from lorax.analysis.tables.directions import (
    KINDS,
    LEADING,
    Bases,
    angles,
    bases,
    corners,
    leading,
    pairwise,
    similarity,
    update_svds,
)
from lorax.analysis.tables.intervention import Interventions, interventions
from lorax.analysis.tables.learned import has_factors, sensitivity, updates
from lorax.analysis.tables.matrices import (
    SVDs,
    Updates,
    kernel_shape,
    layer_and_target,
    misfit,
    misfit_of,
    shape_of,
    stacks,
)
from lorax.analysis.tables.singular_values import base_spectra, base_svds, spectra
from lorax.analysis.tables.statistics import (
    RESERVED,
    Measured,
    Statistic,
    read_statistics,
    statistics,
)
from lorax.analysis.tables.update import NoBaseError, Update
from lorax.analysis.tables.with_base import against_base, amplifications, intruder_table
from lorax.interop.adapter import shapes_of

__all__ = [
    "KINDS",
    "LEADING",
    "RESERVED",
    "Bases",
    "Interventions",
    "Measured",
    "NoBaseError",
    "SVDs",
    "Statistic",
    "Update",
    "Updates",
    "against_base",
    "amplifications",
    "angles",
    "base_spectra",
    "base_svds",
    "bases",
    "cka",
    "corners",
    "has_factors",
    "interventions",
    "intruder_table",
    "kept_rank",
    "kernel_shape",
    "layer_and_target",
    "leading",
    "misfit",
    "misfit_of",
    "over_layers",
    "pairwise",
    "read_statistics",
    "sensitivity",
    "shape_of",
    "shapes_of",
    "similarity",
    "spectra",
    "stacks",
    "statistics",
    "trajectory",
    "update_svds",
    "updates",
]
