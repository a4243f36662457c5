"""Which start of LoRA is ahead after 25 steps? Each at its best of six rates.

    python -m lorax.run --config=configs/starts_first_steps.py

LoRA-One (arXiv:2502.01235) starts at the leading part of the first full gradient and should be
ahead of LoRA-GA and of the default start early on. Part of experiments/first_gradient.

    --config=configs/starts_first_steps.py:stories
    --config=configs/starts_first_steps.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

STARTS = ("kaiming", "lora-ga", "lora-one")
FACTORS = tuple(2.0**k for k in range(-4, 2))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.rank = 8
    config.train.steps = 25
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.eval.every = 25
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    sweep = config.sweep
    sweep.init = STARTS
    sweep.lr = tuple(two_digits(2 * config.train.lr * factor) for factor in FACTORS)
    sweep.seed = (0, 1, 2, 3, 4, 5)
    return config
