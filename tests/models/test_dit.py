"""DiT is diffusers' DiTTransformer2DModel, there and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from support import require

import lorax
from lorax import intercept, methods, tree
from lorax.files import read_json
from lorax.interop import hf
from lorax.methods import targets
from lorax.models import dit, streaming

TINY = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4)
TINY |= dict(in_channels=3, num_embeds_ada_norm=5)
VARIANTS = {
    "plain": {},
    "sigma": dict(
        in_channels=2, out_channels=4, attention_bias=False, sample_size=6, patch_size=3,
        num_layers=3, norm_eps=0.02, activation_fn="gelu",
    ),
}  # fmt: skip


@functools.cache
def reference(name):
    """A random model of diffusers, with weights and biases large enough to matter."""
    torch, diffusers = require("torch"), require("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**TINY | VARIANTS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def draw(config, batch=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *config.image_shape)).astype(np.float32)
    t, classes = np.array([0, 50, 999], np.int32), np.array([0, 3, config.no_class], np.int32)
    return x, t[:batch], classes[:batch]


def of_torch(model, x, t, classes):
    torch = require("torch")
    with torch.no_grad():
        x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        out = model(x, torch.tensor(t).long(), torch.tensor(classes).long()).sample
    return out.numpy().transpose(0, 2, 3, 1)


def read(directory, **run):
    """(module, params) of a directory that diffusers wrote."""
    config = dit.config_from_hf(read_json(directory / "config.json"), **run)
    module = dit.DiT(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *draw(config))["params"]
    shapes = {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}
    flat = hf.parameters(directory, dit.hf_tensors(config), shapes)
    return module, streaming.placed(tree.unflatten(flat))


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_those_of_diffusers_there_and_back(name, tmp_path):
    diffusers, model = require("diffusers"), reference(name)
    model.save_pretrained(tmp_path / "theirs")
    module, params = read(tmp_path / "theirs", unroll=1)
    inputs = draw(module.config)
    expected = of_torch(model, *inputs)
    assert np.std(expected) > 0.1
    changed = of_torch(model, *inputs[:2], np.array([1, 1, 1], np.int32))
    assert np.abs(changed - expected).max() > 0.1  # the class matters
    out = jit(functools.partial(lorax.apply, module))(params, *inputs)
    assert out.dtype == jnp.float32 and out.shape == expected.shape
    np.testing.assert_allclose(out[:2], expected[:2], rtol=0, atol=1e-5)
    # diffusers' frequencies are rounded to float32 twice, which shows in the sine of 999 of them.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    config, sources = dit.hf_config(module.config), dit.hf_tensors(module.config)
    hf.write(tmp_path / "ours", config, sources, tree.flatten(params))
    back, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, ours), theirs in zip(back.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach(), theirs.detach(), err_msg=name)


def test_however_the_layers_are_run_and_adapted():
    config = dit.config_from_hf(TINY, unroll=1)
    module, inputs = dit.DiT(config), draw(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)
    params = jax.tree.map(noise, shapes)
    sites = intercept.sites(module, params, *inputs)
    assert sites["patches/kernel"].kind == "conv" and sites["h/attn/q/kernel"].stack == 1
    assert {*targets.resolve(("modulation",), sites)} == {
        "h/modulation/kernel",
        "modulation/kernel",
    }
    assert len(targets.resolve(("attention", "mlp"), sites)) == 6
    linear = {path for path, site in sites.items() if site.kind in ("linear", "conv")}
    assert {*targets.resolve(("all-linear",), sites)} == linear
    method = lorax.method("lora", rank=2, targets=("all-linear", "embed"))
    state = method.init(jax.random.key(0), params, sites)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))

    @functools.partial(jit, static_argnums=0)
    def run(module, trainable, params):
        def loss(trainable):
            bound = method.bind(trainable, state.constants, params)
            out = lorax.apply(module, bound, *inputs)
            return jnp.mean(jnp.square(out)), out

        return jax.grad(loss, has_aux=True)(trainable)

    grads, out = run(module, state.trainable, params)
    apply = jit(lorax.apply, static_argnums=0)
    merged = apply(module, methods.merge(method, state, params, sites), *inputs)
    size = np.abs(out).max()
    np.testing.assert_allclose(merged, out, rtol=0, atol=1e-5 * size)
    other = dit.DiT(dataclasses.replace(config, remat="full", unroll=2))
    other_grads, other_out = run(other, state.trainable, params)
    np.testing.assert_allclose(other_out, out, rtol=0, atol=1e-5 * size)
    for path, want in tree.flatten(grads).items():
        assert np.abs(want).max() > 0, path
        got = tree.flatten(other_grads)[path]
        np.testing.assert_allclose(
            got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max(), err_msg=path
        )
    half = apply(dit.DiT(dataclasses.replace(config, dtype="bfloat16")), params, *inputs)
    full = apply(module, params, *inputs)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_at_its_start_a_model_predicts_zeros_and_its_blocks_are_the_identity():
    config = dit.config_from_hf(TINY)
    module, inputs = dit.DiT(config), draw(config)
    params = jit(module.init)(jax.random.key(0), *inputs)["params"]
    assert not np.any(jit(functools.partial(lorax.apply, module))(params, *inputs))
    block = dit.Block(config)
    x, sines = jnp.arange(64.0).reshape(1, 4, 16), jnp.ones((1, 256))
    first = jax.tree.map(lambda x: x[0], params["h"])
    y, _ = block.apply({"params": first}, x, sines, jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(y, x)
    assert np.any(params["h"]["attn"]["q"]["kernel"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(norm_type="layer_norm"), 'norm_type: "layer_norm" given, must be "ada_norm_zero"'),
        (dict(_class_name="Transformer2DModel"), "norm_type: none given, must be"),
        (dict(norm_elementwise_affine=True), "norm_elementwise_affine: true given, must be false"),
        (dict(dropout=0.1), "dropout: 0.1 given, must be 0, which alone is computed here"),
        (dict(an_option_of_next_year=1), "an_option_of_next_year: 1 given, but this option"),
        (dict(activation_fn="geglu"), "activation_fn: .geglu. given, must be one of"),
        (dict(sample_size=5), "sample_size 5 is not a multiple of patch_size 2"),
        (dict(attention_head_dim=3), "is not a multiple of 4"),
        (dict(in_channels=3, out_channels=1), "out_channels: 1 given, must be in_channels 3, or"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dit.config_from_hf(TINY | fields)


def test_images_of_another_size_are_an_error():
    config = dit.config_from_hf(TINY)
    _, t, classes = draw(config)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 3\).*say \(4, 4, 3\)"):
        jax.eval_shape(dit.DiT(config).init, jax.random.key(0), np.zeros((3, 8, 8, 3)), t, classes)


def test_config_survives_diffusers_names():
    config = dit.config_from_hf(TINY | VARIANTS["sigma"], dtype="bfloat16")
    back = dit.config_from_hf(dit.hf_config(config), dtype="bfloat16")
    assert back == config and dit.hf_config(config)["_class_name"] == "DiTTransformer2DModel"
    assert dit.config_from_hf({}) == dit.Config()


def test_the_published_model_has_its_size():
    """facebook/DiT-XL-2-256 as diffusers stores it, with embeddings of its own in every block: 675M
    parameters, and 27 more times the 2.78M of embeddings of timesteps and classes."""
    config = dit.Config(out_channels=8)
    inputs = np.zeros((1, *config.image_shape), np.float32), np.zeros(1, int), np.zeros(1, int)
    shapes = jax.eval_shape(dit.DiT(config).init, jax.random.key(0), *inputs)
    assert tree.count(shapes) == size_of_published()


def size_of_published() -> int:
    """Counted by hand from diffusers' modules."""
    d, linear = 1152, lambda n, m: n * m + m
    condition = linear(256, d) + linear(d, d) + 1001 * d
    block = condition + linear(d, 6 * d) + 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    return 28 * block + linear(16, d) + linear(d, 2 * d) + linear(d, 32)
