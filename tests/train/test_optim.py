"""Optimisers against torch's, with what members differ in traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from support import require

from lorax import config, ops, ranges, tree
from lorax.train import matrix_optim, optim

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
    "ln": {"scale": RNG.normal(size=4)},
    "q": {"kernel": {"a": RNG.normal(size=(3, 2)), "b": RNG.normal(size=(2, 3))}},
}
PARAMS = jax.tree.map(np.float32, PARAMS)
SITES = {path: ops.Site("linear", 0, (0,), (1,)) for path in ("dense/kernel", "q/kernel")}
CONSTANTS = {"q": {"kernel": {"s": np.float32(1)}}}
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
            inner = optim.optimizer(section, lr, weight_decay, SITES, CONSTANTS)
            optimizer = optim.averaging(inner, section, lr)
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(grads, lr, weight_decay, params=PARAMS, constant=False, **static):
    step = stepper(tuple(static.items()), (lr, weight_decay) if constant else None)
    section = train(**static)
    inner = optim.optimizer(section, lr, weight_decay, SITES, CONSTANTS)
    state = optim.averaging(inner, section, lr).init(params)
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


NAMES = ranges.WORDS["train.optimizer"]


def test_every_optimizer_has_its_defaults():
    assert tuple(optim.USUAL) == NAMES


@pytest.mark.parametrize("optimizer", NAMES)
def test_traced_hyperparameters_are_as_good_as_constants(optimizer):
    how = dict(optimizer=optimizer, schedule="constant")
    traced = run(GRADS[:3], 0.03, 0.1, **how)
    constant = run(GRADS[:3], 0.03, 0.1, constant=True, **how)
    for path, leaf in tree.flatten(traced).items():
        np.testing.assert_allclose(leaf, tree.flatten(constant)[path], rtol=1e-6, atol=1e-7)
        assert np.abs(leaf - tree.flatten(PARAMS)[path]).max() > 1e-3


@pytest.mark.parametrize("optimizer", NAMES[:-1])  # the last one averages
def test_decay_spares_biases_and_scales(optimizer):
    """Without gradients, decay is all there is: w (1 - lr wd), or (1 - lr wd) a b."""
    zero = jax.tree.map(np.zeros_like, PARAMS)
    after = tree.flatten(run([zero], 0.5, 0.2, optimizer=optimizer, schedule="constant"))
    for path, before in tree.flatten(PARAMS).items():
        spared = path.endswith(("bias", "scale"))
        half = optimizer == "lora-muon" and path.startswith("q/")  # their product decays
        kept = 1 if spared else 0.9**0.5 if half else 0.9
        np.testing.assert_allclose(after[path], before * kept, rtol=1e-6)


def test_what_is_frozen_has_no_state():
    selected, _ = tree.split(PARAMS, lambda path: path.startswith("q/"))
    state = optim.optimizer(train(), 0.1, 0.1, SITES).init(selected)
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


# ------------------------------------------------------------------------------ others, and padding

STACKED = {"h": {"up": {"kernel": {"a": (3, 6, 2), "b": (3, 2, 9)}}, "ln": {"scale": {"w": (6,)}}}}
STACKED_SITES = {"h/up/kernel": ops.Site("linear", 1, (0,), (1,))}


def drawn(shapes, seed=0):
    """An array for every shape of a tree."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: np.float32(rng.normal(size=shape))
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def steps_of(transformation, params, n=6, change=lambda grads: grads):
    """The parameters after n steps along drawn gradients."""
    with jax.numpy_dtype_promotion("standard"):
        state, update = transformation.init(params), jit(transformation.update)
        for i in range(n):
            grads = change(drawn(STACKED, i + 1))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params


def of_layer(tree_, i):
    """One layer of a tree like STACKED."""
    return jax.tree.map(lambda x: x[i] if np.ndim(x) == 3 else x, tree_)


def test_lion_is_its_algorithm():
    """Algorithm 2 of arXiv:2302.06675."""
    after = tree.flatten(run(GRADS, 0.05, 0.3, optimizer="lion", schedule="constant"))
    for path, w in tree.flatten(PARAMS).items():
        m, decay = np.zeros_like(w), 0.0 if path.endswith(("bias", "scale")) else 0.3
        for grads in GRADS:
            g = tree.flatten(grads)[path]
            w = w - np.float32(0.05) * (np.sign(0.9 * m + 0.1 * g) + decay * w)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(after[path], w, rtol=1e-4, atol=1e-6, err_msg=path)


def test_adafactor_is_that_of_transformers():
    """As its Trainer sets it; a stack of layers is as many parameters there."""
    torch, optimization = require("torch"), require("transformers.optimization")
    params = drawn(STACKED)
    ours = optax.chain(matrix_optim.adafactor(STACKED_SITES), optax.scale(-0.01))
    ours = steps_of(ours, params)
    for i in range(3):
        flat = tree.flatten(of_layer(params, i))
        tensors = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in flat.items()}
        how = dict(lr=0.01, scale_parameter=False, relative_step=False)
        theirs = optimization.Adafactor(list(tensors.values()), **how)
        for n in range(6):
            for path, gradient in tree.flatten(of_layer(drawn(STACKED, n + 1), i)).items():
                tensors[path].grad = torch.tensor(gradient)
            theirs.step()
        for path, x in tree.flatten(of_layer(ours, i)).items():
            np.testing.assert_allclose(x, tensors[path].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_of_a_stack_is_that_of_optax_on_each_layer():
    params = drawn(STACKED)
    ours = optax.chain(
        matrix_optim.muon(STACKED_SITES, optax.scale_by_adam(), 0.95), optax.scale(-0.01)
    )
    ours, theirs = steps_of(ours, params)["h"]["up"]["kernel"], []
    apart = lambda grads: [of_layer(grads["h"]["up"]["kernel"], i) for i in range(3)]
    theirs = steps_of(optax.contrib.muon(0.01), apart(params), change=apart)
    for i in range(3):
        for name, x in theirs[i].items():
            np.testing.assert_allclose(ours[name][i], x, rtol=1e-5, atol=1e-6)


def test_a_kernel_trained_in_full_is_a_matrix_and_an_embedding_is_not():
    """A kernel (in, heads, d) of attention moves like its matrix (in, heads d)."""
    kernel = drawn({"q": {"kernel": {"w": (6, 2, 4)}}, "wte": {"embedding": {"w": (6, 8)}}})
    sites = {"q/kernel": ops.Site("linear", 0, (0,), (1, 2))}
    sites["wte/embedding"] = ops.Site("embed", 0, (0,), (1,))
    muon = matrix_optim.muon(sites, optax.scale_by_adam(), 0.95)
    with jax.numpy_dtype_promotion("standard"):
        update, _ = jit(muon.update)(kernel, muon.init(kernel), kernel)
    singular = np.linalg.svd(np.reshape(update["q"]["kernel"]["w"], (6, 8)), compute_uv=False)
    assert ((singular > 0.6) & (singular < 1.5)).all()  # sqrt(8 / 6) times 0.7 to 1.2
    np.testing.assert_allclose(np.abs(update["wte"]["embedding"]["w"]), 1, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_padding_of_a_rank_changes_no_step(optimizer):
    """Rank 2 padded to 9, above both sizes of `a`; and a layer that is not adapted."""
    scaling = {
        "adafactor": matrix_optim.adafactor(STACKED_SITES),
        "muon": matrix_optim.muon(STACKED_SITES, optax.scale_by_adam(), 0.95),
    }[optimizer]
    chain = optax.chain(scaling, optax.scale(-0.01))

    def wide(grads):
        kernel = grads["h"]["up"]["kernel"]
        a = np.pad(kernel["a"], ((0, 0), (0, 0), (0, 7)))
        b = np.pad(kernel["b"], ((0, 0), (0, 7), (0, 0)))
        a[1], b[1] = 0, 0
        return {"h": grads["h"] | {"up": {"kernel": {"a": a, "b": b}}}}

    alone = steps_of(chain, drawn(STACKED))["h"]["up"]["kernel"]
    padded = steps_of(chain, wide(drawn(STACKED)), change=wide)["h"]["up"]["kernel"]
    for i in (0, 2):
        np.testing.assert_allclose(padded["a"][i, :, :2], alone["a"][i], rtol=1e-5)
        np.testing.assert_allclose(padded["b"][i, :2], alone["b"][i], rtol=1e-5)
    assert not padded["a"][..., 2:].any() and not padded["b"][:, 2:].any()
    assert not padded["a"][1].any() and not padded["b"][1].any()


def test_schedule_free_is_its_algorithm():
    """Algorithm 1 of arXiv:2405.15682 with warm-up."""
    section = train(optimizer="schedule-free", schedule="constant", warmup=4)
    inner = optim.optimizer(section, 0.05, 0.3, SITES)
    transformation, params = optim.averaging(inner, section, 0.05), PARAMS
    with jax.numpy_dtype_promotion("standard"):
        state, update = transformation.init(params), jit(transformation.update)
        same = optim.averaged(params, state.z, state.b1)
        jax.tree.map(np.testing.assert_array_equal, same, params)
        for grads in GRADS:
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        after = tree.flatten(optim.averaged(params, state.z, state.b1))
    for path, w in tree.flatten(PARAMS).items():
        x, z, v, total = w, w, np.zeros_like(w), 0.0
        decay = 0.0 if path.endswith(("bias", "scale")) else 0.3
        for t, grads in enumerate(GRADS, 1):
            g, y, lr = tree.flatten(grads)[path], 0.1 * z + 0.9 * x, 0.05 * min((t - 1) / 4, 1)
            v = 0.999 * v + 0.001 * g**2
            z = z - lr * (g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * y)
            total += lr**2
            c = lr**2 / total if total else 0
            x = (1 - c) * x + c * z
        np.testing.assert_allclose(after[path], x, rtol=1e-4, atol=1e-5, err_msg=path)
