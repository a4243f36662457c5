"""Optimisers against torch's, with what members differ in traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from support import require

from lorax import config, tree
from lorax.train import optim

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
    "ln": {"scale": RNG.normal(size=4)},
    "q": {"kernel": {"a": RNG.normal(size=(3, 2)), "b": RNG.normal(size=(2, 3))}},
}
PARAMS = jax.tree.map(np.float32, PARAMS)
GRADS = [jax.tree.map(lambda x: np.float32(RNG.normal(size=x.shape)), PARAMS) for _ in range(10)]


def train(**changes):
    section = config.default().train
    section.update(dict(steps=10, warmup=0, clip=0.0) | changes)
    return section


@functools.cache
def stepper(static, constant=None):
    """A jitted step; lr and weight_decay are arguments, or constants if they are given."""
    section = train(**dict(static))

    @jit
    def step(params, state, grads, lr, weight_decay):
        lr, weight_decay = constant or (lr, weight_decay)
        with jax.numpy_dtype_promotion("standard"):
            optimizer = optim.optimizer(section, lr, weight_decay)
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(grads, lr, weight_decay, params=PARAMS, constant=False, **static):
    step = stepper(tuple(static.items()), (lr, weight_decay) if constant else None)
    state = optim.optimizer(train(**static), lr, weight_decay).init(params)
    for gradient in grads:
        params, state = step(params, state, gradient, jnp.float32(lr), jnp.float32(weight_decay))
    return params


# ---------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        (dict(schedule="constant"), [1, 1, 1, 1, 1]),
        (dict(schedule="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (dict(schedule="cosine"), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]),
        (dict(schedule="constant", warmup=2), [0, 0.5, 1, 1, 1]),
        (dict(schedule="linear", warmup=2), [0, 0.5, 1, 0.5, 0]),
        (dict(schedule="cosine", warmup=2), [0, 0.5, 1, 0.5, 0]),
        (dict(schedule="linear", warmup=4), [0, 0.25, 0.5, 0.75, 1]),
        (dict(schedule="linear", warmup=8), [0, 0.125, 0.25, 0.375, 0.5]),
    ],
)
def test_schedule_at_every_step(changes, factors):
    factor = optim.schedule(train(steps=4, **changes))
    np.testing.assert_allclose([float(factor(step)) for step in range(5)], factors, atol=1e-6)


# ----------------------------------------------------------------------------------------- members


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_traced_hyperparameters_are_as_good_as_constants(optimizer):
    traced = run(GRADS[:3], 0.03, 0.1, optimizer=optimizer)
    constant = run(GRADS[:3], 0.03, 0.1, constant=True, optimizer=optimizer)
    for path, leaf in tree.flatten(traced).items():
        np.testing.assert_allclose(leaf, tree.flatten(constant)[path], rtol=1e-6, atol=1e-7)
        assert np.abs(leaf - tree.flatten(PARAMS)[path]).max() > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_spares_biases_and_scales(optimizer):
    """Without gradients, decay is all there is: w (1 - lr wd)."""
    zero = jax.tree.map(np.zeros_like, PARAMS)
    after = tree.flatten(run([zero], 0.5, 0.2, optimizer=optimizer, schedule="constant"))
    for path, before in tree.flatten(PARAMS).items():
        spared = path.endswith(("bias", "scale"))
        np.testing.assert_allclose(after[path], before * (1 if spared else 0.9), rtol=1e-6)


def test_what_is_frozen_has_no_state():
    selected, _ = tree.split(PARAMS, lambda path: path.startswith("q/"))
    state = optim.optimizer(train(), 0.1, 0.1).init(selected)
    assert (
        tree.nbytes(state) == 2 * tree.nbytes(selected) + 4 + 4
    )  # Adam's and the schedule's count
    after = run([tree.split(GRADS[0], lambda path: path.startswith("q/"))[0]], 0.1, 0.1, selected)
    assert jax.tree.structure(after) == jax.tree.structure(selected)


# ----------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize(("clip", "length"), [(0.5, 0.5), (1e6, None), (0.0, None)])
def test_clipping_is_by_the_global_norm(clip, length):
    after = run(GRADS[:1], 1.0, 0.0, optimizer="sgd", b1=0.0, schedule="constant", clip=clip)
    update = jax.tree.map(np.subtract, PARAMS, after)
    norm = lambda t: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(t)))
    factor = 1 if length is None else length / norm(GRADS[0])
    np.testing.assert_allclose(norm(update), factor * norm(GRADS[0]), rtol=1e-5)
    for ours, gradient in zip(jax.tree.leaves(update), jax.tree.leaves(GRADS[0]), strict=True):
        np.testing.assert_allclose(ours, factor * gradient, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- torch


def torch_run(name, **hp):
    """Ten steps that decay and spare what ours do, the learning rate falling to zero."""
    torch = require("torch")
    tensors = {p: torch.nn.Parameter(torch.tensor(x)) for p, x in tree.flatten(PARAMS).items()}
    spared = [path for path in tensors if path.endswith(("bias", "scale"))]
    groups = [
        {"params": [x for p, x in tensors.items() if p not in spared]},
        {"params": [tensors[path] for path in spared], "weight_decay": 0.0},
    ]
    optimizer = getattr(torch.optim, name)(groups, **hp)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for grads in GRADS:
        for path, gradient in tree.flatten(grads).items():
            tensors[path].grad = torch.tensor(gradient)
        optimizer.step()
        schedule.step()
    return {path: tensor.detach().numpy() for path, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("ours", "weight_decay", "name", "theirs"),
    [
        (
            dict(optimizer="adamw", b1=0.8, b2=0.95, eps=1e-3),
            0.3,
            "AdamW",
            dict(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
        ),
        (dict(optimizer="sgd", b1=0.7), 0.0, "SGD", dict(momentum=0.7)),
    ],
)
def test_ten_steps_are_those_of_torch(ours, weight_decay, name, theirs):
    after = tree.flatten(run(GRADS, 0.05, weight_decay, schedule="linear", **ours))
    for path, expected in torch_run(name, lr=0.05, **theirs).items():
        assert np.abs(expected - tree.flatten(PARAMS)[path]).max() > 0.05
        np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
