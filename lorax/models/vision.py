"""Small image classifiers for experiments on intrinsic dimension: the fully connected network and
the LeNet of Li et al. 2018 (arXiv:1804.08838, sections 3.1 and 3.2).

Images (B, height, width, channels) float32 -> scores (B, labels) float32. Kernels start as in the
paper's code, He-normal, and biases at zero. Axes: B batch.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """widths: of the input, of each hidden layer, of the scores. The default is the paper's for
    MNIST (199,210 parameters); with an input of 3072 it is the one for CIFAR-10 (656,810)."""

    widths: tuple[int, ...] = (784, 200, 200, 10)
    dtype: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """An image that fits, as one row of pixels; any other of as many values fits as well."""
        return 1, self.widths[0], 1


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """Images of `image_size` squared and `num_channels`; the default is MNIST's (44,426
    parameters), 32 and 3 are CIFAR-10's (62,006)."""

    image_size: int = 28
    num_channels: int = 1
    labels: int = 10
    dtype: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, self.num_channels


class MLP(nn.Module):
    """Dense layers with ReLU between them, on the pixels in a row."""

    config: MLPConfig

    @nn.compact
    def __call__(self, images):
        c = self.config
        x = images.reshape(len(images), -1)
        if x.shape[1] != c.widths[0]:
            raise ValueError(f"images of {x.shape[1]} values, but widths[0] is {c.widths[0]}")
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_he_normal)
        for i, width in enumerate(c.widths[1:-1], 1):
            x = nn.relu(dense(width, name=f"dense_{i}")(x))
        return dense(c.widths[-1], name="head")(x).astype(jnp.float32)


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and maximum pooling, as the paper's code has it."""

    config: LeNetConfig

    @nn.compact
    def __call__(self, images):
        c = self.config
        if images.shape[1:] != c.image_shape:
            raise ValueError(
                f"images of {images.shape[1:]}, but image_size and num_channels say {c.image_shape}"
            )
        conv = functools.partial(
            nn.Conv, kernel_size=(5, 5), padding="VALID", dtype=c.dtype, kernel_init=_he_normal
        )
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_he_normal)
        pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        x = pool(nn.relu(conv(6, name="conv_1")(images)))
        x = pool(nn.relu(conv(16, name="conv_2")(x)))
        x = x.reshape(len(x), -1)
        x = nn.relu(dense(120, name="dense_1")(x))
        x = nn.relu(dense(84, name="dense_2")(x))
        return dense(c.labels, name="head")(x).astype(jnp.float32)


_he_normal = nn.initializers.he_normal()


def example(config: MLPConfig | LeNetConfig):
    """One black image (1, height, width, channels) float32, to trace the module with."""
    return jnp.zeros((1, *config.image_shape), jnp.float32)
