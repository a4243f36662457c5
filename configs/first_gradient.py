"""Does LoRA's a turn to the leading directions of the first full gradient?

    python -m lorax.run --config=configs/first_gradient.py

LoRA-One (arXiv:2502.01235): from a small start the span of a does so under gradient descent. A
small s makes a small start: with s = 1/64 the factors must grow to eight times what s = 1 asks for.
Gradient descent without momentum and AdamW, ranks 1, 4 and 16, each at its best of five rates.
experiments/first_gradient reads it, and configs/starts_first_steps.py.

    --config=configs/first_gradient.py:stories
    --config=configs/first_gradient.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

SCALES = (1.0, 1 / 64)  # s
#: gradient descent's rates times s; AdamW's times sqrt(s), over the usual one
DESCENT, ADAMW = (1 / 256, 1 / 64, 1 / 16, 0.25, 1.0), (0.5, 1.0, 2.0, 4.0, 8.0)


def get_config(arg=None):
    config = scale(arg)
    config.method.scaling = "fixed"  # s = alpha
    config.train.steps = 60
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.train.clip = 0.0  # the steps of gradient descent are its gradients
    config.eval.every = 15
    config.eval.examples = 64
    config.eval.test = 0
    config.analysis.trajectory = config.analysis.first_gradient = True
    points = [
        (optimiser, momentum, s, two_digits(rate))
        for s in SCALES
        for optimiser, momentum, rates in (
            ("sgd", 0.0, [x / s for x in DESCENT]),
            ("adamw", 0.9, [config.train.lr * x / s**0.5 for x in ADAMW]),
        )
        for rate in rates
    ]
    optimisers, momenta, scales, rates = zip(*points, strict=True)
    sweep = config.sweep
    sweep.axes = {"train.optimizer": optimisers, "train.b1": momenta}
    sweep.alpha, sweep.lr = scales, rates
    sweep.zip = (("train.optimizer", "train.b1", "alpha", "lr"),)
    sweep.rank = (1, 4, 16)
    sweep.seed = (0, 1, 2, 3)
    return config
