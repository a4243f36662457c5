"""A leaf and a frozen weight of a user's: every layer computes with them, and no file is edited."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lorax
from lorax import leaves, ops
from lorax.ops import Site


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(ops.Leaf):
    """The same number added to every entry: dense(leaf) = dense(w) + t. t: () float32."""

    w: object
    t: jax.Array

    def linear(self, x):
        return ops.linear(x, self.w) + self.t.astype(x.dtype) * x.sum(-1, keepdims=True)

    def embed(self, ids, dtype=None):
        return ops.embed(ids, self.w, dtype) + self.t

    def attend(self, x):
        return ops.attend(x, self.w) + self.t * x.sum(-1, keepdims=True)

    def convolve(self, module, x):
        ones = jnp.ones(ops.frozen(self).shape, x.dtype)
        return ops.convolve(module, self.w, x) + self.t * ops.convolve(module, ones, x)

    def dense(self, w, site):
        return w + self.t.reshape(*self.t.shape, *(1,) * (w.ndim - self.t.ndim)).astype(w.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Tenths(leaves.FrozenWeight):
    """A kernel held as int8 tenths. codes: int8, in the kernel's own shape, which has two axes."""

    codes: jax.Array
    dtype = np.dtype(np.float32)

    @property
    def shape(self):
        return self.codes.shape

    def product(self, x, axis):
        return jnp.tensordot(x, self.decoded().astype(x.dtype), axes=((x.ndim - 1,), (axis,)))

    def rows(self, ids):
        return self.codes[ids].astype(jnp.float32) / 10

    def decoded(self):
        return self.codes.astype(jnp.float32) / 10


class Tied(nn.Module):
    def setup(self):
        self.wte = nn.Embed(7, 4)

    def __call__(self, tokens):
        return self.wte.attend(jnp.tanh(self.wte(tokens)))


LINEAR = Site("linear", 0, (0,), (1,))
X = normal(1, 2, 3, 4)
LAYERS = {
    "dense": (nn.Dense(5), X, "kernel", LINEAR),
    "heads": (nn.DenseGeneral((2, 3)), X, "kernel", Site("linear", 0, (0,), (1, 2))),
    "einsum": (
        nn.Einsum((3, 4, 5), "btd,hdk->bhtk"),
        X,
        "kernel",
        Site("linear", 0, (1,), (0, 2)),
    ),
    "conv": (nn.Conv(5, (3,)), X, "kernel", Site("conv", 0, (0, 1), (2,))),
    "tied": (Tied(), jnp.array([[1, 5, 5]]), "embedding", Site("embed", 0, (0,), (1,))),
}


def layer(name):
    """(module, inputs, the function that puts a kernel into its parameters, kernel, Site)"""
    module, inputs, name, site = LAYERS[name]
    params = module.init(jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.1, params)  # a bias is zero otherwise
    if isinstance(module, Tied):
        return module, inputs, lambda w: {"wte": {name: w}}, params["wte"][name], site
    return module, inputs, lambda w: params | {name: w}, params[name], site


def is_dense(module, inputs, put, leaf, site):
    """The model computes with the leaf what it does with the kernel that the leaf stands for."""
    bound = lorax.apply(module, put(leaf), inputs)
    plain = module.apply({"params": put(ops.dense(leaf, site))}, inputs)
    np.testing.assert_allclose(bound, plain, rtol=1e-5, atol=1e-5)
    return bound


@pytest.mark.parametrize("name", LAYERS)
def test_a_leaf_of_a_user_in_every_kind_of_layer(name):
    module, inputs, put, w, site = layer(name)
    alone = is_dense(module, inputs, put, Shifted(w, jnp.float32(0.5)), site)
    assert np.abs(alone - module.apply({"params": put(w)}, inputs)).max() > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_a_leaf_of_a_user_within_and_around_those_of_lorax(name):
    module, inputs, put, w, site = layer(name)
    _, n_in, n_out = site.matrix_shape(w.shape)
    a, b = normal(2, n_in, 2), normal(3, 2, n_out)
    leaf = leaves.LowRank(Shifted(w, jnp.float32(0.5)), a, b, jnp.float32(0.3))
    leaf = leaves.Scaled(Shifted(leaf, jnp.float32(-0.2)), normal(4, n_out))
    is_dense(module, inputs, put, leaf, site)
    assert leaves.allow_merge({"w": leaf})["w"].w.w.merge


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_a_frozen_weight_of_a_user_under_a_leaf(name):
    module, inputs, put, w, site = layer(name)
    _, n_in, n_out = site.matrix_shape(w.shape)
    held = Tenths(jnp.round(10 * w).astype(jnp.int8))
    low = leaves.LowRank(held, normal(2, n_in, 2), normal(3, 2, n_out), jnp.float32(0.3))
    for leaf in (held, low, leaves.Scaled(low, normal(4, n_out))):
        is_dense(module, inputs, put, leaf, site)


def test_the_bias_of_an_einsum_is_the_leaf_s_own():
    """A bottleneck reads its layer's output with the bias, whatever the order of its axes."""
    module, inputs, put, w, _ = layer("einsum")
    down, up = normal(2, 15, 2), normal(3, 2, 15)
    leaf = leaves.Bottleneck(w, down, jnp.zeros(2), up, jnp.zeros(15), jnp.tanh)
    plain = module.apply({"params": put(w)}, inputs)
    h = jnp.moveaxis(plain, 2, 1).reshape(2, 3, 15)  # (B, T, H K), as the kernel has its axes
    expected = (h + jnp.tanh(h @ down) @ up).reshape(2, 3, 3, 5)
    out = lorax.apply(module, put(leaf), inputs)
    np.testing.assert_allclose(out, jnp.moveaxis(expected, 1, 2), rtol=1e-5, atol=1e-5)


def test_names_that_ops_had_are_still_found_there():
    assert ops.LowRank is leaves.LowRank and ops.apply is lorax.apply
    with pytest.raises(AttributeError, match=r"lorax\.ops.*'LowRnak'"):
        _ = ops.LowRnak
