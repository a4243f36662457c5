"""How does the gap between evaluation and training grow with rank and shrink with data?

    python -m lorax.run --config=configs/generalisation_gap.py

arXiv:2506.14530: the gap goes as sqrt(r / N). LoRA of rank 1, 4 and 16 on 16 to 128 examples, each
at its best rate by halving, five seeds. experiments/generalisation_gap reads it.

    --config=configs/generalisation_gap.py:stories
    --config=configs/generalisation_gap.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

FACTORS = tuple(2.0**k for k in range(-3, 2))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.steps = 120
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 10
    config.eval.examples = 64
    config.eval.test = 0
    sweep = config.sweep
    sweep.rank = (1, 4, 16)
    sweep.n_train = (16, 32, 64, 128)  # each is seen seven times and more
    sweep.lr = tuple(two_digits(config.train.lr * factor) for factor in FACTORS)
    sweep.tune = "lr"
    sweep.seed = (0, 1, 2, 3, 4)
    return config
