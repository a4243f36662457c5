"""What the backward pass keeps of a layer: the gradients are the same, the memory is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import OPTIONS
from support import few

import lorax
from lorax import intercept, leaves, methods, ops, quant, tree
from lorax.models import layers, unet, vision
from lorax.models.families import FAMILIES

#: One a file of `lorax.models`: what transformers' config.json would say.
SMALL = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 64},
    "llama": {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 172}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"vocab_size": 64},
    "bert": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 256, "vocab_size": 64, "architectures": ["BertForMaskedLM"]},
    "deberta-v2": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 256, "vocab_size": 64, "relative_attention": True}
    | {"pos_att_type": ["c2p", "p2c"], "architectures": ["DebertaV2ForMaskedLM"]},
    "vit": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 256, "image_size": 16, "patch_size": 4},
    "DiTTransformer2DModel": {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4}
    | {"sample_size": 16, "patch_size": 4},
    "clip_text_model": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 256, "vocab_size": 64, "max_position_embeddings": 128},
}


def test_every_family_is_here():
    sources = {source for source, _ in FAMILIES.values()}
    # which have no stacked layers; the U-Net's test is in its file
    assert {FAMILIES[name][0] for name in SMALL} == sources - {vision, unet}


def program(name, remat, shape, **run):
    """(gradient with respect to LoRA factors on all linear layers, what it takes)."""
    source, model = FAMILIES[name]
    config = source.config_from_hf(SMALL[name] | {"model_type": name}, remat=remat, **run)
    module, vision = model(config), hasattr(config, "image_shape")
    rng = np.random.default_rng(0)
    size = (shape[0], *config.image_shape) if vision else shape
    x = rng.normal(size=size).astype(np.float32) if vision else rng.integers(1, 64, size)
    x = (jnp.asarray(x, None if vision else jnp.int32),)
    if hasattr(config, "condition"):  # timesteps, and classes or the states of texts
        given = rng.uniform(0, 5, (shape[0], *config.condition.shape))
        x += jnp.arange(shape[0]), jnp.asarray(given, config.condition.dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), *x)["params"]
    sites = intercept.sites(module, params, *x)
    params = jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params)
    method = methods.method("lora", rank=2, targets=("all-linear",))
    trainable, constants = method.init(jax.random.key(0), params, sites)
    noise = lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype)

    def loss(trainable):
        bound = method.bind(trainable, constants, params, sites=sites)
        outputs = intercept.apply(module, bound, *x)
        return jnp.mean(jnp.square(jax.nn.logsumexp(outputs, axis=-1)))

    return jax.grad(loss), jax.tree.map(noise, trainable)


def compiled(name, remat, shape=(2, 12), **run):
    gradient, trainable = program(name, remat, shape, **run)
    return jax.jit(gradient, compiler_options=OPTIONS).lower(trainable).compile(), trainable


@pytest.mark.parametrize("name", few(SMALL, [], ["gpt2", "deberta-v2"]))
def test_policies_change_no_gradient(name):
    """Beyond the rounding of operations that XLA joins in another way: a gradient's own, and, as
    what goes through a softmax is a difference of larger numbers, one of the largest gradient's."""
    run = lambda remat: (lambda f, x: tree.flatten(f(x)))(*compiled(name, remat))
    want = run("none")
    rounding = np.finfo(np.float32).eps * max(np.abs(g).max() for g in want.values())
    for remat in layers.POLICIES:
        for path, got in run(remat).items():
            scale = np.abs(want[path]).max()
            assert scale > 1e-6 and scale > 500 * rounding, path
            atol = 1e-6 * scale + rounding
            np.testing.assert_allclose(got, want[path], rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", few(SMALL, ["llama"], ["deberta-v2"]))
def test_what_is_made_again_is_not_kept(name):
    """Of short texts, where the products' outputs are the larger part of what a layer keeps."""
    shape = (8, 128)
    none, dots, full = (
        compiled(name, remat, shape)[0].memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "full")
    )
    assert full < 0.9 * dots and dots < 0.9 * none, (none, dots, full)


@pytest.mark.parametrize(
    ("remat", "hint"),
    [(True, 'did you mean "full"'), (False, 'did you mean "none"'), ("dot", "did you mean 'dots'")],
)
def test_another_word_is_an_error_that_says_which_there_are(remat, hint):
    with pytest.raises(ValueError, match=f"remat: {remat!r} given, .* none, full, dots.*{hint}"):
        lorax.load("random:gpt2-nano", remat=remat)


a, b = jnp.ones((64, 2)), jnp.ones((2, 32))
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
PRODUCTS = {
    "nf4": (ops.linear, quant.quantise(KERNEL, "nf4", double=True)),
    "half": (ops.linear, leaves.BFloat16Weight.of(KERNEL)),
    "out of a rank": (leaves.out_of_rank, KERNEL),
    "merged": (lambda x, w: leaves.merged_linear(x, w, a, b, jnp.float32(2)), KERNEL),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_kept_and_what_it_makes_of_a_weight_is_not(name):
    """With "dots" the output of a product with a backward pass of its own, and with neither policy
    a weight decoded or with an update added: beside the weight itself nothing has its size."""
    product, w = PRODUCTS[name]
    f = lambda x: jnp.sum(jnp.sin(product(jnp.cos(x), w)))

    def kept(remat):
        """Shapes and types of what the backward pass holds, and the gradient."""
        _, pull = jax.vjp(jax.checkpoint(f, policy=layers.POLICIES[remat]), jnp.ones((3, 64)))
        return [(x.shape, x.dtype) for x in jax.tree.leaves(pull)], pull(jnp.float32(1))

    (full, again), (dots, gradient) = kept("full"), kept("dots")
    own = [(x.shape, x.dtype) for x in jax.tree.leaves(w)]
    for found in (full, dots):
        large = [x for x in found if np.prod(x[0]) >= KERNEL.size // 2]
        assert large == [x for x in own if np.prod(x[0]) >= KERNEL.size // 2]
    assert ((3, 32), jnp.float32) in dots and ((3, 32), jnp.float32) not in full
    np.testing.assert_array_equal(again, gradient)
