"""Parameters trained as they are: those and no others, and as torch and PEFT train them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from quick import jit
from support import few, require

import lorax
from lorax import config, intercept, tree
from lorax.methods.full import bitfit, full, ln_tuning
from lorax.models import gpt2
from lorax.train import step as steps

TOKENS = np.random.default_rng(1).integers(0, 20, (2, 6), np.int32)
BIASES = 4 * 8 + 12 + 8 + 2 * 8  # of a layer: attention, feed-forward, norms
LAYER = 4 * 8 * 8 + 2 * 8 * 12 + BIASES + 2 * 8


@functools.cache
def tiny():
    """A base of three layers."""
    c = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2, n_inner=12)
    module = gpt2.GPT2(c)
    params = jit(module.init)(jax.random.key(0), TOKENS)["params"]
    sites = intercept.sites(module, params, TOKENS)
    return types.SimpleNamespace(module=module, params=params, sites=sites)


def trained(method, n=2):
    """The method's state after n steps of Adam on `tiny`."""
    base, section = tiny(), config.default().train
    section.update(lr=0.01, warmup=0)
    hyper = steps.Hyper(jnp.float32(0.01), jnp.float32(0), jax.random.key(0))
    state = method.init(jax.random.key(0), base.params, base.sites)
    member = steps.start(method, *state, section, hyper, base.sites)
    program = steps.Program(base.module, method, base.sites, section, False, False)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (n, 1, 2, 7), np.int32))
    batches = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.float32)}
    run = jit(functools.partial(steps.train_steps, program))
    member, _ = run(base.params, state.constants, hyper, member, batches)
    return state._replace(trainable=member.trainable)


# ---------------------------------------------------------------------------------- what is trained


def everything(path, layer):
    return True


#: name -> (method, count, whether row `layer` of a parameter is trained; None: it has no layers)
CHOICES = {
    "all": (full(), 20 * 8 + 8 * 8 + 3 * LAYER + 2 * 8, everything),
    "top": (full(layers=(-1,)), LAYER, lambda path, layer: layer == 2),
    "outer": (full(layers=(0, -1, 2)), 2 * LAYER, lambda path, layer: layer in (0, 2)),
    "words": (
        full(("q", "embed")), 3 * 64 + 160, lambda path, layer: "/q/k" in path or "wte" in path,
    ),
    "bitfit": (bitfit(), 3 * BIASES + 8, lambda path, layer: path.endswith("bias")),
    "bitfit-0": (
        bitfit(layers=(0,)), BIASES, lambda path, layer: path.endswith("bias") and layer == 0,
    ),
    "ln": (ln_tuning(), 3 * 4 * 8 + 2 * 8, lambda path, layer: "ln_" in path),
    "ln-1": (
        ln_tuning(layers=(1,)), 4 * 8, lambda path, layer: "ln_" in path and layer == 1,
    ),
    "twice": (  # norms of layer 1 are named twice and trained once, the other layers' by `full`
        full(("all",), layers=(1,), full=("norms", "embed")), LAYER + 2 * 32 + 16 + 160,
        lambda path, layer: layer == 1 or "ln_" in path or "wte" in path,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_is_trained_and_nothing_else_moves(name):
    (method, count, chosen), base = CHOICES[name], tiny()
    start = method.init(jax.random.key(0), base.params, base.sites)
    # The tree that is differentiated and has an optimiser state holds the trained rows alone.
    assert tree.count(start.trainable) == count == method.count(base.params, base.sites)
    unmoved = lorax.merge(method, start, base.params, base.sites)
    jax.tree.map(np.testing.assert_array_equal, unmoved, base.params)
    state, flat = trained(method), tree.flatten(base.params)
    merged = tree.flatten(lorax.merge(method, state, base.params, base.sites))
    bound = tree.flatten(method.bind(*state, base.params, sites=base.sites))
    delta, rows = method.delta(*state, base.params, base.sites), 0
    for path, before in flat.items():
        np.testing.assert_array_equal(merged[path], bound[path])
        layers = range(3) if path.startswith("h/") else [None]
        for layer in layers:
            was, now = (x if layer is None else x[layer] for x in (before, merged[path]))
            if chosen(path, layer):
                rows += was.size
                # Keys' biases have no gradient (softmax), and not every token is in two batches.
                assert np.any(was != now) or path == "h/attn/k/bias", path
            else:
                np.testing.assert_array_equal(was, now, err_msg=path)
        if path in delta:
            np.testing.assert_array_equal(delta[path], merged[path] - before)
        else:
            np.testing.assert_array_equal(before, merged[path])
    assert rows == count


# ------------------------------------------------------------------------------------------- beside


def test_beside_another_method_all_is_of_one_dtype_and_merges():
    base = tiny()
    method = lorax.method("lora", rank=2, full=("norms", "embed"), dtype="bfloat16")
    state = method.init(jax.random.key(0), base.params, base.sites)
    rng = np.random.default_rng(3)
    noise = lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.bfloat16)}
    count = 3 * 2 * 2 * 16 + 3 * 32 + 16 + 160
    assert method.count(base.params, base.sites) == tree.count(state.trainable) == count
    bound = method.bind(*state, base.params, sites=base.sites)
    assert bound["wte"]["embedding"].dtype == bound["ln_f"]["scale"].dtype == jnp.float32
    merged = lorax.merge(method, state, base.params, base.sites)
    run = jit(functools.partial(lorax.apply, base.module))
    np.testing.assert_allclose(run(merged, TOKENS), run(bound, TOKENS), rtol=0, atol=1e-5)
    whole, flat = tree.flatten(merged), tree.flatten(base.params)
    delta = method.delta(*state, base.params, base.sites)
    for path in flat:
        moved = delta.get(path, np.zeros_like(flat[path]))
        np.testing.assert_allclose(moved, whole[path] - flat[path], rtol=0, atol=1e-6)
    factors = method.factors(*state, base.params, sites=base.sites)
    assert factors.keys() == {"h/attn/q/kernel", "h/attn/v/kernel"}


@pytest.mark.parametrize("name", ["full", "bitfit", "ln-tuning"])
def test_in_bfloat16_it_is_the_trained_part_that_is_rounded(name):
    base = tiny()
    method = lorax.method(name, dtype="bfloat16", layers=(0,), full=("embed",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.name == name and method.hp["full"] == ("embed",)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.bfloat16)}
    bound = method.bind(*state, base.params, sites=base.sites)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    for path, leaf in tree.flatten(bound).items():
        before = tree.flatten(base.params)[path]
        part = leaf if path == "wte/embedding" else leaf[:1]
        np.testing.assert_allclose(part, rounded(before)[: len(part)], rtol=2**-8)
        np.testing.assert_array_equal(leaf[len(part) :], before[len(part) :])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: full(layers=(3,)), r"method.layers: \[3\] given, the base has 3 layers"),
        (lambda: full(layers=()), r"method.layers: \(\) given, the base has 3 layers"),
        (lambda: full("embed", layers=(0,)), r"method.layers: \[0\] leave nothing of embed"),
        (lambda: full("norm"), "'norm' matches nothing; .*did you mean 'norms'"),
        (lambda: bitfit(full="classifier"), "method.full: 'classifier' matches nothing"),
        (
            lambda: lorax.method("full", dtype="float16"),
            "method.dtype: 'float16' is not one of float32, bfloat16",
        ),
        (
            lambda: lorax.method("lora", rank=2, full=("q",)),
            "method.full: h/attn/q/kernel are in method.targets as well",
        ),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(ask, message):
    with pytest.raises(ValueError, match=message):
        ask().init(jax.random.key(0), tiny().params, tiny().sites)


# ------------------------------------------------------------------------------------------- parity

NORMS = ("ln_", "norm")
#: name -> (family, method, whether torch trains the parameter of that name)
TORCH = {
    "gpt2-full": ("gpt2", full(), lambda name: True),
    "gpt2-top": ("gpt2", full(layers=(-1,)), lambda name: ".h.1." in name),
    "gpt2-bitfit": ("gpt2", bitfit(), lambda name: name.endswith(".bias")),
    "llama-full": ("llama", full(), lambda name: True),
}


@pytest.mark.parametrize("name", few(TORCH, ("gpt2-full", "gpt2-bitfit")))
def test_torch_learns_the_same(name, tmp_path):
    require("torch")
    family, method, trains = TORCH[name]
    base, model = parity.pair(family, tmp_path)
    state = method.init(jax.random.key(0), base.params, base.sites)
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(trains(parameter_name))
    _assert_same(base, method, state, model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_peft_tunes_the_same_norms(tmp_path):
    peft = require("peft")
    base, theirs = parity.pair("llama", tmp_path)
    modules = ["input_layernorm", "post_attention_layernorm", "norm"]
    model = peft.get_peft_model(theirs, peft.LNTuningConfig(target_modules=modules))
    parity.disturb(model)
    arrays = {}
    for name, x in parity.arrays(model).items():
        ours = {"input_layernorm": "h/norm_1", "post_attention_layernorm": "h/norm_2"}
        module = next((ours[key] for key in ours if key in name), "norm")
        arrays.setdefault(f"{module}/scale/w", []).append(x)
    arrays = {p: np.stack(x) if p.startswith("h/") else x[0] for p, x in arrays.items()}
    method = ln_tuning()
    state = parity.filled(method.init(jax.random.key(0), base.params, base.sites), arrays)
    assert len(arrays) == len(tree.flatten(state.trainable))
    expected = parity.logits_torch(model)
    np.testing.assert_allclose(parity.logits(base, method, state), expected, rtol=0, atol=1e-5)
    _assert_same(base, method, state, model)


def _assert_same(base, method, state, model):
    """The losses of 20 steps of AdamW that spares biases and norms."""
    torch = require("torch")
    decay, spared = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (spared if name.endswith(".bias") or any(n in name for n in NORMS) else decay).append(p)
    assert sum(p.numel() for p in decay + spared) == method.count(base.params, base.sites)
    groups = [dict(params=decay), dict(params=spared, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, parity.LR, weight_decay=parity.DECAY)
    losses = parity.train_torch(model, optimizer)
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(parity.train(base, method, state), losses, rtol=1e-4)
