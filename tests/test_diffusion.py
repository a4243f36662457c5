"""Schedules, targets and samplers are diffusers'."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from support import require

from lorax import diffusion
from lorax.diffusion import Schedule

SCHEDULES = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "stable": dict(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        steps_offset=1, set_alpha_to_one=False,
    ),
    "cosine-v": dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
}  # fmt: skip
SHAPE = (3, 4, 4, 2)


def pair(name, scheduler):
    """(diffusers' scheduler, our schedule of its config)."""
    diffusers, fields = require("diffusers"), dict(SCHEDULES[name])
    if scheduler == "DDPMScheduler":
        fields.pop("set_alpha_to_one", None)
    theirs = getattr(diffusers, scheduler)(**fields)
    return theirs, diffusion.from_diffusers(dict(theirs.config))


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(x, t):
    """Stands for a model: anything that depends on image and timestep."""
    return 0.9 * x + 0.3 * (x - 0.5) * (t / 1000)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_noisy_images_and_velocities(name):
    torch = require("torch")
    theirs, ours = pair(name, "DDPMScheduler")
    np.testing.assert_allclose(ours.levels, theirs.alphas_cumprod.numpy(), rtol=1e-5, atol=1e-7)
    x, noise, t = normal(0), normal(1), np.array([0, 400, 999])
    a = ours.levels[t]
    given = torch.tensor(x), torch.tensor(noise), torch.tensor(t)
    noisy = theirs.add_noise(*given).numpy()
    np.testing.assert_allclose(diffusion.add_noise(x, noise, a), noisy, rtol=0, atol=1e-5)
    v = theirs.get_velocity(*given).numpy()
    np.testing.assert_allclose(diffusion.velocity(x, noise, a), v, rtol=0, atol=1e-5)
    for prediction, want in (("epsilon", noise), ("v", v)):
        output = diffusion.target(x, noise, a, prediction)
        np.testing.assert_allclose(output, want, rtol=0, atol=1e-5)
        # What was mixed comes apart again; at t = 999 there is nearly nothing of the image.
        clean, of_noise = diffusion.clean_and_noise(output[:2], noisy[:2], a[:2], prediction)
        np.testing.assert_allclose(clean, x[:2], rtol=0, atol=1e-4)
        np.testing.assert_allclose(of_noise, noise[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_trajectory_of_ddim(name):
    torch = require("torch")
    theirs, ours = pair(name, "DDIMScheduler")
    theirs.set_timesteps(10)
    np.testing.assert_array_equal(diffusion.timesteps(ours, 10), theirs.timesteps.numpy())
    x = torch.tensor(normal(2))
    for t in theirs.timesteps:
        x = theirs.step(model(x, float(t)), t, x).prev_sample
    predict = lambda x, t: model(x, t.astype(jnp.float32).reshape(-1, 1, 1, 1))
    run = jit(functools.partial(diffusion.ddim, predict, schedule=ours, n=10))
    size = float(x.abs().max())
    np.testing.assert_allclose(run(normal(2)), x.numpy(), rtol=0, atol=1e-5 * max(size, 1))


def test_a_step_of_ddim_with_new_noise():
    torch = require("torch")
    theirs, ours = pair("linear", "DDIMScheduler")
    theirs.set_timesteps(10)
    output, x, noise = normal(0), normal(1), normal(2)
    given = torch.tensor(output), 500, torch.tensor(x)
    want = theirs.step(*given, eta=0.7, variance_noise=torch.tensor(noise)).prev_sample
    levels = ours.levels[500], ours.levels[400]
    got = diffusion.ddim_step(output, x, *levels, ours, eta=0.7, noise=noise)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_trajectory_of_ddpm_with_given_noise(name, monkeypatch):
    torch = require("torch")
    from diffusers.schedulers import scheduling_ddpm

    theirs, ours = pair(name, "DDPMScheduler")
    drawn = iter(normal(3, (20, *SHAPE)))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.tensor(next(drawn)))
    x = y = normal(2)
    times = [*range(999, 989, -1), *range(4, -1, -1)]
    given, step = iter(normal(3, (20, *SHAPE))), jit(diffusion.ddpm_step, static_argnums=4)
    for t in times:
        x = theirs.step(model(torch.tensor(x), t), t, torch.tensor(x)).prev_sample.numpy()
        a, a_next = ours.levels[t], ours.levels[t - 1] if t else np.float32(1)
        noise = next(given) if t else np.zeros(SHAPE, np.float32)
        y = np.asarray(step(model(y, t), y, a, a_next, ours, noise))
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * max(np.abs(x).max(), 1))
        y = x  # one step at a time


def test_ddim_of_the_perfect_prediction_gives_the_image_back():
    x, schedule = normal(0).clip(-1, 1), Schedule()
    levels = jnp.asarray(schedule.levels)

    def perfect(noisy, t):
        a = levels[t].reshape(-1, 1, 1, 1)
        return (noisy - jnp.sqrt(a) * x) / jnp.sqrt(1 - a)

    run = jit(functools.partial(diffusion.ddim, perfect, schedule=schedule, n=7))
    np.testing.assert_allclose(run(normal(1)), x, rtol=0, atol=1e-4)


def test_min_snr_weights():
    """The loss of the clean image would be weighted by snr; epsilon's is, times 1 / snr."""
    a = np.array([0.001, 0.5, 0.9, 0.999], np.float32)
    snr = a / (1 - a)
    epsilon = diffusion.min_snr_weight(a, "epsilon", 5.0)
    np.testing.assert_allclose(epsilon, [1, 1, 5 / 9, 5 / 999], rtol=1e-4)
    v = diffusion.min_snr_weight(a, "v", 5.0)
    np.testing.assert_allclose(v, np.minimum(snr, 5) / (snr + 1), rtol=1e-5)
    # Errors in the clean image d count alike: epsilon's error is sqrt(snr) d, v's sqrt(snr + 1) d.
    np.testing.assert_allclose(epsilon * snr, v * (snr + 1), rtol=1e-4)
    np.testing.assert_allclose(epsilon * snr, np.minimum(snr, 5), rtol=1e-4)


def test_files_of_schedulers(tmp_path):
    diffusers = require("diffusers")
    ours = Schedule("scaled_linear", 0.001, 0.01, 500, "v", None, 1, False)
    fields = diffusion.to_diffusers(ours)
    assert diffusion.from_diffusers(fields) == ours
    theirs = diffusers.DDIMScheduler.from_config(fields)
    theirs.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "unet").mkdir()
    assert diffusion.read(tmp_path / "unet") == ours == diffusion.read(tmp_path / "scheduler")
    assert diffusion.read(tmp_path) is None and diffusion.read(None) is None
    # The published schedulers of DiT-XL-2-256 have fields of other samplers.
    assert diffusion.from_diffusers({"solver_order": 2, "clip_sample": False}).clip is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(beta_schedule="sigmoid"), "file: beta_schedule: .sigmoid. given, must be one of"),
        (dict(prediction_type="sample"), "prediction_type: .sample. given, must be one of"),
        (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr: true given, must be false"),
        (dict(trained_betas=[0.1]), r"trained_betas: \[0.1\] given, must be null"),
        (dict(beta_end=1.0), "beta_end: 1.0 given, must be from 0 to below 1"),
    ],
)
def test_schedulers_that_are_not_computed_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        diffusion.from_diffusers(fields, "file")


def test_more_steps_than_there_are_timesteps():
    with pytest.raises(ValueError, match="1001 steps given, must be from 1 to 1000"):
        diffusion.timesteps(Schedule(), 1001)
    shifted = Schedule(offset=1)
    assert diffusion.timesteps(shifted, 999)[0] == 999
    with pytest.raises(ValueError, match="1000 steps .* steps_offset 1 .* begin at timestep 1000"):
        diffusion.timesteps(shifted, 1000)
