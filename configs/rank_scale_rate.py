"""Rank, scale, rate and start in one grid: how does the best learning rate move?

    python -m lorax.run --config=configs/rank_scale_rate.py

Four claims read this run. experiments/rate_over_rank (arXiv:2602.06204): with s ~ r^-g the best
rate goes as r^-(1-g)/2 if a starts random, not at all if b does. experiments/alpha_or_rate
(arXiv:2606.12883): at a small rate the best alpha goes as sqrt(r), and beats the best rate at alpha
= r. experiments/start_a_or_b (arXiv:2406.08447): a random a allows a larger rate than a random b.
experiments/rank_at_tuned_rate (arXiv:2312.03732): at s = alpha / sqrt(r) the loss falls with r.

    --config=configs/rank_scale_rate.py:stories
    --config=configs/rank_scale_rate.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

#: r, s: s = 16 / r (g = 1), sqrt(32 / r) (g = 1/2) and 2 (g = 0), which meet at r = 8
CELLS = ((2, 8.0), (2, 4.0), (2, 2.0), (8, 2.0), (32, 0.5), (32, 1.0), (32, 2.0))
ALPHA_IS_R = ((2, 1.0), (8, 1.0))  # and r = 32 above
SCALES_AT_SMALL_RATE = tuple(2.0**k for k in range(2, 9))
FACTORS = tuple(2.0**k for k in range(-3, 3))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.method.scaling = "fixed"  # s = alpha
    config.train.steps = 60
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 60
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    lr = config.train.lr
    rates = [two_digits(lr * factor) for factor in FACTORS]
    points = [("kaiming", r, s, rate) for r, s in (*CELLS, *ALPHA_IS_R) for rate in rates]
    points += [("kaiming", r, s, rates[0]) for r in (2, 8, 32) for s in SCALES_AT_SMALL_RATE]
    of_b = [rates[0] / 4, rates[1] / 4, *rates]  # the best of b are smaller
    points += [("init-b", r, s, two_digits(rate)) for r, s in CELLS for rate in of_b]
    sweep = config.sweep
    sweep.init, sweep.rank, sweep.alpha, sweep.lr = zip(*dict.fromkeys(points), strict=True)
    sweep.zip = (("init", "rank", "alpha", "lr"),)
    sweep.seed = (0, 1, 2, 3)
    return config
