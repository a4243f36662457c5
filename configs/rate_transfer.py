"""Does one learning rate serve every rank? AdamW, Muon and LoRA-Muon at three ranks, six rates.

    python -m lorax.run --config=configs/rate_transfer.py

LoRA-Muon (arXiv:2606.12921): one rate serves all ranks, and a proxy of rank 2 finds it. Both
factors start at random, as in the paper. experiments/rate_transfer reads it.

    --config=configs/rate_transfer.py:stories
    --config=configs/rate_transfer.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

#: the middle of an optimiser's rates
MIDDLE = {"adamw": 5e-3, "muon": 1e-2, "lora-muon": 0.16}
FACTORS = tuple(2.0**k for k in range(-3, 3))  # of the rate


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.method.scaling, config.method.alpha = "fixed", 2.0
    config.method.init = "both"
    config.train.steps = 50
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 50
    config.eval.examples = 128
    config.eval.test = 128  # the best rate is chosen by other rows than those that judge it
    factor = config.train.lr / 1e-2
    points = [
        (optimiser, two_digits(middle * factor * f))
        for optimiser, middle in MIDDLE.items()
        for f in FACTORS
    ]
    optimisers, rates = zip(*points, strict=True)
    sweep = config.sweep
    sweep.axes = {"train.optimizer": optimisers}
    sweep.lr = rates
    sweep.zip = (("train.optimizer", "lr"),)
    sweep.rank = (2, 8, 32)
    sweep.seed = (0, 1, 2, 3)
    return config
