"""ViT is transformers' ViTForImageClassification, there and back."""

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
from lorax.models import streaming, vit

TINY = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=36)
TINY |= dict(image_size=12, patch_size=4)
VARIANTS = {
    "plain": dict(num_labels=3),
    "oblong": dict(image_size=(9, 14), patch_size=(3, 4), num_channels=1, qkv_bias=False),
    "deep-relu": dict(num_hidden_layers=5, hidden_act="relu", layer_norm_eps=0.02, num_labels=1),
}


@functools.cache
def reference(name):
    """A random model of transformers, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY | VARIANTS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    return model.eval()


def draw(config, batch=3):
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, *config.image_shape)).astype(np.float32)


def torch_scores(model, images):
    torch = require("torch")
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()


def read(directory, **run):
    """(module, params) of a model directory; a head that is not there is left out."""
    config = vit.config_from_hf(read_json(directory / "config.json"), **run)
    module = vit.ViT(config)
    init = functools.partial(module.init, jax.random.key(0))
    shapes = tree.flatten(jax.eval_shape(init, vit.example(config))["params"])
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    head = [path for path in shapes if path.startswith("head/")]
    flat = hf.parameters(directory, vit.hf_tensors(config), shapes, optional=head)
    return module, streaming.placed(tree.unflatten(flat))


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_those_of_transformers_there_and_back(name, tmp_path):
    transformers, model = require("transformers"), reference(name)
    model.save_pretrained(tmp_path / "theirs")
    module, params = read(tmp_path / "theirs")
    images = draw(module.config)
    expected = torch_scores(model, images)
    assert np.std(expected, axis=0).min() > 0.1  # the same for every image would be easy
    scores = jit(functools.partial(lorax.apply, module))(params, images)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    config, sources = vit.hf_config(module.config), vit.hf_tensors(module.config)
    hf.write(tmp_path / "ours", config, sources, tree.flatten(params))
    back, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_allclose(torch_scores(back.eval(), images), expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(back.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach(), theirs.detach(), err_msg=name)


def test_a_pretrained_encoder_without_a_head_loads(tmp_path):
    model = reference("plain")
    model.save_pretrained(tmp_path / "whole")
    model.vit.save_pretrained(tmp_path / "bare")
    _, params = read(tmp_path / "whole")
    module, bare = read(tmp_path / "bare", labels=7)
    assert module.config.labels == 7
    want = {path: leaf for path, leaf in tree.flatten(params).items() if "head/" not in path}
    assert want.keys() == tree.flatten(bare).keys()
    for path, leaf in tree.flatten(bare).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)


def test_however_the_layers_are_run_and_adapted():
    config = vit.Config(**TINY, labels=3, unroll=1)
    module, images = vit.ViT(config), draw(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    params = jax.tree.map(noise, shapes)
    sites = intercept.sites(module, params, images)
    assert sites["patches/kernel"].kind == "conv" and sites["h/attn/q/kernel"].stack == 1
    method = lorax.method("lora", rank=2, targets=("attention", "up", "re:patches/kernel"))
    state = method.init(jax.random.key(0), params, sites)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))

    @functools.partial(jit, static_argnums=0)
    def run(module, trainable, params):
        def loss(trainable):
            bound = method.bind(trainable, state.constants, params)
            scores = lorax.apply(module, bound, images)
            return jnp.mean(jax.nn.logsumexp(scores, axis=-1)), scores

        return jax.grad(loss, has_aux=True)(trainable)

    grads, scores = run(module, state.trainable, params)
    apply = jit(lorax.apply, static_argnums=0)
    merged = apply(module, methods.merge(method, state, params, sites), images)
    np.testing.assert_allclose(merged, scores, rtol=0, atol=1e-4)
    other = vit.ViT(dataclasses.replace(config, remat="full", unroll=2))
    other_grads, other_scores = run(other, state.trainable, params)
    np.testing.assert_allclose(other_scores, scores, rtol=1e-5, atol=1e-5)
    for path, want in tree.flatten(grads).items():
        assert np.abs(want).max() > 1e-6, path
        got = tree.flatten(other_grads)[path]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=path)
    half = apply(vit.ViT(dataclasses.replace(config, dtype="bfloat16")), params, images)
    full = apply(module, params, images)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(hidden_act="swish7"), "hidden_act: .swish7. given, must be one of .*gelu"),
        (dict(num_attention_heads=5), "hidden_size 24 is not a multiple of num_attention_heads 5"),
        (dict(head_dim=8), "head_dim 8 is not supported for ViT"),
        (dict(patch_size=[4, 16]), r"patch_size \(4, 16\) is larger than image_size 12"),
        (dict(num_labels=0), "num_labels: 0 given, must be a whole number from 1"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        vit.config_from_hf(TINY | fields)


def test_images_of_another_size_are_an_error():
    config = vit.Config(**TINY)
    with pytest.raises(ValueError, match=r"images of \(16, 16, 3\).*say \(12, 12, 3\)"):
        jax.eval_shape(vit.ViT(config).init, jax.random.key(0), np.zeros((1, 16, 16, 3)))


def test_config_survives_hugging_faces_names():
    config = vit.Config(**TINY | dict(image_size=(9, 12)), labels=5, dtype="bfloat16", unroll=2)
    back = vit.config_from_hf(vit.hf_config(config), dtype="bfloat16", unroll=2)
    assert back == config and vit.hf_config(config)["model_type"] == "vit"
    assert vit.config_from_hf({}) == vit.Config()  # ViT-Base/16


def test_the_published_model_has_its_size():
    """google/vit-base-patch16-224 with its 1000 classes."""
    config = vit.Config(labels=1000)
    shapes = jax.eval_shape(vit.ViT(config).init, jax.random.key(0), vit.example(config))
    assert tree.count(shapes) == 86_567_656
