"""Is an update of higher rank better at the same number of parameters? Six methods, six seeds.

    python -m lorax.run --config=configs/full_rank_updates.py

RandLoRA (arXiv:2502.00987), HiRA and GraLoRA (arXiv:2505.20355) say so of their updates of high or
full rank. SHiRA trains as many entries of W, at random places: its rank is high, and it has nothing
else. About 8,200 parameters on q and v each (RandLoRA 9,200), at its best of ten rates by halving.
experiments/full_rank_updates reads it.

    --config=configs/full_rank_updates.py:stories
    --config=configs/full_rank_updates.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

#: method, rank and alpha
METHODS = (
    ("lora", 4, 16.0),
    ("gralora", 4, 16.0),
    ("hira", 4, 16.0),
    ("shira", 4, 16.0),
    ("randlora", 16, 320.0),
    ("fourierft", 8, 16.0),  # 1,024 frequencies a matrix
)
FACTORS = tuple(2.0**k for k in range(-3, 7))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.frequencies = 1024
    config.train.steps = 80
    config.train.schedule = "constant"
    config.train.warmup = 5
    config.eval.every = 10
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.alpha = zip(*METHODS, strict=True)
    sweep.zip = (("method", "rank", "alpha"),)
    sweep.lr = tuple(two_digits(config.train.lr * factor) for factor in FACTORS)
    sweep.tune = "lr"
    sweep.seed = (0, 1, 2, 3, 4, 5)
    return config
