"""Does the intrinsic dimension depend on the optimiser? d90 of digits under Adam and under SGD.

    python -m lorax.run --config=configs/dimension_optimiser.py:adamw
    python -m lorax.run --config=configs/dimension_optimiser.py:sgd

Li et al. (arXiv:1804.08838) measure d90 with either. SGD does not see how the random subspace is
rotated, Adam does. Every dimension and full fine-tuning have five rates of their own, a factor of
two apart, and eight seeds. experiments/dimension_optimiser reads both runs.
"""

from lorax.config import default

#: rates of a subspace, and of full fine-tuning
RATES = {
    "adamw": ((0.02, 0.04, 0.08, 0.16, 0.32), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "sgd": ((0.125, 0.25, 0.5, 1.0, 2.0), (0.025, 0.05, 0.1, 0.2, 0.4)),
}


def get_config(arg=None):
    arg = arg or "adamw"
    if arg not in RATES:
        raise ValueError(f"{arg!r} is no optimiser of this study; there is {', '.join(RATES)}")
    config = default()
    config.base = "random:mlp-64-64-64-10"  # 8,970 parameters
    config.task.name = "digits"
    config.method.name = "subspace"
    config.train.optimizer = arg
    config.train.batch_size = 64
    config.train.steps = 600
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.train.clip = 0.0
    config.eval.every = 600
    config.eval.examples = 10_000  # all
    config.eval.test = 0
    config.eval.batch_size = 64
    config.sweep.dim = (57, 80, 113, 160, 226, 320)  # sqrt 2 apart
    config.sweep.lr, config.sweep.full_lr = RATES[arg]
    config.sweep.seed = tuple(range(8))
    return config
