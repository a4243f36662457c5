"""Optimisers of LoRA's product: what a change of its factors leaves, references, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from support import require

from lorax import config, ops, tree
from lorax.train import factor_optim, optim

IN, OUT, RANK, LAYERS = 12, 9, 3, 2
SITES = {"h/q/kernel": ops.Site("linear", 1, (0,), (1,))}
RATE, DECAY = 0.05, 0.3


def drawn(seed: int, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors(seed=0, rank=RANK):
    return drawn(seed, LAYERS, IN, rank), drawn(seed + 1, LAYERS, rank, OUT)


def tree_of(a, b, **others):
    return {"h": {"q": {"kernel": {"a": a, "b": b}}}} | others


def of_kernel(params):
    return params["h"]["q"]["kernel"]["a"], params["h"]["q"]["kernel"]["b"]


def transformation(name, scale=1.0, decay=DECAY, **changes):
    section = config.default().train
    section.update(dict(steps=99, warmup=0, clip=0.0, schedule="constant", optimizer=name))
    section.update(changes)
    constants = {"h": {"q": {"kernel": {"s": jnp.full(LAYERS, scale)}}}}
    return optim.optimizer(section, RATE, decay, SITES, constants)


def run(transformation, a, b, gradient, steps, **others):
    """The parameters after some steps. gradient: of the loss with respect to s a b, given a b."""
    params = tree_of(a, b, **others)

    @jit
    def step(params, state):
        a, b = of_kernel(params)
        g = gradient(a @ b)
        grads = tree_of(g @ jnp.swapaxes(b, -2, -1), jnp.swapaxes(a, -2, -1) @ g, **others)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


TARGET = drawn(5, LAYERS, IN, OUT)
TO_TARGET = lambda product: jnp.asarray(product - TARGET)


# ------------------------------------------------------------------------------------- invariance


def other_factors(a, b):
    """(a q, q^-1 b): the same product by badly balanced factors."""
    q = drawn(7, RANK, RANK) * np.float32([30, 1, 0.1])
    return a @ q, np.linalg.solve(q, b)


def test_lora_muon_moves_the_product_the_same_whatever_its_factors():
    """Ten steps with momentum and decay."""
    a, b = factors()
    muon = transformation("lora-muon")
    products = [
        np.matmul(*of_kernel(run(muon, *pair, TO_TARGET, 10)))
        for pair in ((a, b), other_factors(a, b))
    ]
    assert np.abs(products[0] - a @ b).max() > 0.1
    np.testing.assert_allclose(products[1], products[0], atol=2e-3 * np.abs(products[0]).max())


def test_riemannian_gradients_move_the_product_the_same_whatever_its_factors():
    """The gradients before Adam, which sees the factors' entries, and with hardly any damping."""
    a, b = factors()
    plain = optax.chain(factor_optim.riemannian(1e-9), optax.scale(-0.02))
    products = [
        np.matmul(*of_kernel(run(plain, *pair, TO_TARGET, 5)))
        for pair in ((a, b), other_factors(a, b))
    ]
    assert np.abs(products[0] - a @ b).max() > 0.1
    np.testing.assert_allclose(products[1], products[0], atol=2e-3 * np.abs(products[0]).max())
    sgd = optax.scale(-1e-4)  # is not
    one, other = (
        np.matmul(*of_kernel(run(sgd, *pair, TO_TARGET, 5)))
        for pair in ((a, b), other_factors(a, b))
    )
    assert np.abs(one - other).max() > 0.01


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_each_half_of_a_lora_muon_step_has_half_the_rate_as_spectral_norm(scale):
    a, b = factors()
    muon = transformation("lora-muon", scale)
    new_a, new_b = of_kernel(run(muon, a, b, TO_TARGET, 1))
    keep = np.sqrt(1 - RATE * DECAY)
    halves = (new_a - keep * a) * keep @ b, a @ ((new_b - keep * b) * keep)
    for half in halves:
        sigma = scale * np.linalg.svd(half, compute_uv=False)
        np.testing.assert_allclose(sigma[:, :RANK], RATE / 2, rtol=1e-3)


def test_lora_muon_of_full_rank_is_muon_of_the_product():
    """b square: da b alone is lr / 2 msign(g), by numpy in float64; the decay is the product's."""
    a, b = drawn(0, LAYERS, IN, OUT), drawn(1, LAYERS, OUT, OUT)
    new_a, _ = of_kernel(run(transformation("lora-muon"), a, b, TO_TARGET, 1))
    keep = np.sqrt(1 - RATE * DECAY)
    u, _, vt = np.linalg.svd((a @ b - TARGET).astype(float), full_matrices=False)
    moved = (new_a - keep * a) * keep @ b
    np.testing.assert_allclose(moved, -RATE / 2 * (u @ vt), atol=2e-5)
    still = of_kernel(run(transformation("lora-muon"), a, b, jnp.zeros_like, 1))
    np.testing.assert_allclose(np.matmul(*still), (1 - RATE * DECAY) * (a @ b), rtol=1e-4)


# ------------------------------------------------------------------------------------- references


def test_riemannian_is_pefts_step_by_step():
    """Five steps of AdamW on two layers, with another weight beside them."""
    torch, riemannian = require("torch"), require("peft.optimizers.riemannian")
    (a, b), bias = factors(), drawn(9, 4)
    ours = run(transformation("riemannian", damping=0.03), a, b, TO_TARGET, 5, bias=bias)
    for i in range(LAYERS):

        class Pair(torch.nn.Module):
            def __init__(self, i=i):
                super().__init__()
                linear = lambda w: torch.nn.ModuleDict({"default": _linear(torch, w)})
                self.lora_A, self.lora_B = linear(a[i].T), linear(b[i].T)

        model, target = torch.nn.ModuleDict({"q": Pair()}), torch.tensor(TARGET[i].T)
        how = dict(reg=0.03, weight_decay=DECAY)
        step = riemannian.create_riemannian_optimizer(model, torch.optim.AdamW, lr=RATE, **how)
        weights = [part["default"].weight for part in (model["q"].lora_A, model["q"].lora_B)]
        for _ in range(5):
            step.zero_grad()
            (0.5 * (weights[1] @ weights[0] - target).square().sum()).backward()
            step.step()
        for x, theirs in zip(of_kernel(ours), weights, strict=True):
            np.testing.assert_allclose(x[i], theirs.detach().numpy().T, rtol=1e-4, atol=1e-5)
    alone = transformation("adamw")
    with jax.numpy_dtype_promotion("standard"):
        state, plain = alone.init({"bias": bias}), {"bias": bias}
        for _ in range(5):
            updates, state = alone.update({"bias": bias}, state, plain)
            plain = optax.apply_updates(plain, updates)
    np.testing.assert_allclose(ours["bias"], plain["bias"], rtol=1e-6)


def _linear(torch, weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(weight))
    return layer


@pytest.mark.parametrize("name", ["riemannian", "lora-muon"])
def test_what_is_no_pair_is_trained_by_adam(name):
    """A weight trained in full, lengths of DoRA, and a bias, which does not decay."""
    a, b = factors()
    others = {"head": {"kernel": {"w": drawn(3, 4, 4)}, "bias": {"w": drawn(4, 4)}}}
    ours, adam = (
        run(transformation(optimizer), a, b, TO_TARGET, 3, **others)
        for optimizer in (name, "adamw")
    )
    for path, x in tree.flatten(ours["head"]).items():
        np.testing.assert_allclose(x, tree.flatten(adam["head"])[path], rtol=1e-6, err_msg=path)


# ------------------------------------------------------------------------------- padding, zeros


@pytest.mark.parametrize("name", ["riemannian", "lora-muon"])
def test_padding_changes_no_step(name):
    """Rank 3 padded to 14, above both sizes of the matrix; and a layer that is not adapted."""
    a, b = factors()
    a[1], b[1] = 0, 0
    wide = np.pad(a, ((0, 0), (0, 0), (0, 11))), np.pad(b, ((0, 0), (0, 11), (0, 0)))
    of = transformation(name)
    (a, b), (wide_a, wide_b) = (of_kernel(run(of, *pair, TO_TARGET, 6)) for pair in ((a, b), wide))
    np.testing.assert_allclose(wide_a[0, :, :RANK], a[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(wide_b[0, :RANK], b[0], rtol=1e-4, atol=1e-5)
    assert not wide_a[0, :, RANK:].any() and not wide_b[0, RANK:].any()
    assert not wide_a[1].any() and not wide_b[1].any()


@pytest.mark.parametrize("zero", ["a", "b"])
def test_lora_muon_starts_from_a_factor_of_zero(zero):
    """The first step moves that factor alone, and the product by half the rate in every direction;
    then both move."""
    a, b = factors()
    start = (np.zeros_like(a), b) if zero == "a" else (a, np.zeros_like(b))
    muon = transformation("lora-muon")
    once = of_kernel(run(muon, *start, TO_TARGET, 1))
    sigma = np.linalg.svd(np.matmul(*once), compute_uv=False)[:, :RANK]
    np.testing.assert_allclose(sigma, RATE / 2, rtol=1e-3)
    losses = [
        np.square(np.matmul(*of_kernel(run(muon, *start, TO_TARGET, n))) - TARGET).sum()
        for n in (0, 10, 40)
    ]
    assert losses[2] < losses[1] < losses[0]


# -------------------------------------------------------------------------------- learning, errors


@pytest.mark.parametrize(("name", "balance"), [("riemannian", 1.0), ("lora-muon", 20.0)])
def test_it_finds_a_matrix_of_the_rank_of_its_factors(name, balance):
    """Where AdamW at the same rate leaves more; LoRA-Muon also if a is 4,000 times as large as b.
    What it leaves is a share of the target's energy."""
    target, (a, b) = np.matmul(*factors(20)) / 10, factors()
    left = {}
    for optimizer in (name, "adamw"):
        ours = transformation(optimizer, decay=0.0, schedule="linear", steps=300)
        start = a * balance, b / (10 * balance)
        product = np.matmul(*of_kernel(run(ours, *start, lambda x: jnp.asarray(x - target), 300)))
        left[optimizer] = np.square(product - target).sum() / np.square(target).sum()
    assert left[name] < 2e-5 and left[name] < 0.1 * left["adamw"], left


@pytest.mark.parametrize("optimizer", ["riemannian", "lora-muon"])
@pytest.mark.parametrize("name", ["lora-fa", "adalora", "vera", "full"])
def test_methods_without_two_factors_are_refused_before_the_work(optimizer, name):
    c = config.default()
    c.method.name, c.train.optimizer = name, optimizer
    message = f"train.optimizer: '{optimizer}' given, needs a method with LoRA's .* lora, .*; not"
    with pytest.raises(ValueError, match=f"{message} {name}"):
        config.members(c)
    c.method.name = "dora"
    assert len(config.members(c)) == 1
