"""Tables of what members have learned: a row a member and matrix, as a pandas DataFrame.

Updates are {member: {path: Factors}}, and {member: {path: dW (in, out)}} of methods whose update
has no factors. A "member" is any name: members of several runs, or adapters from elsewhere, go
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
from lorax.analysis.tables.learned import adapters, deltas, sensitivity
from lorax.analysis.tables.matrices import Updates, layer_and_target, shape_of, stacks
from lorax.analysis.tables.singular_values import base_spectra, base_svds, spectra
from lorax.analysis.tables.with_base import against_base, amplifications, intruder_table

__all__ = [
    "KINDS",
    "LEADING",
    "Bases",
    "Interventions",
    "Updates",
    "adapters",
    "against_base",
    "amplifications",
    "angles",
    "base_spectra",
    "base_svds",
    "bases",
    "cka",
    "corners",
    "deltas",
    "interventions",
    "intruder_table",
    "layer_and_target",
    "leading",
    "sensitivity",
    "shape_of",
    "similarity",
    "spectra",
    "stacks",
    "trajectory",
]
