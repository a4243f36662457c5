"""Small image classifiers for experiments on intrinsic dimension: the fully connected network and
the LeNet of Li et al. 2018 (arXiv:1804.08838, sections 3.1 and 3.2).

Images (B, height, width, channels) float32 -> scores (B, labels) float32. Kernels are
initialised as in the paper's code, He-normal, and biases with zeros. Axes: B batch.

Hugging Face has neither; `save` and adapters use its layout, with the names of a torch module whose
layers are called the same.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """widths: of the input, each hidden layer and the scores. The default is the paper's network
    for MNIST (199,210 parameters); with an input of 3072 it is the one for CIFAR-10 (656,810)."""

    widths: tuple[int, ...] = (784, 200, 200, 10)
    dtype: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, as one row of pixels; any other with as many values also fits."""
        return 1, self.widths[0], 1

    @property
    def labels(self) -> int:
        """Number of scores."""
        return self.widths[-1]


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """Square images of `image_size` pixels a side; the default is for MNIST (44,426 parameters),
    32 pixels and 3 channels for CIFAR-10 (62,006)."""

    image_size: int = 28
    num_channels: int = 1
    labels: int = 10
    dtype: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, self.num_channels


class MLP(nn.Module):
    """Dense layers with ReLU between them, on flattened images."""

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
    """LeNet-5 (LeCun et al. 1998) with ReLU and maximum pooling, as in the paper's code."""

    config: LeNetConfig

    @nn.compact
    def __call__(self, images):
        c = self.config
        if images.shape[1:] != c.image_shape:
            raise ValueError(
                f"images of {images.shape[1:]}, but image_size and num_channels say {c.image_shape}"
            )
        conv = functools.partial(
            nn.Conv, kernel_size=(5, 5), padding="VALID", dtype=c.dtype, kernel_init=_he_normal,
            conv_general_dilated=_as_product,
        )  # fmt: skip
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_he_normal)
        x = _halved(nn.relu(conv(6, name="conv_1")(images)))
        x = _halved(nn.relu(conv(16, name="conv_2")(x)))
        x = x.reshape(len(x), -1)
        x = nn.relu(dense(120, name="dense_1")(x))
        x = nn.relu(dense(84, name="dense_2")(x))
        return dense(c.labels, name="head")(x).astype(jnp.float32)


def _as_product(x, kernel, strides, padding, **unused):
    """`jax.lax.conv_general_dilated` without strides or padding, as one product with all patches:
    x (B, height, width, C), kernel (k, k, C, F). With so few channels a training step takes a
    seventh of the time on a CPU."""
    k, _, channels, features = kernel.shape
    height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
    x = jnp.moveaxis(x, -1, 0)  # makes each pixel of a patch contiguous in memory
    patches = [x[:, :, i : i + height, j : j + width] for i in range(k) for j in range(k)]
    matrix = kernel.reshape(k * k * channels, features)
    y = jnp.einsum("pf,pbhw->fbhw", matrix, jnp.concatenate(patches))
    return jnp.moveaxis(y, 0, -1)


def _halved(x):
    """Maximum over squares of 2 x 2: (B, height, width, C) -> (B, height / 2, width / 2, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


_he_normal = nn.initializers.he_normal()


def example(config: MLPConfig | LeNetConfig):
    """One black image (1, height, width, channels) float32, to trace the module with."""
    return jnp.zeros((1, *config.image_shape), jnp.float32)


# ------------------------------------------------------------------------------ files and adapters


#: Fields read from a config.json. Two convolutions of 5 x 5 and two poolings reduce 16 pixels a
#: side to one.
FIELDS = {
    "mlp": {"widths": fields.each(fields.ROWS, 2, 1000)},
    "lenet": {
        "image_size": fields.whole(16, 2**20),
        **dict.fromkeys(("num_channels", "labels"), fields.SIZE),
    },
}


def config_from_hf(hf: dict, **run) -> MLPConfig | LeNetConfig:
    """Config from the fields of a `config.json`, of model_type "mlp" or "lenet"; run: `dtype`.

    Raises ValueError as `fields.read` does.
    """
    kind = {"mlp": MLPConfig, "lenet": LeNetConfig}[hf["model_type"]]
    arguments = fields.read(hf, FIELDS[hf["model_type"]])
    return kind(**arguments | run)


def hf_config(config: MLPConfig | LeNetConfig) -> dict:
    """The fields of a `config.json`; inverse of `config_from_hf`."""
    described = {k: v for k, v in dataclasses.asdict(config).items() if k != "dtype"}
    return described | {"model_type": "mlp" if isinstance(config, MLPConfig) else "lenet"}


def hf_tensors(config: MLPConfig | LeNetConfig) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's layout}. Kernels are stored (out, in), those of
    convolutions (out, in, height, width). LeNet's dense_1 reads pixels flattened as in Flax,
    channels last."""
    hidden = len(config.widths) - 2 if isinstance(config, MLPConfig) else 2
    axes = {f"dense_{i}": (1, 0) for i in range(1, hidden + 1)} | {"head": (1, 0)}
    if isinstance(config, LeNetConfig):
        axes |= {"conv_1": (2, 3, 1, 0), "conv_2": (2, 3, 1, 0)}
    window = lambda x: (5, 5) if len(x) == 4 else None
    names = {
        f"{layer}/kernel": Source(f"{layer}.weight", x, window=window(x))
        for layer, x in axes.items()
    }
    return names | {f"{layer}/bias": Source(f"{layer}.bias") for layer in axes}
