"""Does the instrument find the intrinsic dimension that was planted?

    python -m lorax.run --config=configs/calibration_dimension.py
    python -m lorax.run --config=configs/calibration_dimension.py:noise
    python -m lorax.run --config=configs/calibration_dimension.py --config.search.threshold=0.9

A linear layer with 5 outputs, on inputs that span p dimensions, is trained in random subspaces of
all its 325 parameters. The loss depends on p functionals of the kernel and one of the bias for each
output: d* = 5 (p + 1) = 10, 50 and 200. A subspace of dimension d reaches the share d / d* of the
improvement on average (`lorax.analysis.calibration.dimension`), so d90 is 0.9 d*. The last command
searches for d90.

A minute and a half on two cores. experiments/calibration has the result: 9.5, 50.7 and 204.9, means
of five seeds. A group has one p with all its dimensions and seeds.
"""

from lorax.config import default


def get_config(arg=None):
    if arg not in (None, "noise"):
        raise ValueError(f"{arg!r} is no variant; there is noise")
    config = default()
    config.base = "random:mlp-64-5"
    config.task.name = "planted"
    config.task.examples = 1024
    config.method.name = "subspace"
    config.train.lr = 0.1
    config.train.schedule = "cosine"
    config.train.steps = 600
    config.train.batch_size = 256
    config.train.clip = 0.0
    config.eval.every = 600
    config.eval.batch_size = 1024
    config.eval.examples = 1024
    config.eval.test = 0  # nothing is chosen by these rows: all of them are for the estimates

    sweep = config.sweep
    sweep.inputs = (1, 9, 39)
    sweep.dim = (2, 5, 9, 10, 12, 20, 30, 40, 45, 50, 60, 100, 160, 180, 200, 240)
    sweep.seed = (0, 1, 2, 3, 4)
    if arg == "noise":
        sweep.noise = (0.1, 0.3, 1.0)
    return config
