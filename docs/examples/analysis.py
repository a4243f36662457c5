"""Two statistics of your own, computed of every update, and the study that draws them.

    python -m lorax.run --config=docs/examples/analysis.py

Claim: an update is no copy of W. Seen as vectors, dW and W are almost at right angles (|cosine|
below 0.05 in every matrix), at each rank. The report has a section, a figure and a column for
either statistic, and analysis/ has condition_number.csv and against_w.csv. Takes three minutes on
two cores.

The same of a run that is there already:

    python -m lorax.report RUN --also docs/examples/analysis.py:condition_number
"""

import numpy as np

from lorax.config import default


def condition_number(update):
    """The largest singular value of dW over the smallest that is not zero."""
    sigma = update.singular_values
    return sigma[0] / sigma[sigma > 1e-6 * sigma[0]][-1]


def against_w(update):
    """The cosine between dW and W, and the size of dW next to that of W."""
    dw, w = np.linalg.norm(update.dw), np.linalg.norm(update.w)
    return {"cosine": np.vdot(update.dw, update.w) / (dw * w), "relative size": dw / w}


def get_config():
    config = default()
    config.train.steps = 100
    config.sweep.rank = (1, 4, 16)
    config.sweep.seed = (0, 1)
    config.analysis.also = (condition_number, against_w)
    return config
