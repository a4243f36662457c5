"""Images that a diffusion model makes of noise, with DDIM (`lorax.diffusion.ddim`).

base = lorax.load("dit-digits")
images = sampling.sample(base, [3] * 10)                  # (10, 8, 8, 1) uint8
images = sampling.sample(base, [3] * 10, learned.bind())  # with an adapter

unet = lorax.load("PIPELINE")                             # texts (N, tokens, features): the states
latents = sampling.sample(unet, texts, guidance=7.5, none=empty, as_pixels=False)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lorax import denoising, diffusion, divided, gather, intercept
from lorax.models import Base


def sample(
    base: Base,
    conditions,
    params: dict | None = None,
    *,
    schedule: diffusion.Schedule | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    none=None,
    seed: int = 0,
    batch_size: int = 64,
    as_pixels: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """An image of each of the conditions: (N, height, width, channels) uint8.

    conditions: what the base makes images of (`Traits.condition`): classes (N,), or hidden states
    of texts (N, tokens, features). params: with an adapter bound to them; None: the base's.
    schedule: of the noise; None: that of the base's files, or else the default of `Schedule`.
    steps: of DDIM. guidance: what the condition adds to the prediction counts this often (Ho &
    Salimans 2022, arXiv:2207.12598); 1: as it is. none: the condition without which guidance is,
    such as the hidden states (tokens, features) of the empty text; None: the base's class "none".
    seed: of the noise (`noise`); image n has the same noise whatever the batch size. as_pixels:
    False returns float32 as it is, such as latents for an autoencoder. progress: called with the
    images done and their number.

    Raises ValueError as `check`, for conditions of another shape, classes that the base doesn't
    know, and a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} given, must be 1 or more")
    none = base.traits.no_class if none is None else none
    schedule = schedule or diffusion.of_model(base.directory)
    check(base, steps, guidance, schedule, none)
    conditions, none = _conditions(base, conditions, none)
    params = base.params if params is None else params
    make = _program(base.module, schedule, steps, float(guidance))
    size, images = min(batch_size, len(conditions)), []
    with divided.on(gather.mesh_of(params)):
        for first in range(0, len(conditions), size):
            progress(first, len(conditions))
            numbers = np.arange(first, first + size)  # the last batch is filled up
            asked = conditions[np.minimum(numbers, len(conditions) - 1)]
            made = np.asarray(make(params, noise(base, seed, numbers), asked, none))
            images.append(denoising.pixels(made) if as_pixels else made)
    progress(len(conditions), len(conditions))
    return np.concatenate(images)[: len(conditions)]


def check(base: Base, steps: int, guidance: float, schedule: diffusion.Schedule, none=None) -> None:
    """Raises ValueError for a base that makes no images, more steps than the schedule has
    timesteps, or guidance without the condition "none"."""
    condition, named = base.traits.condition, f"base: {base.name} ({base.family})"
    if condition is None:
        raise ValueError(f"{named} makes no images")
    diffusion.timesteps(schedule, steps)
    if guidance != 1 and none is None:
        lacks = "reads texts: give `none`, the hidden states of the empty one"
        lacks = lacks if condition.shape else 'has no class "none"'
        raise ValueError(f"guidance: {guidance:g} given, but {named} {lacks}")


def noise(base: Base, seed: int, numbers) -> jax.Array:
    """The noise that images of these numbers (n,) are made of: (n, height, width, channels)
    float32."""
    return _noise(base.input_shape, seed, jnp.asarray(numbers))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], seed: int, numbers):
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape))(numbers)


def _conditions(base: Base, conditions, none) -> tuple[np.ndarray, np.ndarray]:
    """(conditions (N, ...), the condition "none", zeros if there is none), of the base's dtype.
    Raises ValueError if they have other shapes than the base reads, or are classes that it doesn't
    know."""
    right, last = base.traits.condition, base.traits.no_class
    given = np.asarray(conditions)
    conditions = given.astype(right.dtype)
    each = conditions.shape[1:]
    # Texts have any number of tokens.
    if not conditions.size or len(each) != len(right.shape) or each[1:] != right.shape[1:]:
        expected = ("N", "tokens", *right.shape[1:]) if right.shape else ("N",)
        raise ValueError(
            f"conditions: {conditions.shape} given, must be ({', '.join(map(str, expected))})"
        )
    if right.dtype == np.int32:
        most = np.inf if last is None else last
        wrong = given[(given != conditions) | (given < 0) | (given > most)]
        if wrong.size:
            known = "from 0" if last is None else f'from 0 to {last - 1}, or {last} for "none"'
            raise ValueError(f"conditions: class {wrong[0]} given, must be a whole number {known}")
    none = np.zeros(each, right.dtype) if none is None else np.asarray(none, right.dtype)
    if none.shape != each:
        raise ValueError(f"none: {none.shape} given, must be {each}, as each of the conditions")
    return conditions, none


@functools.lru_cache(maxsize=4)
def _program(module, schedule, steps: int, guidance: float):
    """(params, noise (B, ...), conditions (B, ...), none (...)) -> images like noise, float32."""

    @jax.jit
    def make(params, noise, conditions, none):
        def predict(x, t):
            of = lambda given: intercept.apply(module, params, x, t, given)[..., : x.shape[-1]]
            if guidance == 1:
                return of(conditions)
            without = of(jnp.broadcast_to(none, conditions.shape))
            return without + guidance * (of(conditions) - without)

        return diffusion.ddim(predict, noise, schedule, steps)

    return make
