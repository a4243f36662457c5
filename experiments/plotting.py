"""The style of the figures of experiments/, which matplotlib draws."""

from collections.abc import Sequence

# Okabe & Ito's palette, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)), "-")
GREY = "0.45"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def line_style(n: int) -> dict:
    """Colour, marker and dash of the nth line; each of them identifies it."""
    pick = lambda choices: _nth(choices, n)
    return {"color": pick(COLOURS), "marker": pick(MARKERS), "linestyle": pick(DASHES)}


def _nth(choices: Sequence, n: int):
    """The nth choice; after the last, the first again."""
    return choices[n % len(choices)]
