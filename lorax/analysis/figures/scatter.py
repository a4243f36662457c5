"""The figure of a calibration: estimates against the planted truth."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lorax.analysis.calibration import ESTIMATORS
from lorax.analysis.figures.style import COLOURS, MARKERS, REFERENCE, STYLE, panels, pick

COLUMNS = 4
ZERO = 0.5  # where zero is drawn on a logarithmic axis


def calibration(estimates: pd.DataFrame) -> Figure:
    """Estimate against truth, one panel per estimator, on logarithmic axes with the line of
    agreement. Noise levels differ in colour and marker and are drawn side by side; every seed is a
    point. estimates: from `calibration.estimates`, not empty."""
    names = [name for name in ESTIMATORS if name in set(estimates["estimator"])]
    noises = sorted(set(estimates["noise"]))
    columns = min(COLUMNS, len(names))
    with matplotlib.rc_context(STYLE):
        figure, grid = panels(len(names), columns, (0.8, 1.0), (2.3, 2.2))
        for axes, name in zip(grid, names, strict=True):
            of_estimator = estimates[estimates["estimator"] == name]
            unit = "d*" if of_estimator["quantity"].iloc[0] == "dimension" else "r*"
            levels = [noise for noise in noises if noise in set(of_estimator["noise"])]
            for i, noise in enumerate(levels):
                of_noise = of_estimator[
                    (of_estimator["noise"] == noise) & of_estimator["estimate"].notna()
                ]
                n, shift = noises.index(noise), 1.07 ** (i - (len(levels) - 1) / 2)
                axes.plot(
                    of_noise["truth"].clip(lower=ZERO) * shift,
                    of_noise["estimate"].clip(lower=ZERO),
                    linestyle="",
                    marker=pick(MARKERS, n),
                    color=pick(COLOURS, n),
                    fillstyle="none",
                    label=f"noise {noise:g}",
                )
            _square(axes, of_estimator)
            axes.set_title(name)
            axes.set_xlabel(f"planted {unit}")
            axes.set_ylabel(f"estimate of {unit}")
        shown = {  # not every panel has every noise level
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        names = [*(f"noise {noise:g}" for noise in noises), "truth"]
        handles = [shown[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        return figure


def _square(axes, estimates: pd.DataFrame) -> None:
    """The same range on both axes, ticks at the planted values and at doublings of the largest, and
    the line of agreement."""
    truths = sorted(set(estimates["truth"].clip(lower=ZERO)))
    values = np.concatenate([truths, estimates["estimate"].dropna().clip(lower=ZERO)])
    low, high = values.min() / 1.4, values.max() * 1.4
    ticks = truths + [truths[-1] * 2**n for n in range(1, 12) if truths[-1] * 2**n < high]
    axes.plot([low, high], [low, high], label="truth", **REFERENCE)
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == ZERO else f"{x:g}"))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
