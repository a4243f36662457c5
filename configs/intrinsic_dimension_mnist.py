"""The intrinsic dimension of MNIST: published d90 is 750 (fully connected) and 290 (LeNet).

    python -m lorax.run --config=configs/intrinsic_dimension_mnist.py \\
        --config.task.path=mnist.npz

After Li et al. 2018 (arXiv:1804.08838), sections 3.1 and 3.2: both networks on plain and on
shuffled pixels. With shuffled pixels the fully connected one needs no more, LeNet 1,400. `:width`
has fully connected networks with 2 hidden layers of 50 to 400 units, `:depth` those with 1 to 5
layers of 200, `:grid` all combinations: over these 20 networks the number of parameters differs by
a factor of 24, d90 by 1.33 (figure 3). The first command needs no path if LORAX_DATA names a folder
with mnist/mnist.npz in it.

    python -m lorax.run --config=configs/intrinsic_dimension_mnist.py:width
    python -m lorax.run --config=configs/intrinsic_dimension_mnist.py:depth
    python -m lorax.run --config=configs/intrinsic_dimension_mnist.py:grid

36 minutes on two cores. Expected: 514, shuffled 519; LeNet 230, shuffled 723
(experiments/intrinsic_dimension).
"""

import os

from lorax.config import default

WIDTHS = (50, 100, 200, 400)
DEPTHS = (1, 2, 3, 4, 5)  # hidden layers


def mlp(width, depth):
    return "-".join(map(str, ("random:mlp", 784, *[width] * depth, 10)))


#: argument -> (bases, whether pixels are shuffled)
VARIANTS = {
    None: (("random:mnist-fc", "random:mnist-lenet"), (False, True)),
    "width": (tuple(mlp(width, 2) for width in WIDTHS), ()),
    "depth": (tuple(mlp(200, depth) for depth in DEPTHS), ()),
    "grid": (tuple(mlp(width, depth) for width in WIDTHS for depth in DEPTHS), ()),
}


def get_config(arg=None):
    if arg not in VARIANTS:
        known = ", ".join(filter(None, VARIANTS))
        raise ValueError(f"configs/intrinsic_dimension_mnist.py:{arg}: one of {known} is expected")
    config = default()
    config.task.name = "mnist"
    data = os.environ.get("LORAX_DATA")
    config.task.path = os.path.join(data, "mnist", "mnist.npz") if data else None
    config.method.name = "subspace"
    config.train.batch_size = 128
    config.train.steps = 1500
    config.train.schedule = "linear"
    config.train.warmup = 0
    config.train.clip = 0.0
    config.train.width = 1  # a member's parameters fill a CPU's cache
    config.eval.every = 500
    config.eval.examples = 10_000  # all
    config.eval.test = 0  # like the paper: 60,000 images to train on, the 10,000 others to measure
    config.eval.batch_size = 500
    config.sweep.base, config.sweep.shuffle = VARIANTS[arg]
    config.sweep.dim = (100, 200, 400, 800, 1600)
    config.sweep.lr = (0.05, 0.1, 0.2)
    config.search.threshold = 0.9
    config.search.metric = "accuracy"
    config.search.baseline_lr = (1e-3, 3e-3)
    config.search.seeds = (0, 1, 2)
    config.search.points = 2
    return config
