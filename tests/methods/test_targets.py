"""What target words mean, and which layers they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import intercept, methods, ops, tree
from lorax.models import gpt2
from lorax.ops import Site


def gpt2_shapes(tied=True):
    config = gpt2.Config(20, 4, 8, 3, 2, tie_word_embeddings=tied)
    init = gpt2.GPT2(config).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


TIED, UNTIED = ops.sites_from_shapes(gpt2_shapes()), ops.sites_from_shapes(gpt2_shapes(False))
LINEAR = Site("linear", 0, (0,), (1,))
#: A model that nobody here wrote: layers by number, words at the top level, a convolution.
FOREIGN = {
    "embed/embedding": Site("embed", 0, (0,), (1,)),
    "patch/kernel": Site("conv", 0, (0, 1, 2), (3,)),
    "h_0/q/kernel": LINEAR,
    "h_0/gate/kernel": LINEAR,
    "h_1/q/kernel": LINEAR,
    "q/kernel": LINEAR,
    "lm_head/kernel": LINEAR,
}


@pytest.mark.parametrize(
    ("sites", "targets", "expected"),
    [
        (TIED, ("q",), "h/attn/q"),
        (TIED, "v", "h/attn/v"),  # a word alone
        (TIED, ("v", "q", "q"), "h/attn/q h/attn/v"),
        (TIED, ("attention",), "h/attn/q h/attn/k h/attn/v h/attn/o"),
        (TIED, ("mlp",), "h/mlp/up h/mlp/down"),
        (TIED, ("embed", "down"), "h/mlp/down wte"),
        (TIED, ("re:.*/attn/[qv]/kernel", "up"), "h/attn/q h/attn/v h/mlp/up"),
        (TIED, ("re:wpe/.*",), "wpe"),
        (UNTIED, ("head",), "lm_head"),
        (UNTIED, ("all-linear",), "h/attn/q h/attn/k h/attn/v h/attn/o h/mlp/up h/mlp/down"),
        (FOREIGN, ("q",), "h_0/q h_1/q q"),
        (FOREIGN, ("mlp",), "h_0/gate"),
        (FOREIGN, ("all-linear",), "patch h_0/q h_0/gate h_1/q q"),
        (FOREIGN, ("embed", "head"), "embed lm_head"),
    ],
)
def test_resolve(sites, targets, expected):
    chosen = methods.resolve(targets, sites)
    assert {path.rsplit("/", 1)[0] for path in chosen} == set(expected.split())
    assert chosen.items() <= sites.items()
    assert list(chosen) == [path for path in sites if path in chosen]  # one order for all members


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((), "method.targets: empty; there is q, k"),
        (("q", "gate"), "method.targets: 'gate' matches nothing; there is .*h/attn/q/kernel"),
        (("query",), "'query' matches nothing; there is q, k, v, o, up, down, embed and paths"),
        (("atention",), "'atention' matches nothing.*did you mean 'attention'"),
        (("head",), r"'head' matches nothing \(a tied head is adapted through 'embed'\)"),
        (
            ("re:h/attn/q",),
            r"'re:h/attn/q' matches nothing.*: 're:h/attn/q\.\*' matches h/",
        ),
        (("re:attn/q/kernel",), r"whole path: 're:\.\*/attn/q/kernel' matches h/attn/q/kernel"),
        (("re:q|v",), r"whole path: 're:\.\*\(q\|v\)\.\*' matches h/attn/q/kernel"),
        (("re:nothing",), "a regex must match a whole path$"),
        (("re:(",), r"'re:\(' is not a regex"),
    ],
)
def test_a_target_that_matches_nothing_lists_what_there_is(targets, message):
    with pytest.raises(ValueError, match=message):
        methods.resolve(targets, TIED)


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_error_blames_words_that_nobody_gave(name):
    params = {"other": {"weight": jnp.ones((3, 4))}}
    hp = {"dim": 2} if "dim" in methods.hyperparameters(name) else {}
    try:
        methods.method(name, **hp).init(jax.random.key(0), params)
    except ValueError as error:
        assert "matches nothing" not in str(error) and "re:" not in str(error)
        assert str(error).startswith(("method.targets: none given", "method.name: ")), error


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_tree_around_the_parameters_is_refused(name):
    params = {"params": gpt2_shapes(True)}
    hp = {"dim": 2} if "dim" in methods.hyperparameters(name) else {}
    with pytest.raises(
        ValueError, match=r'params: \{"params": ...\} given, must be the tree inside'
    ):
        methods.method(name, **hp).init(jax.random.key(0), params, TIED)
    module = gpt2.GPT2(gpt2.Config(20, 4, 8, 3, 2))
    for ask in (intercept.sites, intercept.apply):
        with pytest.raises(ValueError, match="must be the tree inside"):
            ask(module, params, jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("tied", [True, False])
def test_sites_by_shape_are_the_traced_ones(tied):
    shapes = gpt2_shapes(tied)
    module = gpt2.GPT2(gpt2.Config(20, 4, 8, 3, 2, tie_word_embeddings=tied))
    traced = intercept.sites(module, shapes, jnp.zeros((1, 1), jnp.int32))
    assert traced == ops.sites_from_shapes(shapes)
    assert len(traced) == 6 + 2 + (not tied)


# ------------------------------------------------------------------------------------------ layers

STACKED = {"h/q/kernel": Site("linear", 1, (0,), (1,)), "wte/embedding": TIED["wte/embedding"]}
STACKED_SHAPES = {"h/q/kernel": (3, 8, 8), "wte/embedding": (20, 8)}
LOOPED = {f"h_{i}/q/kernel": LINEAR for i in range(3)}
LOOPED_SHAPES = dict.fromkeys(LOOPED, (8, 8))
NUMBERED = {f"layers/{i}/mlp_2/up/kernel": LINEAR for i in range(3)}


@pytest.mark.parametrize(
    ("targets", "shapes", "layers", "expected"),
    [
        (STACKED, STACKED_SHAPES, None, [[1, 1, 1], 1]),
        (STACKED, STACKED_SHAPES, (0, -1), [[1, 0, 1], 0]),
        (LOOPED, LOOPED_SHAPES, None, [1, 1, 1]),
        (LOOPED, LOOPED_SHAPES, (-2,), [0, 1, 0]),
        (NUMBERED, dict.fromkeys(NUMBERED, (8, 8)), (0, 2), [1, 0, 1]),
    ],
)
def test_active_layers(targets, shapes, layers, expected):
    active = methods.active_layers(layers, targets, shapes)
    assert list(active) == list(targets)
    for mask, wanted in zip(active.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, np.array(wanted, bool))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), r"method.layers: \[3\] given, the targets have 3 layers"),
        ((), r"method.layers: \(\) given"),
    ],
)
def test_a_layer_that_no_target_has_is_an_error(layers, message):
    with pytest.raises(ValueError, match=message):
        methods.active_layers(layers, LOOPED, LOOPED_SHAPES)


def test_layers_that_leave_nothing_are_an_error():
    targets = {"h_0/up/kernel": LINEAR, "h_2/up/kernel": LINEAR}
    with pytest.raises(ValueError, match=r"\[1\] leave nothing of h_0/up/kernel, h_2/up/kernel"):
        methods.active_layers((1,), targets, dict.fromkeys(targets, (8, 8)))


def test_every_path_has_a_key_of_its_own():
    key = jax.random.key(0)
    paths = list(tree.flatten(gpt2_shapes(False)))
    keys = {tuple(jax.random.key_data(methods.key_for(key, path)).tolist()) for path in paths}
    assert len(keys) == len(paths)
    assert methods.key_for(key, "wte") == methods.key_for(key, "wte")


@pytest.mark.parametrize("axes", [(), (3,), (2, 2)])
def test_arrays_are_filled_alike_where_shapes_alone_are_asked_for(axes):
    """Scalars too, in weights that are not stacked; padding, and layers that are not active."""
    active = np.ones(axes, bool)
    if axes:
        active[(0,) * len(axes)] = False
    shapes = {"a": (4, 3), "gate": ()}
    draw = lambda key, index: {"a": jax.random.normal(key, (4, 2))}
    fill = lambda key: methods.fill(key, axes, active, shapes, draw)
    found = fill(jax.random.key(0))
    assert jax.eval_shape(fill, jax.random.key(0)) == jax.eval_shape(lambda: found)
    assert found["a"].shape == (*axes, 4, 3) and found["gate"].shape == axes
    assert not found["a"][..., 2].any() and not found["gate"].any()
    np.testing.assert_array_equal(found["a"].any((-2, -1)), active)
    keys = jax.random.split(jax.random.key(0), max(1, active.size))
    last = found["a"].reshape(-1, 4, 3)[-1, :, :2]
    np.testing.assert_array_equal(last, jax.random.normal(keys[-1], (4, 2)))
