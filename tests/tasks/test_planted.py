"""Planted tasks: what is planted has the rank, spectrum, norm and dimension that the facts say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from lorax import intercept, methods, tree
from lorax.analysis.calibration import knee
from lorax.config import default
from lorax.methods import lora
from lorax.models import Base, vision
from lorax.models.families import Traits
from lorax.tasks import planted


def mlp(*widths, seed=0):
    config = vision.MLPConfig(widths)
    module, example = vision.MLP(config), vision.example(config)
    params = module.init(jax.random.key(seed), example)["params"]
    name = "random:mlp-" + "-".join(map(str, widths))
    return Base(
        module,
        params,
        config,
        None,
        intercept.sites(module, params, example),
        "mlp",
        name,
    )


def task(base, **changes):
    config = default().task.to_dict() | {"name": "planted", "rank": 2, "examples": 256}
    config = config | changes
    return planted.load(config, base).build(config, None, 1, base)


def outputs(base, params, rows):
    return np.asarray(intercept.apply(base.module, params, rows["inputs"]))


def flat(inputs):
    return inputs.reshape(len(inputs), -1)


@pytest.fixture(scope="module")
def layer():
    return mlp(10, 6)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize(
    "spectrum, relative",
    [("flat", [1, 1, 1]), ("linear", [3, 2, 1]), ("geometric", [1, 0.5, 0.25])],
)
def test_an_update_has_its_rank_spectrum_and_norm(spectrum, relative, rank):
    sigma = planted.singular_values(spectrum, rank, 7.0)
    found = np.linalg.svd(planted.update(np.random.default_rng(0), (10, 6), sigma))[1]
    np.testing.assert_allclose(found[:rank], sigma, rtol=1e-12)
    np.testing.assert_allclose(found[rank:], 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found), 7.0, rtol=1e-12)
    if rank == 3:
        np.testing.assert_allclose(sigma / sigma[0], np.divide(relative, relative[0]), rtol=1e-12)


@pytest.mark.parametrize("rank, spectrum", [(2, "flat"), (4, "geometric"), (None, "linear")])
def test_labels_are_those_of_the_planted_teacher(layer, rank, spectrum):
    made = task(layer, rank=rank, spectrum=spectrum, strength=0.5)
    change = made.train["label"] - outputs(layer, layer.params, made.train)
    dw, residual, *_ = np.linalg.lstsq(flat(made.train["inputs"]), change, rcond=None)
    assert residual.max() < 1e-8  # the bias is untouched, and nothing else is added
    sigma, want = np.linalg.svd(dw)[1], made.facts["planted"]["head"]
    r = 6 if rank is None else rank
    assert len(want) == r
    np.testing.assert_allclose(sigma, [*want, *[0] * (6 - r)], atol=2e-5)
    norm = np.linalg.norm(layer.params["head"]["kernel"])
    np.testing.assert_allclose(np.linalg.norm(dw), 0.5 * norm, rtol=1e-5)


def test_a_rank_for_each_kernel():
    base = mlp(8, 7, 6)
    made = task(base, rank=(0, 3), spectrum="linear")
    assert {path: len(s) for path, s in made.facts["planted"].items()} == {"dense_1": 0, "head": 3}
    w, b = (np.asarray(base.params["dense_1"][name]) for name in ("kernel", "bias"))
    hidden = np.maximum(flat(made.train["inputs"]) @ w + b, 0)
    change = made.train["label"] - outputs(base, base.params, made.train)
    dw = np.linalg.lstsq(hidden, change, rcond=None)[0]
    np.testing.assert_allclose(
        np.linalg.svd(dw)[1], [*made.facts["planted"]["head"], 0, 0, 0], atol=1e-4
    )
    both = task(base, rank=2).facts["planted"]
    assert {path: len(s) for path, s in both.items()} == {"dense_1": 2, "head": 2}


@pytest.mark.parametrize("p", [1, 4, None])
def test_d_star_is_the_rank_of_the_jacobian(layer, p):
    """Codimension of the solutions: every output on every input, by all parameters."""
    made = task(layer, inputs=p)
    inputs = made.train["inputs"][:40]
    assert np.linalg.matrix_rank(flat(inputs)) == (10 if p is None else p)
    jacobian = jax.jacobian(lambda params: intercept.apply(layer.module, params, inputs))(
        layer.params
    )
    parts = {k: np.reshape(v, (40 * 6, -1)) for k, v in tree.flatten(jacobian).items()}
    rank = lambda names: np.linalg.matrix_rank(np.hstack([parts[n] for n in names]))
    assert rank(parts) == made.facts["planted_dim"] == ((10 if p is None else p) + 1) * 6
    assert rank(["head/kernel"]) == (10 if p is None else p) * 6


def test_d_star_is_one_linear_layers_alone():
    assert task(mlp(8, 7, 6)).facts["planted_dim"] is None


def test_few_rows_determine_less(layer):
    assert task(layer, n_train=3).facts["planted_dim"] == 3 * 6


def test_noise_is_in_training_labels_alone(layer):
    clean, noisy, more = (task(layer, noise=x, examples=4096) for x in (0.0, 0.5, 1.0))
    for name in ("inputs", "label", "weight"):
        np.testing.assert_array_equal(clean.eval[name], noisy.eval[name])
    np.testing.assert_array_equal(clean.train["inputs"], noisy.train["inputs"])
    noise = noisy.train["label"] - clean.train["label"]
    signal = clean.train["label"] - outputs(layer, layer.params, clean.train)
    assert 0.97 < np.std(noise) / np.std(signal) / 0.5 < 1.03  # 3 x the error of 24,576 draws
    np.testing.assert_allclose(more.train["label"] - clean.train["label"], 2 * noise, atol=1e-5)


def test_all_is_drawn_from_the_tasks_seed(layer):
    first, again, other = task(layer), task(layer), task(layer, seed=1)
    for rows in ("train", "eval"):
        for name, x in getattr(first, rows).items():
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, getattr(again, rows)[name])
    assert first.facts == again.facts
    assert not np.allclose(first.train["inputs"], other.train["inputs"])
    # The same inputs whatever is planted, and the same evaluation however many rows there are.
    np.testing.assert_array_equal(first.train["inputs"], task(layer, rank=5).train["inputs"])
    np.testing.assert_array_equal(first.eval["label"], task(layer, examples=64).eval["label"])


def test_rows_and_note(layer):
    made = task(layer, n_train=100, inputs=4, noise=0.1)
    assert made.train["label"].shape == (100, 6) and made.train["weight"].sum() == 100
    assert made.train["inputs"].shape == (100, *layer.config.image_shape)
    np.testing.assert_array_equal(
        made.train["label"], task(layer, inputs=4, noise=0.1).train["label"][:100]
    )
    assert "rank 2 in head" in made.note and "4 of 10 dimensions, so d* = 30" in made.note


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 7}, r"task.rank: 7 given, .* head 10 x 6"),
        ({"rank": 0}, "task.rank: 0 given, must be 1 to"),
        ({"rank": 1.5}, "task.rank: 1.5 given, must be an integer"),
        ({"rank": True}, "task.rank: True given"),
        ({"rank": (2, 2)}, r"task.rank: \(2, 2\) given, .* has 1 linear kernels: head 10 x 6"),
        ({"rank": (0,)}, "nothing is planted"),
        ({"spectrum": "flatt"}, "task.spectrum: 'flatt' given, .*did you mean 'flat'"),
        ({"strength": 0.0}, "task.strength: 0.0 given, must be positive"),
        ({"noise": -0.1}, "task.noise: -0.1 given, must not be negative"),
        ({"inputs": 11}, "task.inputs: 11 given, must be 1 to 10"),
        ({"inputs": 0}, "task.inputs: 0 given"),
        ({"examples": 0}, "task.examples: 0 given"),
        ({"n_train": 257}, "task.n_train: 257"),
        ({"seed": -1}, "task.seed: -1 given"),
    ],
)
def test_a_mistake_is_one_clear_error(layer, changes, message):
    with pytest.raises(ValueError, match=message):
        task(layer, **changes)


def test_a_base_that_does_not_fit(layer):
    with pytest.raises(ValueError, match="base: .* has no linear layer"):
        task(layer.replace(sites={}))
    with pytest.raises(ValueError, match="base: .* reads no arrays"):
        task(layer.replace(traits=Traits()))


def test_the_knee_of_what_lora_learns_is_the_planted_rank():
    """Ranks 1, 2 and 3 on an update of rank 2, side by side."""
    base = mlp(12, 12)
    made = task(base, rank=2, examples=512)
    ranks, steps, targets = (1, 2, 3), 150, ("re:.*/kernel",)
    built = [lora.lora(rank=r, alpha=1.0, scaling="fixed", targets=targets) for r in ranks]
    sites = methods.resolve(targets, base.sites)
    init = lambda m: m.init(jax.random.key(1), base.params, base.sites, sites, max(ranks))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(init(m) for m in built))
    optimizer = optax.adam(optax.linear_schedule(5e-2, 0.0, steps))

    def loss(trainable, constants, rows):
        bound = built[0].bind(trainable, constants, base.params, None, base.sites)
        return jnp.mean(
            jnp.square(intercept.apply(base.module, bound, rows["inputs"]) - rows["label"])
        )

    def train(trainable, constants):
        def step(carry, _):
            trainable, state = carry
            grads = jax.grad(loss)(trainable, constants, made.train)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(trainable, updates), state), None

        start = trainable, optimizer.init(trainable)
        (trainable, _), _ = jax.lax.scan(step, start, length=steps)
        return loss(trainable, constants, made.eval)

    losses = jax.jit(jax.vmap(train))(stacked.trainable, stacked.constants)
    before = float(np.mean((outputs(base, base.params, made.eval) - made.eval["label"]) ** 2))
    table = pd.DataFrame({"rank": ranks, "mean": np.asarray(losses)})
    assert knee(table, before) == 2
    assert losses[1] < 1e-3 * before
    assert 0.4 < losses[0] / before < 0.65  # half of a flat spectrum of two
