"""Paths, rules, and trees that come apart and together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

from lorax import tree

KEYS = st.text("abc_0", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=12
).filter(lambda value: isinstance(value, dict))
TREE = {"h": {"q": {"kernel": 1, "bias": 2}, "v": {"kernel": 3}}, "wte": 4}


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(nested):
    flat = tree.flatten(nested)
    assert tree.unflatten(flat) == nested
    assert sorted(flat.values()) == sorted(jax.tree.leaves(nested))


def test_flatten_joins_keys_with_slashes_and_keeps_the_order():
    paths = ["h/q/kernel", "h/q/bias", "h/v/kernel", "wte"]
    assert list(tree.flatten(TREE)) == paths
    assert list(tree.flatten(TREE, "base")) == [f"base/{path}" for path in paths]
    assert tree.flatten(freeze(TREE)) == tree.flatten(TREE)


def test_a_sibling_is_a_leaf_of_the_same_module():
    assert tree.sibling("h/q/kernel", "bias") == "h/q/bias"
    assert tree.sibling("kernel", "bias") == "bias"


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c")])
def test_unflatten_refuses_a_path_through_a_leaf(paths):
    with pytest.raises(ValueError, match="leaf"):
        tree.unflatten(dict.fromkeys(paths, 0))


# ---------------------------------------------------------------------------------------- two trees


@given(TREES, st.randoms(use_true_random=False))
def test_combine_is_the_inverse_of_split(nested, random):
    chosen = {path: random.random() < 0.5 for path in tree.flatten(nested)}
    selected, rest = tree.split(nested, chosen.__getitem__)
    assert tree.combine(selected, rest) == tree.combine(rest, selected) == nested
    flat = tree.flatten(selected)
    assert {path: not tree.is_hole(leaf) for path, leaf in flat.items()} == chosen
    assert len(jax.tree.leaves(selected)) == sum(chosen.values())  # JAX sees nothing in a hole
    assert len(jax.tree.leaves(selected)) + len(jax.tree.leaves(rest)) == len(chosen)


def test_a_gradient_passes_holes_by():
    selected, rest = tree.split(jax.tree.map(jnp.float32, TREE), lambda path: "kernel" in path)
    grads = jax.grad(lambda t: sum(x**2 for x in jax.tree.leaves(tree.combine(t, rest))))(selected)
    held = {path: float(g) for path, g in tree.flatten(grads).items() if not tree.is_hole(g)}
    assert held == {"h/q/kernel": 2.0, "h/v/kernel": 6.0}


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (({"a": 1}, {"a": 2}), "'a' has 2 leaves in 2 trees"),
        (({"a": tree.Hole()}, {"a": tree.Hole()}), "'a' has 0 leaves in 2 trees"),
        (({"h": {"a": 1, "b": tree.Hole()}},), "'h/b' has 0 leaves in 1 trees"),
    ],
)
def test_combine_needs_one_leaf_a_path(trees, message):
    with pytest.raises(ValueError, match=message):
        tree.combine(*trees)


# -------------------------------------------------------------------------------------------- rules


def test_match_takes_the_first_rule_that_covers_a_whole_path():
    rules = [(".*/bias", "bias"), ("h/q/.*", "q"), (".*", "rest")]
    assert tree.match(rules, tree.flatten(TREE)) == {
        "h/q/kernel": "q",
        "h/q/bias": "bias",
        "h/v/kernel": "rest",
        "wte": "rest",
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("h/.*", 0)], "no rule covers 'wte'.*h/"),
        ([("h", 0), ("wte", 0)], "no rule covers 'h/q/kernel'"),  # a prefix is no match
        ([(".*", 0), ("wtf", 1)], r"rules \['wtf'\] match nothing; there is h/q/kernel"),
        ([(".*", 0), ("wte", 1)], r"rules \['wte'\] match nothing"),  # always behind another
    ],
)
def test_match_covers_all_and_uses_all_or_raises(rules, message):
    with pytest.raises(ValueError, match=message):
        tree.match(rules, tree.flatten(TREE))


# --------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("make", [np.zeros, jnp.zeros, jax.ShapeDtypeStruct])
def test_count_and_nbytes(make):
    leaves = {"a": make((3, 5), jnp.float32), "b": {"c": make((7,), jnp.bfloat16)}}
    leaves["b"]["scalar"] = make((), jnp.uint8)
    leaves["hole"] = tree.Hole()
    assert tree.count(leaves) == 15 + 7 + 1
    assert tree.nbytes(leaves) == 15 * 4 + 7 * 2 + 1
    assert tree.nbytes(make((0, 4), jnp.float32)) == 0
