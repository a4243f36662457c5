"""Denoising diffusion as pure functions: noise schedules, training targets, and steps of samplers.

A noisy image at timestep t is x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, where a_t is the product of
1 - beta up to t (DDPM: Ho et al. 2020, arXiv:2006.11239, equation 4). A model predicts the noise
("epsilon"), or the velocity v = sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans & Ho 2022,
arXiv:2202.00512, appendix D). Numbers are those of diffusers' DDPMScheduler, with its variance
"fixed_small", and DDIMScheduler, with its timesteps spaced "leading".

Axes: B rows. Levels `a` are (B,) or () float32; images have any further axes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import fields
from lorax.files import read_json

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v")
FILE = "scheduler_config.json"
_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' words


class Schedule(NamedTuple):
    """How much noise each timestep has, and what the model predicts.

    betas: "linear" from `start` to `end`, "scaled_linear" (linear in the square root), or
    "squaredcos_cap_v2" (cosine: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17), which needs
    neither. steps: number of timesteps. clip: predictions of the clean image are clipped to it on
    both sides in sampling, None: they are not. offset: added to the timesteps of DDIM. to_clean:
    whether the last step of DDIM goes to an image without noise, not to the level of timestep 0.
    """

    betas: str = "linear"
    start: float = 1e-4
    end: float = 0.02
    steps: int = 1000
    prediction: str = "epsilon"
    clip: float | None = 1.0
    offset: int = 0
    to_clean: bool = True

    @property
    def levels(self) -> np.ndarray:
        """(steps,) float32: a_t, the share of the image's variance at each timestep. Rounded as in
        diffusers, since samplers take differences of neighbours."""
        left = 1 - beta(self).astype(np.float32)
        return np.cumprod(left, dtype=np.float64).astype(np.float32)


def beta(schedule: Schedule) -> np.ndarray:
    """(steps,) float64: the variance of the noise that each timestep adds."""
    start, end, steps = schedule.start, schedule.end, schedule.steps
    if schedule.betas == "linear":
        return np.linspace(start, end, steps)
    if schedule.betas == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    left = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - left[1:] / left[:-1], 0.999)


# ----------------------------------------------------------------------------------------- training


def add_noise(x, noise, a):
    """x_t of clean images x and noise, both (B, ...)."""
    a = _wide(a, x)
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def velocity(x, noise, a):
    """v of clean images x and noise, both (B, ...)."""
    a = _wide(a, x)
    return jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x


def target(x, noise, a, prediction: str):
    """What a model should predict: one of `PREDICTIONS`."""
    return noise if prediction == "epsilon" else velocity(x, noise, a)


def min_snr_weight(a, prediction: str, gamma: float):
    """The weight of a row's loss (Min-SNR: Hang et al. 2023, arXiv:2303.09556, section 3.4), which
    limits the signal-to-noise ratio a / (1 - a), at which an error in the clean image counts, to
    gamma."""
    snr = a / (1 - a)
    return jnp.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)


# ----------------------------------------------------------------------------------------- sampling


def clean_and_noise(output, x, a, prediction: str):
    """(clean image, noise) that a model's output says x_t, called x, is made of."""
    a = _wide(a, x)
    if prediction == "epsilon":
        return (x - jnp.sqrt(1 - a) * output) / jnp.sqrt(a), output
    return (
        jnp.sqrt(a) * x - jnp.sqrt(1 - a) * output,
        jnp.sqrt(a) * output + jnp.sqrt(1 - a) * x,
    )


def ddim_step(output, x, a, a_next, schedule: Schedule, eta: float = 0.0, noise=None):
    """x at the next, smaller timestep (DDIM: Song et al. 2020, arXiv:2010.02502, equation 12).

    output: of the model for x, (B, ...). a, a_next: levels of this timestep and the next. eta:
    share of the noise that is drawn anew, `noise`; 0 is deterministic.
    """
    clean, predicted = clean_and_noise(output, x, a, schedule.prediction)
    clean = _clipped(clean, schedule)
    a, a_next = _wide(a, x), _wide(a_next, x)
    new = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)  # variance of what is drawn
    x = jnp.sqrt(a_next) * clean + jnp.sqrt(1 - a_next - new) * predicted
    return x if noise is None else x + jnp.sqrt(new) * noise


def ddpm_step(output, x, a, a_next, schedule: Schedule, noise):
    """x at the timestep before (arXiv:2006.11239, equations 6 and 7). noise: (B, ...), zeros for
    the last step, to a_next = 1."""
    clean, _ = clean_and_noise(output, x, a, schedule.prediction)
    clean, a, a_next = _clipped(clean, schedule), _wide(a, x), _wide(a_next, x)
    kept = a / a_next
    mean = jnp.sqrt(a_next) * (1 - kept) / (1 - a) * clean
    mean = mean + jnp.sqrt(kept) * (1 - a_next) / (1 - a) * x
    return mean + jnp.sqrt((1 - a_next) / (1 - a) * (1 - kept)) * noise


def timesteps(schedule: Schedule, n: int) -> np.ndarray:
    """(n,) int32, descending: the timesteps of n steps of DDIM. Raises ValueError if the schedule
    has fewer, or its offset leads beyond its last."""
    if not 1 <= n <= schedule.steps:
        raise ValueError(f"{n} steps given, must be from 1 to {schedule.steps}")
    at = np.arange(n)[::-1] * (schedule.steps // n) + schedule.offset
    if at[0] >= schedule.steps:
        raise ValueError(
            f"{n} steps given: with steps_offset {schedule.offset} they begin at timestep {at[0]}, "
            f"and the last is {schedule.steps - 1}; give another number of steps"
        )
    return at.astype(np.int32)


def ddim(predict: Callable, noise, schedule: Schedule, n: int):
    """Images made of noise (B, ...) in n steps of DDIM. predict(x, t) -> the model's output, x like
    noise and t (B,) int32. Can be traced."""
    at, every = timesteps(schedule, n), schedule.levels
    last = np.float32(1) if schedule.to_clean else every[0]
    levels = jnp.asarray(every[at])
    after = at - schedule.steps // n
    following = jnp.asarray(np.where(after >= 0, every[np.maximum(after, 0)], last))

    def step(x, now):
        t, a, a_next = now
        output = predict(x, jnp.full(len(x), t, jnp.int32))
        return ddim_step(output, x, a, a_next, schedule), None

    return jax.lax.scan(step, noise, (jnp.asarray(at), levels, following))[0]


def _clipped(clean, schedule: Schedule):
    return clean if schedule.clip is None else jnp.clip(clean, -schedule.clip, schedule.clip)


def _wide(a, x):
    """Levels (B,), or one for all rows, as (B or 1, 1, ...), to be multiplied with x."""
    return jnp.reshape(jnp.asarray(a, x.dtype), (-1, *(1,) * (x.ndim - 1)))


# -------------------------------------------------------------------------------- diffusers' layout

_SUPPORTED = {
    "thresholding": "false",
    "rescale_betas_zero_snr": "false",
    "trained_betas": "null",
}
_BETA = fields.Kind("from 0 to below 1", lambda x: type(x) in (int, float) and 0 <= x < 1, float)
#: Fields read from a scheduler_config.json.
FIELDS = {
    "num_train_timesteps": fields.whole(1, 2**20),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": fields.one_of(BETAS),
    "prediction_type": fields.one_of(_PREDICTION_TYPES),
    "clip_sample": fields.FLAG,
    "clip_sample_range": fields.POSITIVE,
    "steps_offset": fields.COUNT,
    "set_alpha_to_one": fields.FLAG,
    **{name: fields.Kind(right, lambda x: not x) for name, right in _SUPPORTED.items()},
}
_NAMES = {
    "num_train_timesteps": "steps", "beta_start": "start", "beta_end": "end",
    "beta_schedule": "betas", "steps_offset": "offset", "set_alpha_to_one": "to_clean",
}  # fmt: skip


def from_diffusers(config: dict, place="") -> Schedule:
    """The schedule of a `scheduler_config.json` of DDPM, DDIM or another scheduler of diffusers.

    Its sampler does not count (`solver_order`, `timestep_spacing`...): images are made by `ddim`.
    Raises ValueError for schedules that lorax doesn't compute, and as `fields.read` does. place:
    for messages.
    """
    read = fields.read(config, FIELDS, place)
    schedule = Schedule(**{_NAMES[name]: read[name] for name in _NAMES.keys() & read.keys()})
    clip = read.get("clip_sample_range", 1.0) if read.get("clip_sample", True) else None
    prediction = _PREDICTION_TYPES[read.get("prediction_type", "epsilon")]
    return schedule._replace(clip=clip, prediction=prediction)


def to_diffusers(schedule: Schedule) -> dict:
    """The fields of a `scheduler_config.json` of a DDIMScheduler; inverse of `from_diffusers`."""
    words = {ours: theirs for theirs, ours in _PREDICTION_TYPES.items()}
    described = {theirs: getattr(schedule, ours) for theirs, ours in _NAMES.items()}
    described |= {"prediction_type": words[schedule.prediction]}
    clips = {"clip_sample": schedule.clip is not None, "clip_sample_range": schedule.clip or 1.0}
    return {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"} | described | clips


def of_model(directory: Path | None) -> Schedule:
    """The schedule of a model's files (`read`), or the default one. directory: None for a model
    without files."""
    return read(directory) or Schedule()


def read(directory: Path | None) -> Schedule | None:
    """The schedule in a model's directory or, in a pipeline's, beside it in scheduler/; None if
    there is none."""
    places = (directory / FILE, directory.parent / "scheduler" / FILE) if directory else ()
    for file in places:
        if file.is_file():
            return from_diffusers(read_json(file), file)
    return None
