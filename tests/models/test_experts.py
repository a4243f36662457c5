"""Mixtures of experts: gradients, router loss, text, files, and every method on every expert."""

import functools
import json

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from decoders import TOKENS, reference, saved
from quick import jit
from small import noisy
from support import few, require

import lorax
from lorax import adapters, config, decode, losses, methods, models, quant, tree
from lorax.models.decoder_families import config_from_hf
from lorax.models.load import skeleton
from lorax.planning import compiled
from lorax.train import stacks
from lorax.train import step as steps

NAMES = ("mixtral", "olmoe", "gpt-oss")
LEFT = np.array([[1] * 12, [0] * 3 + [1] * 9, [0] * 8 + [1] * 4], np.int32)
BATCH = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)}


@functools.cache
def base(name):
    return lorax.load(str(saved(name)))


@functools.cache
def forward(name):
    return jit(functools.partial(lorax.apply, base(name).module))


def theirs_as_ours(name, tensors):
    """{our path: array} of {name in transformers 5: array}: experts together, layers apart."""
    flat = {}
    for path, source in base(name).sources.items():
        source = source.other if source.other is not None else source
        stacked = "{}" in source.name
        parts = [tensors[source.name.format(i)] for i in ((0, 1) if stacked else (None,))]
        parts = [x.transpose(source.axes or range(x.ndim)) for x in parts]
        part = slice(None) if source.part is None else source.part
        flat[path] = np.stack(parts)[..., part] if stacked else parts[0]
    return flat


# -------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", few(NAMES, ["mixtral", "gpt-oss"]))
def test_the_training_loss_and_its_gradients_are_those_of_transformers(name):
    """With the router's loss: of experts, routers, biases and sinks."""
    torch, model = require("torch"), reference(name)
    module = type(base(name).module)(
        config_from_hf(base(name).traits.config | dict(output_router_logits=True))
    )
    coefficient = module.config.router_aux_loss_coef
    tokens = torch.from_numpy(TOKENS).long()
    model.zero_grad()
    out = model(tokens[:, :-1], output_router_logits=True)
    nats = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss = nats + coefficient * out.aux_loss
    loss.backward()

    def ours(params, training=True):
        total, weight, _ = losses.lm_loss(module, params, BATCH, training=training)
        return total / weight

    value, grads = jit(jax.value_and_grad(ours))(base(name).params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(ours(base(name).params, False), nats.item(), rtol=1e-5)
    assert out.aux_loss.item() > 1
    want = {key: p.grad.numpy() for key, p in model.named_parameters()}
    for path, expected in theirs_as_ours(name, want).items():
        got = tree.flatten(grads)[path]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=1e-4 * scale, rtol=1e-3, err_msg=path)


def test_padding_does_not_count_in_the_routers_loss():
    torch, mask = require("torch"), LEFT[:, ::-1].copy()
    model = reference("mixtral")
    with torch.no_grad():
        expected = model(
            torch.from_numpy(TOKENS).long(), attention_mask=torch.from_numpy(mask),
            output_router_logits=True,
        ).aux_loss.item()  # fmt: skip
    c = base("mixtral").traits.config | dict(output_router_logits=True, router_aux_loss_coef=1.0)
    module = type(base("mixtral").module)(config_from_hf(c))
    _, sown = lorax.apply(
        module, base("mixtral").params, TOKENS, mask, method="hidden", mutable=[losses.ROUTED]
    )
    (router,) = sown[losses.ROUTED]["router"]
    np.testing.assert_allclose(losses.balance(router, jnp.asarray(mask > 0)), expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", few(NAMES, ["gpt-oss"]))
def test_greedy_text_with_a_cache_is_that_of_transformers(name):
    torch, ours, new = require("torch"), base(name), 9
    options = decode.DecodingOptions(max_new_tokens=new, ends=(2,), pad=0)
    got = decode.generate(ours.module, ours.params, TOKENS, LEFT, jax.random.key(0), options)
    want = reference(name).generate(
        torch.tensor(TOKENS).long(), attention_mask=torch.tensor(LEFT), max_new_tokens=new,
        do_sample=False, eos_token_id=2, pad_token_id=0,
    ).numpy()[:, 12:]  # fmt: skip
    np.testing.assert_array_equal(got, np.pad(want, ((0, 0), (0, new - want.shape[1]))))
    assert len({tuple(row) for row in want}) == 3


def test_every_token_reaches_its_experts_however_many_choose_the_same():
    """A bias that sends all tokens to one expert: a limit to its tokens would drop some."""
    torch, model, ours = require("torch"), reference("gpt-oss"), base("gpt-oss")
    bias = np.array([[9, 6, -9, -9]] * 2, np.float32)
    flat = tree.flatten(ours.params) | {"h/experts/router/bias": jnp.asarray(bias)}
    before = [layer.mlp.router.bias.data.clone() for layer in model.model.layers]
    for layer in model.model.layers:
        layer.mlp.router.bias.data = torch.from_numpy(bias[0])
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    for layer, value in zip(model.model.layers, before, strict=True):
        layer.mlp.router.bias.data = value
    got = forward("gpt-oss")(tree.unflatten(flat), TOKENS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", few(["mixtral", "qwen3-moe"], ["mixtral"]))
def test_tensors_of_all_experts_and_of_each_are_read(name, tmp_path):
    reference(name).save_pretrained(tmp_path, save_original_format=False)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    together = lorax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, together.params, base(name).params)
    models.save(tmp_path / "again", together)
    again = lorax.load(str(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, again.params, base(name).params)


def test_an_expert_that_a_model_directory_leaves_out_is_an_error(tmp_path):
    models.save(tmp_path, base("mixtral"))
    file = tmp_path / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    del stored["model.layers.1.block_sparse_moe.experts.4.w3.weight"]
    safetensors.numpy.save_file(stored, file)
    with pytest.raises(ValueError, match="no tensor 'model.layers.1.block.*experts.4.w3.weight'"):
        lorax.load(str(tmp_path))


def test_files_in_mxfp4_are_refused(tmp_path):
    described = base("gpt-oss").traits.config | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match="quantization_config: 'mxfp4' is not supported; supported"
    ):
        skeleton(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="qwen3_moe", mlp_only_layers=[0]), "mlp_only_layers=.0. is not supported"),
        (dict(model_type="qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step=2 is not"),
        (dict(model_type="mixtral", router_jitter_noise=0.1), "router_jitter_noise=0.1 is not"),
        (dict(model_type="olmoe", num_experts=0), "num_experts: 0 given, must be a whole number"),
        (dict(model_type="olmoe", num_experts=4, num_local_experts=5), "num_local_experts: .4, 5"),
        (
            dict(model_type="mixtral", num_experts_per_tok=9),
            "num_experts_per_tok 9 .* num_experts 8",
        ),
        (dict(model_type="llama", clip_qkv=1.0), "clip_qkv=1.0 is not supported for llama"),
    ],
)
def test_what_the_experts_do_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(fields)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_fields_that_a_file_leaves_out_are_those_of_transformers(name):
    theirs = require("transformers").AutoConfig.for_model(name).to_dict()
    assert config_from_hf({"model_type": name}) == config_from_hf(theirs)


def test_a_plan_counts_the_work_of_the_experts_that_a_token_goes_to():
    ours = base("mixtral")
    c, n = ours.config, TOKENS.size
    trace = jax.jit(functools.partial(lorax.apply, ours.module, method="hidden")).trace
    half, full, _ = compiled.work(trace(ours.params, TOKENS).jaxpr)
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    experts = 3 * c.hidden_size * c.expert_size * c.num_experts_per_tok
    linear = 2 * n * (attention + experts + c.hidden_size * c.num_experts) * c.num_hidden_layers
    assert half == 0 and linear <= full < 1.3 * linear  # and the products of queries and keys


# ----------------------------------------------------------------------------------------- methods

#: method -> hyperparameters; the others know no targets, or are refused.
ADAPTED = {
    "lora": dict(rank=2),
    "dora": dict(rank=2),
    "adalora": dict(rank=2),
    "loha": dict(rank=2),
    "lokr": dict(rank=2),
    "vera": dict(rank=2),
    "hira": dict(rank=2),
    "tinylora": dict(),
    "shira": dict(rank=1, targets=("experts",)),
    "miss": dict(rank=3),
    "gralora": dict(rank=2, targets=("experts",)),
    "oft": dict(block_size=4, targets=("experts",)),
    "hra": dict(rank=2),
    "fourierft": dict(frequencies=9, spectral_scale=20.0),
    "randlora": dict(rank=3),
    "ia3": dict(targets=("experts",), feedforward=("experts.down",)),
    "lora-subspace": dict(dim=5, rank=2),
}


def started(name, targets=("experts", "router"), **hp):
    method = lorax.method(name, **{"targets": targets} | ADAPTED[name] | hp)
    ours = base("mixtral")
    state = method.init(jax.random.key(1), ours.params, ours.sites)
    return method, methods.State(noisy(state.trainable, 0.1), state.constants)


@pytest.mark.parametrize(
    "name", few(ADAPTED, ["lora", "dora", "lokr", "ia3", "shira"], ["adalora"])
)
def test_an_adapted_expert_computes_with_what_is_merged(name):
    method, state = started(name)
    ours = base("mixtral")
    bound = method.bind(*state, ours.params, sites=ours.sites)
    merged = lorax.merge(method, state, ours.params, ours.sites)
    want = np.asarray(forward("mixtral")(merged, TOKENS))
    got = forward("mixtral")(bound, TOKENS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - forward("mixtral")(ours.params, TOKENS)).max() > 1e-3


def test_words_mean_experts_and_routers():
    ours = base("mixtral")
    last = lambda *words: {p.split("/", 1)[1] for p in methods.resolve(words, ours.sites)}
    experts = {f"experts/{name}/kernel" for name in ("gate", "up", "down")}
    assert last("experts") == experts and last("experts.up") == {"experts/up/kernel"}
    attention = {f"attn/{name}/kernel" for name in "qkvo"}
    assert last("all-linear") == experts | attention | {"experts/router/kernel"}
    with pytest.raises(ValueError, match="'mlp' matches nothing; there is q, k, v, o, experts.up"):
        last("mlp")


def test_a_bottleneck_after_an_expert_is_refused_before_the_work():
    ours = base("mixtral")
    method = lorax.method("pfeiffer", targets=("experts.down",))
    with pytest.raises(ValueError, match="h/experts/down/kernel is not a linear layer's kernel"):
        method.init(jax.random.key(0), ours.params, ours.sites)


def test_members_of_a_sweep_route_their_own_tokens():
    """Each member alone, and side by side with the others: the same losses, after routes part."""
    ours = base("mixtral")
    c = config.default()
    c.train.update(lr=0.05, weight_decay=0.1, warmup=0)
    hps = [dict(rank=2), dict(rank=4, layers=(1,)), dict(rank=3, targets=("q", "router"))]
    built = [lorax.method("lora", **{"targets": ("experts", "q", "router")} | hp) for hp in hps]
    members = [config.Member(i, str(i), {}, c) for i in range(3)]
    program = steps.Program(ours.module, built[0], ours.sites, c.train, False, False)
    tokens = np.random.default_rng(1).integers(3, decoders.VOCABULARY, (5, 1, 2, 9), np.int32)
    batches = {"tokens": jnp.asarray(tokens), "mask": jnp.ones(tokens.shape, jnp.float32)}
    run = lambda *member: steps.train_steps(program, ours.params, *member, batches)
    stacked = stacks.stack(members, built, ours)
    given = stacked.constants, stacked.hyper, stacked.state
    state, logs = jit(jax.vmap(run))(*given)
    one = jit(run)
    for i in range(3):
        _, alone = one(*jax.tree.map(lambda x, i=i: x[i], given))
        np.testing.assert_allclose(logs["loss"][i], alone["loss"], rtol=2e-5)
    assert len(set(np.asarray(logs["loss"][:, -1]))) == 3
    assert (logs["loss"][:, -1] < logs["loss"][:, 0]).all()


# -------------------------------------------------------------------------------------- four bits


def test_experts_in_four_bits_are_decoded_as_they_are_used():
    ours = base("mixtral")
    coded = quant.quantize(ours.params, "nf4", double=True, sites=ours.sites)
    flat = tree.flatten(coded)
    assert isinstance(flat["h/experts/up/kernel"], quant.Quantised)
    assert isinstance(flat["h/experts/router/kernel"], jax.Array)  # what decides the route
    plain = {
        path: getattr(leaf, "decoded", lambda leaf=leaf: leaf)() for path, leaf in flat.items()
    }
    want = forward("mixtral")(tree.unflatten(plain), TOKENS)
    np.testing.assert_allclose(forward("mixtral")(coded, TOKENS), want, rtol=0, atol=1e-4)
    method, state = started("lora")
    bound = method.bind(*state, coded, sites=ours.sites)
    both = method.bind(*state, tree.unflatten(plain), sites=ours.sites)
    want = forward("mixtral")(both, TOKENS)
    np.testing.assert_allclose(forward("mixtral")(bound, TOKENS), want, rtol=0, atol=1e-4)


def test_a_trained_adapter_of_experts_has_a_layer_for_each():
    method, state = started("lora", ("experts.up",))
    trained = adapters.from_training(base("mixtral"), method, state)
    experts = base("mixtral").config.num_experts
    assert [*trained.updates] == [
        f"h/{layer}/experts/{e}/up" for layer in range(2) for e in range(experts)
    ]
    assert trained.updates["h/1/experts/3/up"].a.shape == (24, 2)
