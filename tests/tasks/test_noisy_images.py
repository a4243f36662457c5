"""Task `diffusion`: its rows, its loss, and a run of it."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import lorax
from lorax import config, denoising, diffusion, models, rundir, sampling, tasks, tree
from lorax.analysis import runs
from lorax.models.load import skeleton
from lorax.tasks import kinds, vision
from lorax.train.batches import train_batches

TINY = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8)
TINY |= dict(in_channels=1, num_embeds_ada_norm=10, model_type="DiTTransformer2DModel")
LEVELS = jnp.asarray(diffusion.Schedule().levels)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny DiT that predicts velocities, its weights at random."""
    folder = tmp_path_factory.mktemp("dit")
    (folder / "config.json").write_text(json.dumps(TINY))
    base = lorax.load(f"random:{folder}")
    rng = np.random.default_rng(0)
    noisy = lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
    models.save(folder / "saved", base.replace(params=jax.tree.map(noisy, base.params)))
    schedule = diffusion.to_diffusers(diffusion.Schedule(prediction="v"))
    (folder / "saved" / diffusion.FILE).write_text(json.dumps(schedule))
    return folder / "saved"


@pytest.fixture(scope="module")
def base(directory):
    return lorax.load(str(directory))


def built(base, test=0, **settings):
    section = config.default().task
    section.update(name="diffusion", **settings)
    return tasks.build(section.to_dict(), None, 16, 40, base, test=test)


# --------------------------------------------------------------------------------------------- rows


def test_rows_are_the_images_of_the_classes_with_fixed_noise_spread_over_the_timesteps(base):
    task = built(base, test=None, classes=(3, 8), n_train=50)
    (x, y), (x_eval, y_eval) = vision.digit_sets()
    assert {name: tasks.size(rows) for name, rows in task.evaluated.items()}.keys() == {
        "eval",
        "test",
    }
    assert tasks.size(task.train) == 50 and {*task.train["condition"]} == {3, 8}
    np.testing.assert_array_equal(task.train["inputs"][..., 0], x[np.isin(y, (3, 8))][:50])
    whole = built(base, classes=(3, 8))
    t = np.sort(built(base).eval["t"])
    assert len(t) == 40 and np.diff(t).max() < 150 and t[0] < 100 and t[-1] > 900
    assert len({*whole.train["draw"]}) == len(whole.train["draw"])
    again = built(base, classes=(3, 8))
    for name, rows in whole.eval.items():
        np.testing.assert_array_equal(rows, again.eval[name])
    assert tasks.size(whole.eval) == 40 and "predicts v" in whole.note
    assert "predicts epsilon, Min-SNR 5" in built(base, prediction="epsilon", min_snr=5.0).note
    assert np.isin(y_eval, (3, 8)).sum() > 60


def members(*seeds):
    made = []
    for seed in seeds:
        c = config.default()
        c.task.name, c.seed, c.train.batch_size, c.train.accumulate = "diffusion", seed, 8, 2
        made.append(types.SimpleNamespace(config=c))
    return types.SimpleNamespace(members=made, config=made[0].config)


def test_what_training_draws_is_a_function_of_seed_and_step(base):
    task, stack = built(base, class_dropout=0.5), members(0, 1, 0)
    whole = train_batches(stack, task, 0, 6)
    parts = [train_batches(stack, task, first, k) for first, k in ((0, 2), (2, 3), (5, 1))]
    for name, x in whole.items():
        np.testing.assert_array_equal(x, np.concatenate([part[name] for part in parts], axis=1))
        np.testing.assert_array_equal(x[0], x[2])
    assert whole["t"].shape == (3, 6, 2, 4) and whole["t"].dtype == np.int32
    assert not np.array_equal(whole["t"][0], whole["t"][1])
    assert len({*whole["draw"][0].ravel()}) == 48
    assert whole["t"].min() >= 0 and 900 < whole["t"].max() < 1000
    none = whole["condition"] == 10  # the class "none"
    assert 0.3 < none[:2].mean() < 0.7
    kept = train_batches(stack, built(base, class_dropout=0.0), 0, 6)
    assert kept["condition"].max() < 10
    np.testing.assert_array_equal(np.where(none, 10, kept["condition"]), whole["condition"])


# --------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_squared_error_and_min_snr_weighs_it_in_training_alone(base):
    settings = denoising.Settings(diffusion.Schedule(prediction="v"), min_snr=5.0)
    kind = kinds.noisy(settings)
    rng = np.random.default_rng(1)
    batch = {
        "inputs": rng.integers(0, 256, (3, 8, 8, 1), np.uint8),
        "condition": np.array([1, 2, 0], np.int32),
        "weight": np.array([1, 1, 0], np.float32),  # the last row fills up a batch
        "t": np.array([10, 700, 0], np.int32),
        "draw": np.array([5, 6, 0], np.uint32),
    }
    x = batch["inputs"] / np.float32(127.5) - 1
    noise = np.stack([jax.random.normal(jax.random.key(n), x.shape[1:]) for n in batch["draw"]])
    a = np.asarray(LEVELS)[batch["t"]].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(a) * x + np.sqrt(1 - a) * noise
    run = jit(functools.partial(lorax.apply, base.module))
    output = np.asarray(run(base.params, noisy, batch["t"], batch["condition"]))
    v = np.sqrt(a) * noise - np.sqrt(1 - a) * x
    errors = np.square(output - v).mean(axis=(1, 2, 3))
    rows = jit(functools.partial(kind.rows, base.module))(base.params, batch)
    np.testing.assert_allclose(rows.loss, errors * batch["weight"], rtol=1e-4)
    evaluated = jit(functools.partial(kind.loss, base.module))(base.params, batch)
    np.testing.assert_allclose(evaluated[0], errors[:2].sum(), rtol=1e-4)
    trained = jit(functools.partial(kind.loss, base.module, training=True))(base.params, batch)
    snr = (a / (1 - a)).ravel()
    weights = np.minimum(snr, 5) / (snr + 1)
    np.testing.assert_allclose(trained[0], (errors * weights)[:2].sum(), rtol=1e-4)
    assert evaluated[1] == trained[1] == 2 and evaluated[2] is None


# ---------------------------------------------------------------------------------------- sampling


def test_samples_have_their_own_noise_whatever_the_batch_and_guidance_weighs_the_class(base):
    classes = [1, 2, 3, 1, 2]
    images = sampling.sample(base, classes, steps=4)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(sampling.sample(base, classes, steps=4, batch_size=2), images)
    assert np.any(images[0] != images[3])  # of one class
    guided = sampling.sample(base, classes, steps=4, guidance=0.0)
    none = sampling.sample(base, [10] * 5, steps=4)
    np.testing.assert_array_equal(guided, none)
    assert np.any(guided != images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=1001), "1001 steps given"),
        (dict(schedule=diffusion.Schedule(steps=10)), "50 steps given, must be from 1 to 10"),
    ],
)
def test_samples_that_can_not_be_made(base, settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample(base, [1], **settings)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(classes=(3, 12)), "task.classes: 12 given; scikit-learn's digits has classes 0 to 9"),
        (dict(n_train=5000), "task.n_train: 5000 was given; the train set has 1,437 examples"),
        (dict(path="nowhere.npz"), "task.path: 'nowhere.npz' does not exist"),
        (dict(shuffle=True), "task.shuffle: True was given; task 'diffusion' has no use for it"),
    ],
)
def test_settings_that_do_not_fit(base, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        built(base, **settings)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("random:mlp-64-10", "diffusion", "is no diffusion model, which task 'diffusion' needs"),
        ("random:dit-b-2", "digits", "is a diffusion model: its task is 'diffusion', not 'digits'"),
    ],
)
def test_bases_that_do_not_fit(name, task, message):
    base = skeleton(name)
    with pytest.raises(ValueError, match=message):
        tasks.check_base(config.default().task.to_dict() | {"name": task}, base, 16)


def test_images_of_another_size():
    with pytest.raises(ValueError, match="reads images of 32 x 32 x 4; .* has images of 8 x 8 x 1"):
        built(skeleton("random:dit-b-2"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task.classes", (1, 1), "task.classes: .* must be a tuple of different classes"),
        ("task.prediction", "x0", "task.prediction: 'x0' given, must be one of epsilon, v"),
        ("train.label_smoothing", 0.1, "label_smoothing: 0.1 given, but task diffusion has values"),
        ("eval.sample_steps", 2000, "eval.samples: 2000 steps given, must be from 1 to 1000"),
        ("eval.also", (("a", {"name": "diffusion", "prediction": "epsilon"}),),
         "eval.also: a: a model predicts epsilon for task .diffusion., and v for"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(directory, tmp_path, key, value, message):
    c = settings(directory)
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        lorax.run(c, tmp_path / "run")


# ---------------------------------------------------------------------------------------------- run


def settings(directory):
    c = config.default()
    c.base, c.task.name, c.task.classes = str(directory), "diffusion", (9,)
    c.method.targets = ("attention", "modulation")
    c.sweep.rank = (1, 2)
    c.train.update(steps=8, batch_size=8, warmup=0, schedule="constant")
    c.eval.update(every=4, examples=16, batch_size=16, samples=3, sample_steps=3)
    c.eval.also = (("old", {"name": "diffusion", "classes": (0, 1)}),)
    return c


def test_a_run_and_its_page(directory, tmp_path):
    c = settings(directory)
    run = lorax.run(c, tmp_path / "run")
    table = runs.summary(run)
    assert (table["final_loss"] < table["base_loss"]).all()
    assert table["sample_accuracy"].between(0, 1).all() and "forgetting_old" in table
    made = [run.samples(member) for member in table.index]
    assert all(x["images"].shape == (3, 8, 8, 1) and {*x["classes"]} == {9} for x in made)
    assert run.base_samples(0)["images"].shape == (3, 8, 8, 1)
    page = (tmp_path / "run" / rundir.REPORT).read_text()
    assert page.count("data:image/png;base64,") == 3 and "recognised" in page
    assert "squared error" in page
    # An adapter that is loaded again makes the same images.
    base = lorax.load(str(directory))
    learned = lorax.adapters.load(rundir.adapter(run.directory, 1), base)
    again = sampling.sample(base, [9] * 3, learned.bind(), steps=3, batch_size=16)
    assert np.abs(again.astype(int) - made[1]["images"]).max() <= 1
    # Alone, a member has the same noise and the same losses.
    c.sweep.rank, c.method.rank, c.analysis.report = (), 2, False
    alone = runs.summary(lorax.run(c, tmp_path / "alone"))
    np.testing.assert_allclose(alone["final_loss"][0], table["final_loss"][1], rtol=1e-5)


@pytest.mark.soak  # the family table has a quicker case
def test_a_base_in_4_bits(base):
    coded = lorax.quantize(base)
    assert tree.nbytes(coded.params) < tree.nbytes(base.params)
    x, t, classes = np.ones((2, 8, 8, 1), np.float32), np.array([1, 9]), np.array([1, 2])
    run = jit(functools.partial(lorax.apply, base.module))
    got = run(coded.params, x, t, classes)
    want = run(lorax.dequantize(coded).params, x, t, classes)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    images = sampling.sample(coded, [1, 2], steps=3)
    assert images.shape == (2, 8, 8, 1) and np.ptp(images) > 0
