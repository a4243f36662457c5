"""Figures: tables and arrays in, charts out (`vega.Chart`).

`style` has their colours, markers and dashes, `layout` chooses what of a sweep is drawn how. Their
inputs are what `lorax.analysis.runs`, `lorax.analysis.tables` etc. return.
"""

from lorax.analysis.figures.dimension_curves import intrinsic
from lorax.analysis.figures.frontiers import frontier
from lorax.analysis.figures.lines import (
    cka,
    diagonal,
    intruder_counts,
    kept_rank,
    table7,
    trajectory,
)
from lorax.analysis.figures.loss_curves import learning_curves, rank_curve
from lorax.analysis.figures.loss_maps import setting_map
from lorax.analysis.figures.loss_sizes import size_curve
from lorax.analysis.figures.maps import (
    against_base,
    between_layers,
    figure3,
    figure4,
    layer_grid,
    overlap,
    sensitivity,
    similarity_maps,
)
from lorax.analysis.figures.members import parallel
from lorax.analysis.figures.rank_lines import (
    base_spectrum,
    by_layer,
    by_layer_and_value,
    spectra,
    update_ranks,
)
from lorax.analysis.figures.run_comparison import curves, methods_of_runs
from lorax.analysis.figures.scatter import calibration
from lorax.analysis.figures.vega import Chart

__all__ = [
    "Chart",
    "against_base",
    "base_spectrum",
    "between_layers",
    "by_layer",
    "by_layer_and_value",
    "calibration",
    "cka",
    "curves",
    "diagonal",
    "figure3",
    "figure4",
    "frontier",
    "intrinsic",
    "intruder_counts",
    "kept_rank",
    "layer_grid",
    "learning_curves",
    "methods_of_runs",
    "overlap",
    "parallel",
    "rank_curve",
    "sensitivity",
    "similarity_maps",
    "setting_map",
    "size_curve",
    "spectra",
    "table7",
    "trajectory",
    "update_ranks",
]
