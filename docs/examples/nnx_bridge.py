"""A Linen module in an NNX module, by `nnx.bridge.ToNNX`: its layers are adapted like any others.

    python -m lorax.run --config=docs/examples/nnx_bridge.py

The digits of scikit-learn are classified by features of a small Linen network. Time: seconds.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from lorax.config import default


class Features(nn.Module):
    """Images (B, 8, 8, 1) -> features (B, 32), in Linen."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3), name="window")(images))
        return nn.relu(nn.Dense(32, name="hidden")(x.reshape(len(x), -1)))


class Classifier(nnx.Module):
    """Images (B, 8, 8, 1) -> scores (B, 10)."""

    def __init__(self, rngs):
        linen = nnx.bridge.ToNNX(Features(), rngs=rngs)
        self.features = linen.lazy_init(jnp.zeros((1, 8, 8, 1)))  # makes its parameters
        self.norm = nnx.BatchNorm(32, rngs=rngs)  # its averages stay as they are
        self.scores = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images):
        return self.scores(self.norm(self.features(images)))


def classifier(rngs):
    return Classifier(rngs), jnp.zeros((1, 8, 8, 1))


def get_config(arg=None):
    config = default()
    config.base = classifier
    config.task.name = "digits"
    config.method.targets = ("window", "hidden")
    config.method.full = ("re:scores/.*",)
    config.train.batch_size = 32
    config.train.steps = 100
    config.train.lr = 1e-2
    config.sweep.rank = (1, 2, 4)
    config.sweep.seed = (0, 1)
    return config
