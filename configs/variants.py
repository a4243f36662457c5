"""Do LoRA's variants tie once each has its own learning rate? Eight of them, six rates each.

    python -m lorax.run --config=configs/variants.py

Lee et al. (arXiv:2602.04998): variants are within 1 to 2% of LoRA at their best rates, and these
rates follow the largest eigenvalue of the Hessian. experiments/variants_tie reads it.

    --config=configs/variants.py:stories
    --config=configs/variants.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

#: method, start, middle rate over LoRA's
VARIANTS = (
    ("lora", "kaiming", 1),
    ("rslora", "kaiming", 1 / 2),
    ("dora", "kaiming", 1),
    ("lora+", "kaiming", 1 / 4),
    ("lora", "pissa", 1 / 2),
    ("lora", "milora", 1),
    ("lora", "olora", 1 / 4),
    ("lora", "lora-ga", 1 / 2),
)
FACTORS = tuple(2.0**k for k in range(-3, 3))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.method.rank = 8
    config.train.steps = 60
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 60
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    lr = config.train.lr
    points = [
        (method, init, two_digits(lr * middle * factor))
        for method, init, middle in VARIANTS
        for factor in FACTORS
    ]
    sweep = config.sweep
    sweep.method, sweep.init, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "init", "lr"),)
    sweep.full_lr = tuple(two_digits(lr * factor) for factor in (0.075, 0.15, 0.3))
    sweep.seed = (0, 1, 2, 3)
    return config
