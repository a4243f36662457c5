"""Houlsby and Pfeiffer: a plain torch implementation, padding that learns nothing, no merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small
from flax import linen as nn
from quick import jit
from small import swept, three_layers
from support import few, require

import lorax
from lorax import intercept, ops, tree
from lorax.methods.bottleneck import houlsby, pfeiffer
from lorax.models.layers import ACTIVATIONS
from lorax.train import optim

TOKENS = np.random.default_rng(1).integers(0, 20, (2, 6), np.int32)
NAMES = ("down", "down_bias", "up", "up_bias")


class Words(nn.Module):
    """A layer with heads and one without, each with a bias, in the dtype of their input."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.DenseGeneral((2, 3), name="o")(x))
        return nn.Dense(4, name="down")(x.reshape(*x.shape[:-2], -1))


noisy = functools.partial(small.noisy, scale=0.2, seed=3)


def logits(base, params):
    return np.asarray(jit(functools.partial(lorax.apply, base.module))(params, TOKENS))


# ---------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("method", [houlsby(rank=2), pfeiffer(rank=3, layers=(0, -1))])
def test_it_starts_as_its_base_and_cannot_be_merged(method):
    base = three_layers()
    state = method.init(jax.random.key(0), base.params, base.sites)
    bound = method.bind(*state, base.params, sites=base.sites)
    np.testing.assert_array_equal(logits(base, bound), logits(base, base.params))
    moved = state._replace(trainable=noisy(state.trainable))
    bound = method.bind(*moved, base.params, sites=base.sites)
    assert np.abs(logits(base, bound) - logits(base, base.params)).max() > 0.01
    with pytest.raises(ValueError, match=f"{method.name}: is no change of weights"):
        lorax.merge(method, state, base.params, base.sites)
    path = "h/mlp/down/kernel"
    with pytest.raises(ValueError, match="a Bottleneck leaf is not a single kernel"):
        ops.dense(tree.flatten(bound)[path], base.sites[path])


def test_the_start_is_a_cut_off_normal_distribution():
    method = pfeiffer(rank=50, targets="up")
    state = method.init(jax.random.key(0), {"up": {"kernel": jnp.ones((4, 400))}})
    leaves = {name: np.asarray(x) for name, x in state.trainable["up"]["kernel"].items()}
    down = leaves.pop("down")
    assert down.shape == (400, 50) and 1.99e-3 < np.abs(down).max() <= 2e-3
    # Of a standard normal variable within two deviations: 0.8796. 20000 draws.
    np.testing.assert_allclose(down.std(), 0.8796e-3, rtol=0.02)
    assert leaves.keys() == set(NAMES) - {"down"} and not any(x.any() for x in leaves.values())


NORMS = (3 * 2 + 1) * 2 * 8  # two a layer and the last, scale and bias


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (houlsby(rank=2), 3 * 2 * (2 * 8 * 2 + 2 + 8) + NORMS),
        (houlsby(rank=4, layers=(1,)), 2 * (2 * 8 * 4 + 4 + 8) + NORMS),
        (houlsby(rank=1, full=("norms", "re:wpe/.*")), 6 * (2 * 8 + 1 + 8) + NORMS + 8 * 8),
        (pfeiffer(rank=2), 3 * (2 * 8 * 2 + 2 + 8)),
        (pfeiffer(rank=3, targets=("up", "o"), layers=(0, -1)), 2 * (2 * 20 * 3 + 2 * 3 + 20)),
    ],
)
def test_count_is_the_formula_and_the_size_of_the_tree(method, expected):
    base = three_layers()
    assert method.count(base.params, base.sites) == expected
    if method.hp["layers"] is None:
        state = method.init(jax.random.key(0), base.params, base.sites)
        assert tree.count(state.trainable) == expected


def test_no_activation_feels_a_unit_that_only_pads():
    assert all(f(jnp.zeros(())) == 0 for f in ACTIVATIONS.values())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_gradient_is_that_of_finite_differences_and_zero_for_padding(activation):
    x = np.random.default_rng(2).normal(size=(5, 4))
    with jax.enable_x64(True):
        params = Words().init(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.float64), noisy(params))
        sites = intercept.sites(Words(), params, x)
        method = pfeiffer(rank=2, targets=("o", "down"), activation=activation)
        trainable, constants = method.init(jax.random.key(0), params, sites, pad=4)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), noisy(trainable))
        own = {"down": (slice(None), slice(2)), "down_bias": slice(2), "up": slice(2)}
        start = tree.unflatten(
            {
                path: jnp.zeros_like(leaf).at[at].set(leaf[at])
                for path, leaf in tree.flatten(wide).items()
                for at in [own.get(path.rsplit("/", 1)[-1], slice(None))]
            }
        )

        @jax.jit
        def loss(trainable):
            bound = method.bind(trainable, constants, params, sites=sites)
            return jnp.sum(jnp.sin(lorax.apply(Words(), bound, x)))

        grads = jax.jit(jax.grad(loss))(start)
        # What is zero in the tree is padding, and so is what is zero in its gradient.
        jax.tree.map(lambda g, x: np.testing.assert_array_equal(g != 0, x != 0), grads, start)
        flat, entries = tree.flatten(start), np.random.default_rng(0)
        for path, grad in tree.flatten(grads).items():
            where = np.argwhere(flat[path])
            i = tuple(where[entries.integers(len(where))])
            at = lambda h, i=i, path=path: loss(
                tree.unflatten(flat | {path: flat[path].at[i].add(h)})
            )
            np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, grad[i], rtol=1e-5)


# ------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_a_member_learns_the_same_alone_and_in_a_sweep():
    built = [houlsby(rank=4, targets="o"), houlsby(rank=2, layers=(0, 2), targets=("o", "down"))]
    state, losses = swept(built, three_layers())
    assert np.all(losses[:, 0] == losses[0, 0]) and np.all(losses[0, 1:] != losses[1, 1:])
    together = tree.flatten(state.trainable)
    for i, method in enumerate(built):
        alone, loss = swept([method], three_layers())
        np.testing.assert_allclose(losses[i], loss[0], rtol=1e-5)
        own = tree.flatten(alone.trainable)
        for path, leaf in together.items():
            expected = np.zeros_like(leaf[i])  # exactly zero wherever the member has nothing
            if path in own:
                corner = tuple(slice(n) for n in own[path][0].shape)
                expected[corner] = own[path][0]
            np.testing.assert_array_equal(leaf[i] == 0, expected == 0, err_msg=path)
            np.testing.assert_allclose(leaf[i], expected, rtol=0, atol=2e-5)
            if "/kernel/" in path and i == 1:
                assert not np.any(leaf[1][1]) and np.any(leaf[1][0]) and np.any(leaf[1][2])


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (dict(activation="gelo"), "method.activation: 'gelo' is not one of.*did you mean 'gelu'"),
        (dict(targets="embed"), "method.targets: wte/embedding is not a linear layer's kernel"),
        (dict(targets="qq"), "method.targets: 'qq' matches nothing"),
        (dict(layers=(3,)), r"method.layers: \[3\] given, the targets have 3 layers"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(hp, message):
    for method in (houlsby, pfeiffer):
        with pytest.raises(ValueError, match=message):
            method(**hp).count(three_layers().params, three_layers().sites)


# ------------------------------------------------------------------------------------------ parity

#: name -> (family, method, {our kernel: module of transformers}, names of its norms)
CASES = {
    "gpt2-houlsby": (
        "gpt2", houlsby(rank=3), {"attn/o": "attn.c_proj", "mlp/down": "mlp.c_proj"}, "ln_",
    ),
    "llama-houlsby": (
        "llama", houlsby(rank=5, activation="relu"),
        {"attn/o": "self_attn.o_proj", "mlp/down": "mlp.down_proj"}, "norm",
    ),
    "llama-pfeiffer": ("llama", pfeiffer(rank=2), {"mlp/down": "mlp.down_proj"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", few(CASES, ("gpt2-houlsby",)))
def test_torch_computes_and_learns_the_same(name, tmp_path):
    """Hooks on a model of transformers, from the papers' formula, not from ours."""
    torch = require("torch")
    family, method, modules, norms = CASES[name]
    base, model = parity.pair(family, tmp_path)
    trainable, constants = method.init(jax.random.key(0), base.params, base.sites)
    kernels = {f"h/{ours}/kernel": theirs for ours, theirs in modules.items()}
    assert {p.rpartition("/")[0] for p in tree.flatten(trainable) if "kernel" in p} == set(kernels)
    flat = tree.flatten(trainable)
    flat |= {p: noisy({"x": x})["x"] for p, x in flat.items() if "kernel" in p}
    state = lorax.methods.State(tree.unflatten(flat), constants)

    decay, spared = [], []
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(norms is not None and norms in parameter_name)
        spared += [p] if p.requires_grad else []
    decays = tree.flatten(optim._decays(state.trainable))
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[method.hp["activation"]]
    stack = model.transformer.h if family == "gpt2" else model.model.layers
    for path, module in kernels.items():
        for i, layer in enumerate(stack):
            parts = {n: torch.tensor(np.asarray(flat[f"{path}/{n}"])[i]) for n in NAMES}
            parts = {n: torch.nn.Parameter(x) for n, x in parts.items()}
            for n, x in parts.items():
                (decay if decays[f"{path}/{n}"] else spared).append(x)

            def adapter(module, inputs, h, a=parts):
                inner = act(h @ a["down"] + a["down_bias"])
                return h + inner @ a["up"] + a["up_bias"]

            layer.get_submodule(module).register_forward_hook(adapter)
    assert sum(p.numel() for p in decay + spared) == method.count(base.params, base.sites)

    expected = parity.logits_torch(model)
    np.testing.assert_allclose(parity.logits(base, method, state), expected, rtol=0, atol=1e-5)
    groups = [dict(params=decay), dict(params=spared, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, parity.LR, weight_decay=parity.DECAY)
    losses = parity.train_torch(model, optimizer)
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(parity.train(base, method, state), losses, rtol=1e-4)
