"""The loss of denoising images: what a diffusion model is trained on.

A row is a clean image with a timestep and a number from which its noise is drawn, on the device.
Both are drawn anew at every training step, as a function of seed and step alone; the rows of an
evaluation have fixed ones, evenly spread over the timesteps, so that losses can be compared. The
loss of a row is the squared error of the model's prediction, the mean over the image's values;
Min-SNR weights (`diffusion.min_snr_weight`) apply in training alone.

Axes: B rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import diffusion, intercept
from lorax.losses import Rows


class Settings(NamedTuple):
    """schedule: of the noise. min_snr: gamma, 0 for equal weights. dropout: share of the training
    rows whose condition is replaced by "none", for guidance without a classifier (Ho & Salimans
    2022, arXiv:2207.12598)."""

    schedule: diffusion.Schedule = diffusion.Schedule()
    min_snr: float = 0.0
    dropout: float = 0.0


def fixed(settings: Settings, n: int, seed: int) -> dict[str, np.ndarray]:
    """Timesteps, evenly spread, and noise of n rows that keep them: {"t": (n,) int32, "draw": (n,)
    uint32}."""
    rng = np.random.default_rng(seed)
    t = (np.arange(n) + 0.5) / max(n, 1) * settings.schedule.steps
    return {"t": rng.permutation(t.astype(np.int32)), "draw": _numbers(rng, n)}


def drawn(
    settings: Settings, none: np.ndarray | None, batch: Mapping, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """New timesteps, uniform, noise and dropped conditions of a batch's rows, whatever its axes.
    none: the condition in place of those that are dropped; None: all stay."""
    shape, condition = batch["weight"].shape, batch["condition"]
    new = {"t": rng.integers(0, settings.schedule.steps, shape, np.int32)}
    new["draw"] = _numbers(rng, shape)
    if none is not None:
        dropped = rng.random(shape) < settings.dropout
        new["condition"] = np.where(dropped.reshape(*shape, *(1,) * none.ndim), none, condition)
    return new


def _numbers(rng: np.random.Generator, shape) -> np.ndarray:
    return rng.integers(0, 2**32, shape, np.uint32)


def loss(settings: Settings, module, params, batch, smoothing=0.0, training=False):
    """(sum of weighted losses, sum of weights, None).

    batch: {"inputs": (B, height, width, channels) uint8, scaled to [-1, 1] here, or float32;
    "condition": (B, ...); "t": (B,) int32; "draw": (B,) uint32; "weight": (B,) float32}.
    """
    losses, weight = _losses(settings, module, params, batch), batch["weight"]
    if training and settings.min_snr:
        schedule = settings.schedule
        a = jnp.asarray(schedule.levels)[batch["t"]]
        losses *= diffusion.min_snr_weight(a, schedule.prediction, settings.min_snr)
    return jnp.sum(weight * losses), jnp.sum(weight), None


def rows(settings: Settings, module, params, batch, base=None) -> Rows:
    """`losses.Rows` of images to be denoised; batch as for `loss`."""
    weight = batch["weight"]
    return Rows(weight * _losses(settings, module, params, batch), weight, None, None)


def predicted(settings: Settings, module, params, batch) -> jax.Array:
    """What the model predicts of the noisy images, like "inputs", float32; batch as for `loss`."""
    return _predicted(settings, module, params, batch)[0]


def _predicted(settings: Settings, module, params, batch):
    """(the model's prediction, what it should be)."""
    x, schedule = scaled(batch["inputs"]), settings.schedule
    draw = lambda number: jax.random.normal(jax.random.key(number), x.shape[1:], jnp.float32)
    noise = jax.vmap(draw)(batch["draw"])
    a = jnp.asarray(schedule.levels)[batch["t"]]
    noisy = diffusion.add_noise(x, noise, a)
    output = intercept.apply(module, params, noisy, batch["t"], batch["condition"])
    right = diffusion.target(x, noise, a, schedule.prediction)
    return output[..., : x.shape[-1]], right


def _losses(settings: Settings, module, params, batch) -> jax.Array:
    """(B,) float32."""
    output, right = _predicted(settings, module, params, batch)
    return jnp.mean(jnp.square(output - right), axis=(1, 2, 3))


def scaled(images):
    """uint8 images as float32 in [-1, 1]; float32 as they are."""
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images


def pixels(images) -> np.ndarray:
    """The uint8 images of float32 in [-1, 1]; inverse of `scaled`."""
    return np.round((np.clip(np.asarray(images), -1, 1) + 1) * 127.5).astype(np.uint8)
