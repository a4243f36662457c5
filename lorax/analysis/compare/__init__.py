"""Paired statistics: which settings differ, by how much, and how sure that is.

Settings are trained with the same seeds and measured on the same test rows, so they are compared
within a seed and within a row. Shapes: S settings, K seeds, N rows, R rates. Losses: lower is
better; give the negative of a score. docs/statistics.md states every rule in words.

The model behind all of it: a loss is a mean over two crossed samples, seeds and rows,

    x_kn = mean + seed_k + row_n + rest_kn

(no seed has rows of its own). Its variance is estimated by the mean squares of the two-way layout,
(MS_seed + MS_row - MS_rest) / (K N) (Searle, Casella and McCulloch 1992, Variance Components,
chapter 4; Clark 1973, Journal of Verbal Learning and Verbal Behavior 12, 335 for why both samples
count). Resampling seeds and rows as they are would not do: 3 seeds have 10 different samples, with
(K - 1) / K of the right variance, and the rest counts three times (Owen 2007, The pigeonhole
bootstrap, arXiv:0712.1111). The draws of `bootstrap` have the right variance instead.

How many degrees of freedom? MS_seed has K - 1 = 2 for three seeds, MS_row N - 1, and their shares
of the variance are unknown. `tail` weighs the two t distributions by the estimated shares, as
Cochran and Cox (1957, Experimental Designs) weigh their quantiles. By simulation with 3, 5 and 10
seeds, 100 and 500 rows and all kinds of shares, 95% intervals made so cover 94.9% to 96.5%.
Satterthwaite's degrees of freedom cover 92.2% to 95.5%, Cochran and Cox's mean of quantiles 95.0%
to 97.1%, a plain bootstrap with 1.96 standard errors 75% for three seeds.
"""

from lorax.analysis.compare.as_good import (
    ALPHA,
    SHARE,
    NonInferiority,
    adjusted,
    needed_seeds,
    noninferior,
    power,
)
from lorax.analysis.compare.intervals import (
    DRAWS,
    LEVEL,
    SEEDS,
    Bootstrap,
    Interval,
    bootstrap,
    half_width,
    holm,
    interval,
    of_variances,
    paired,
    quantile,
    tail,
)

__all__ = [
    "ALPHA",
    "DRAWS",
    "LEVEL",
    "SEEDS",
    "SHARE",
    "Bootstrap",
    "Interval",
    "NonInferiority",
    "adjusted",
    "bootstrap",
    "half_width",
    "holm",
    "interval",
    "needed_seeds",
    "noninferior",
    "of_variances",
    "paired",
    "power",
    "quantile",
    "tail",
]
