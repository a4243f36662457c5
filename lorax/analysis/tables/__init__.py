"""Tables of what members have learned: a row a member and matrix, as a pandas DataFrame.

Updates are {member: {path: Factors, or dW (in, out)}}: of a member all have factors, or none has. A
"member" is any name: members of several runs, or adapters from elsewhere, go
together as long as they call their layers by the same paths. kernels are the frozen (in, out)
weights by path; `base_svds` decomposes each once for all that asks for it. Small matrices want one
thread of the linear algebra (`threadpoolctl`): more of them only wait for each other.
"""

from lorax.analysis.tables.along_training import cka, trajectory
from lorax.analysis.tables.directions import (
    KINDS,
    LEADING,
    Bases,
    angles,
    bases,
    corners,
    leading,
    similarity,
)
from lorax.analysis.tables.intervention import Interventions, interventions
from lorax.analysis.tables.learned import has_factors, sensitivity, updates
from lorax.analysis.tables.matrices import Updates, layer_and_target, shape_of, stacks
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

__all__ = [
    "KINDS",
    "LEADING",
    "RESERVED",
    "Bases",
    "Interventions",
    "Measured",
    "NoBaseError",
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
    "layer_and_target",
    "leading",
    "read_statistics",
    "sensitivity",
    "shape_of",
    "similarity",
    "spectra",
    "stacks",
    "statistics",
    "trajectory",
    "updates",
]
