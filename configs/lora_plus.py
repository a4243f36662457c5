"""Should b learn faster than a? LoRA+ (arXiv:2402.12354) at five ratios, each with its own rates.

    python -m lorax.run --config=configs/lora_plus.py

The paper: a ratio of about 16 beats 1. Every ratio has five rates, a factor of two apart; those of
a ratio q are around 1 / sqrt(q) times those of ratio 1, because what is added to W at first goes
with the product of both rates. experiments/lora_plus reads it.

    --config=configs/lora_plus.py:stories
    --config=configs/lora_plus.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0)
FACTORS = tuple(2.0**k for k in range(-2, 3))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.name = "lora+"
    config.method.targets = ("all-linear",)
    config.method.rank = 8
    config.train.steps = 60
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 60
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    lr = config.train.lr / 2
    points = [(q, two_digits(lr * factor / q**0.5)) for q in RATIOS for factor in FACTORS]
    ratios, rates = zip(*points, strict=True)
    sweep = config.sweep
    sweep.axes = {"method.ratio": ratios}
    sweep.lr = rates
    sweep.zip = (("ratio", "lr"),)
    sweep.full_lr = tuple(two_digits(lr * factor) for factor in (0.15, 0.3, 0.6))
    sweep.seed = (0, 1, 2, 3, 4, 5)
    return config
