"""Images that a diffusion model makes of noise, with DDIM (`lorax.diffusion.ddim`).

base = lorax.load("dit-digits")
images = sampling.sample(base, classes=[3] * 10)          # (10, 8, 8, 1) uint8
images = sampling.sample(base, [3] * 10, learned.bind())  # with an adapter
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lorax import denoising, diffusion, divided, gather, intercept
from lorax.models import Base


def sample(
    base: Base,
    classes: Sequence[int],
    params: dict | None = None,
    *,
    schedule: diffusion.Schedule | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """An image of each of the classes: (N, height, width, channels) uint8.

    params: with an adapter bound to them; None: the base's. schedule: of the noise; None: that of
    the base's files, or else the default of `Schedule`. steps: of DDIM. guidance: what the class
    adds to the prediction counts this often (Ho & Salimans 2022, arXiv:2207.12598); 1: as it is.
    seed: of the noise; image n has the same noise whatever the batch size. progress: called with
    the images done and their number.

    Raises ValueError as `check`.
    """
    check(base, steps, guidance, schedule)
    schedule = schedule or diffusion.read(base.directory) or diffusion.Schedule()
    params = base.params if params is None else params
    make = _program(base.module, schedule, steps, float(guidance), base.traits.no_class)
    classes = np.asarray(classes, np.int32)
    size, images = min(batch_size, len(classes)), []
    draw = jax.jit(jax.vmap(lambda n: jax.random.normal(_key(seed, n), base.input_shape)))
    with divided.on(gather.mesh_of(params)):
        for first in range(0, len(classes), size):
            progress(first, len(classes))
            numbers = np.arange(first, first + size)  # the last batch is filled up
            asked = classes[np.minimum(numbers, len(classes) - 1)]
            images.append(denoising.pixels(make(params, draw(numbers), asked)))
    progress(len(classes), len(classes))
    return np.concatenate(images)[: len(classes)]


def check(
    base: Base, steps: int, guidance: float, schedule: diffusion.Schedule | None = None
) -> None:
    """Raises ValueError for a base that makes no images of classes, more steps than the schedule
    has timesteps, or guidance without a class "none"."""
    condition, named = base.traits.condition, f"base: {base.name} ({base.family})"
    if condition is None or condition.shape:
        raise ValueError(f"{named} makes no images of classes")
    diffusion.timesteps(schedule or diffusion.read(base.directory) or diffusion.Schedule(), steps)
    if guidance != 1 and base.traits.no_class is None:
        raise ValueError(f'guidance: {guidance:g} given, but {named} has no class "none"')


def _key(seed: int, n) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), n)


@functools.lru_cache(maxsize=4)
def _program(module, schedule, steps: int, guidance: float, no_class: int | None):
    """(params, noise (B, ...), classes (B,)) -> images like noise, float32 in [-1, 1]."""

    @jax.jit
    def make(params, noise, classes):
        def predict(x, t):
            of = lambda classes: intercept.apply(module, params, x, t, classes)[..., : x.shape[-1]]
            if guidance == 1:
                return of(classes)
            without = of(jnp.full_like(classes, no_class))
            return without + guidance * (of(classes) - without)

        return diffusion.ddim(predict, noise, schedule, steps)

    return make
