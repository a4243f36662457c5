"""Virtual tokens are what real ones would have been, in every model, with and without a cache."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import linen as nn
from quick import jit
from support import require

import lorax
from lorax import config, decode, intercept, losses, methods, models, ops, tree
from lorax.methods.prefix import llama_adapter, prefix, prompt
from lorax.models import bert, deberta, decoder, falcon, gpt2
from lorax.train import step as steps

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4)
MODULES = {
    "gpt2": gpt2.GPT2(gpt2.Config(24, n_positions=32, n_embd=16, n_layer=3, n_head=2)),
    "llama": decoder.Decoder(
        decoder.Config(vocab_size=24, intermediate_size=20, num_key_value_heads=2, **SMALL)
    ),
    "falcon": falcon.Falcon(falcon.Config(vocab_size=24, **SMALL)),
    "falcon-alibi": falcon.Falcon(falcon.Config(vocab_size=24, alibi=True, **SMALL)),
    "bert": bert.BERT(
        bert.Config(vocab_size=24, intermediate_size=20, max_position_embeddings=32, **SMALL)
    ),
}
CAUSAL = [name for name in MODULES if name != "bert"]
METHODS = {"prefix": prefix, "prompt": prompt, "llama-adapter": llama_adapter}
TOKENS = np.random.default_rng(0).integers(0, 24, (3, 7), np.int32)
#: Rows of one text, of two, and of one text with padding.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)


@functools.cache
def base(name):
    """A `Base` whose weights and biases are large enough to matter."""
    module = MODULES[name]
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    noise = lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32)
    params = jax.tree.map(noise, params)
    sites = ops.sites_from_shapes(params)
    return models.Base(module, params, module.config, None, sites, name, name)


@functools.cache
def forward(name):
    return jit(functools.partial(lorax.apply, MODULES[name]))


def bound(name, method, state=None):
    params = base(name).params
    return method.bind(*(state or method.init(jax.random.key(3), params)), params)


def moved(state, size=0.3):
    """The state with noise on what is trained and in use, gates included."""
    flat, rng = tree.flatten(state.trainable), np.random.default_rng(4)
    on = {path.rpartition("/")[0]: x for path, x in tree.flatten(state.constants).items()}
    for path, x in flat.items():
        own = on.get(path.rpartition("/")[0], jnp.ones(x.shape[:1]))
        noise = jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32)
        flat[path] = x + noise * own.reshape(-1, *(1,) * (x.ndim - 1))
    return state._replace(trainable=tree.unflatten(flat))


# ------------------------------------------------------------------------------ what they stand for


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_of_what_layers_keep_of_tokens_is_those_tokens(name):
    """With ALiBi, of one token: a prefix stands at position 0."""
    module, params = MODULES[name], base(name).params
    n = 1 if name == "falcon-alibi" else 4
    before = np.random.default_rng(2).integers(0, 24, (1, n), np.int32)
    cache = module.empty_cache(1, n)
    _, cache = lorax.apply(module, params, before, None, cache, method="hidden")
    method = prefix(tokens=n)
    ((path, own),) = methods.joined(method.init(jax.random.key(0), params).trainable).items()
    assert path == "h/attn/attend"
    width = own["k"].shape[-1] // cache.k[0].shape[1]
    of = lambda x: np.stack([layer[0, ..., :width].swapaxes(0, 1) for layer in x])
    kept = {f"{path}/{x}": of(getattr(cache, x)).reshape(own[x].shape) for x in "kv"}
    state = parity.filled(method.init(jax.random.key(0), params), kept)
    read = np.concatenate([np.repeat(before, 3, axis=0), TOKENS], axis=1)
    plain, adapted = forward(name)(params, read)[:, n:], bound(name, method, state)
    np.testing.assert_allclose(forward(name)(adapted, TOKENS), plain, rtol=0, atol=2e-5)
    assert np.abs(np.asarray(forward(name)(params, TOKENS)) - plain).max() > 0.1
    packed = forward(name)(adapted, TOKENS, SEGMENTS)
    np.testing.assert_allclose(packed[0], plain[0], rtol=0, atol=2e-5)
    second = forward(name)(adapted, np.roll(TOKENS, -3, axis=1))
    np.testing.assert_allclose(packed[1, 3:], second[1, :4], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODULES)
def test_a_prompt_of_embedded_tokens_is_those_tokens(name):
    params, method = base(name).params, prompt(tokens=4)
    state = method.init(jax.random.key(0), params)
    ((path, start),) = tree.flatten(state.trainable).items()
    embedding = tree.flatten(params)[path.replace("prompt", "embedding")]
    same = np.all(np.asarray(start)[:, None] == np.asarray(embedding)[None], axis=-1)
    ids = np.argmax(same, axis=1).astype(np.int32)
    assert same.any(axis=1).all() and len(set(ids)) > 1  # rows of the vocabulary
    ahead = lambda x, value: np.concatenate([np.broadcast_to(value, (len(x), 4)), x], axis=1)
    read = forward(name)(params, ahead(TOKENS, ids), ahead(SEGMENTS, SEGMENTS[:, :1]))[:, 4:]
    adapted = bound(name, method, state)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    packed = forward(name)(adapted, TOKENS, SEGMENTS)
    close(packed[0], read[0])
    close(packed[2, :5], read[2, :5])
    if name != "bert":  # whose prompt would see both texts
        close(packed[1, :3], read[1, :3])
        close(packed[1, 3:], forward(name)(adapted, np.roll(TOKENS, -3, axis=1))[1, :4])
    plain = forward(name)(params, TOKENS)
    assert np.abs(np.asarray(plain)[0] - packed[0]).max() > 0.01


@pytest.mark.parametrize("name", MODULES)
def test_a_llama_adapter_starts_as_its_base_and_adds_to_some_layers(name):
    params, method = base(name).params, llama_adapter(tokens=3, layers=(-1,))
    state = method.init(jax.random.key(0), params)
    plain = forward(name)(params, TOKENS, SEGMENTS)
    same = forward(name)(bound(name, method, state), TOKENS, SEGMENTS)
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-5)
    opened = parity.filled(state, {"h/attn/attend/gate": np.array([5, 5, 0.3], np.float32)})
    assert not np.asarray(opened.trainable["h"]["attn"]["attend"]["prompt"][:2]).any()
    leaf = bound(name, method, opened)["h"]["attn"]["attend"][intercept.AROUND]
    np.testing.assert_array_equal(leaf.gate, np.array([0, 0, 0.3], np.float32))
    other = forward(name)(bound(name, method, opened), TOKENS, SEGMENTS)
    assert np.abs(np.asarray(other) - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("prefix", "gpt2"),
        ("prompt", "llama"),
        pytest.param("prompt", "gpt2", marks=pytest.mark.soak),
        pytest.param("prefix", "falcon-alibi", marks=pytest.mark.slow),
        pytest.param("llama-adapter", "llama", marks=pytest.mark.slow),
    ],
)
def test_greedy_decoding_is_the_full_forward_pass_again_and_again(kind, name):
    method = METHODS[kind](tokens=3)
    params = bound(name, method, moved(method.init(jax.random.key(0), base(name).params), 1.0))
    pads, new = (0, 2, 5), 5
    tokens, segments = TOKENS.copy(), np.ones_like(TOKENS)
    for row, pad in enumerate(pads):
        tokens[row, :pad], segments[row, :pad] = 0, 0
    options = decode.DecodingOptions(max_new_tokens=new, ends=(-1,))
    got = decode.generate(MODULES[name], params, tokens, segments, jax.random.key(0), options)
    for row, pad in enumerate(pads):  # the whole text at once says each of its tokens
        text = np.concatenate([tokens[row, pad:], np.asarray(got[row])])[None]
        room = np.zeros((1, 7 + new), np.int32)
        room[:, : text.shape[1]] = text
        logits = forward(name)(params, room)[0, 6 - pad : 6 - pad + new]
        np.testing.assert_array_equal(got[row], np.argmax(logits, axis=-1))


# ----------------------------------------------------------------------------------------- training

CASES = {
    "prefix": [prefix(tokens=3, std=0.5), prefix(tokens=3, layers=(0, 2)), prefix(3, layers=(1,))],
    "prompt": [prompt(tokens=3), prompt(tokens=3, std=1.0)],
    "llama-adapter": [llama_adapter(tokens=3), llama_adapter(3, layers=(2,))],
}
N = 12


def train(name, method, states, vmapped):
    """(losses (M, n), trainable) of states with a leading axis of members."""
    section = config.default().train
    section.update(steps=N, warmup=0, lr=5e-3, weight_decay=0.1, schedule="constant", clip=0.0)
    hyper = steps.Hyper(jnp.float32(5e-3), jnp.float32(0.1), jax.random.key(0))
    program = steps.Program(
        MODULES[name], method, base(name).sites, section, dropout=False, merge=False
    )
    tokens = np.random.default_rng(6).integers(0, 24, (N, 1, 2, 9)).astype(np.int32)
    segments = np.broadcast_to(np.array([1] * 4 + [2] * 5, np.int32), tokens.shape)
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32), "segments": segments}

    def run(state):
        member = steps.start(method, *state, section, hyper, program.sites)
        end, logs = steps.train_steps(
            program, base(name).params, state.constants, hyper, member, batch
        )
        return logs["loss"], end.trainable

    return jit(jax.vmap(run) if vmapped else run)(states)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_member_of_a_sweep_trains_as_alone_and_counts_what_it_moves(kind):
    params, members = base("gpt2").params, CASES[kind]
    states = [m.init(jax.random.key(i), params) for i, m in enumerate(members)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    losses, ends = train("gpt2", members[0], stacked, True)
    for i, (method, state) in enumerate(zip(members, states, strict=True)):
        alone, end = train("gpt2", method, state, False)
        np.testing.assert_allclose(losses[i], alone, rtol=2e-6)
        assert alone[-1] < alone[0] or kind == "llama-adapter"
        moved = 0
        for path, x in tree.flatten(end).items():
            np.testing.assert_allclose(tree.flatten(ends)[path][i], x, rtol=0, atol=2e-5)
            moved += np.count_nonzero(np.asarray(x) != np.asarray(tree.flatten(state[0])[path]))
        assert moved == method.count(params) > 0


@pytest.mark.parametrize(
    ("kind", "name"), [("prefix", "gpt2"), ("prompt", "llama"), ("llama-adapter", "llama")]
)
def test_gradients_are_finite_differences(kind, name):
    method = METHODS[kind](tokens=3)
    state = moved(method.init(jax.random.key(0), base(name).params))
    section = config.default().train
    program = steps.Program(
        MODULES[name], method, base(name).sites, section, dropout=False, merge=False
    )
    batch = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)}

    def loss(trainable):
        params = steps._bound(program, trainable, state.constants, base(name).params)
        return losses.lm_loss(MODULES[name], params, batch)[0]

    value = jit(jax.value_and_grad(loss))
    _, grads = value(state.trainable)
    rng = np.random.default_rng(7)
    for path, x in tree.flatten(state.trainable).items():
        direction = jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(x.size), jnp.float32)
        along = lambda t, path=path, x=x, d=direction: value(
            tree.unflatten(tree.flatten(state.trainable) | {path: x + t * d})
        )[0]
        slope = (float(along(0.02)) - float(along(-0.02))) / 0.04
        want = float(jnp.vdot(tree.flatten(grads)[path], direction))
        np.testing.assert_allclose(slope, want, rtol=2e-2, atol=2e-3, err_msg=path)


# -------------------------------------------------------------------------------------- beside PEFT


def peft_config(kind):
    peft = require("peft")
    if kind == "llama-adapter":
        return peft.AdaptionPromptConfig(
            adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM", target_modules="self_attn"
        )
    kinds = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    return kinds[kind](num_virtual_tokens=4, task_type="CAUSAL_LM")


def state_of(kind, model, ours):
    """(method, state) with PEFT's arrays."""
    named = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    only = lambda word: next(x for name, x in named.items() if word in name)
    if kind == "llama-adapter":
        method = llama_adapter(tokens=4, layers=(-1,))
        last = lambda x: np.stack([np.zeros_like(x), x])  # of two layers
        arrays = {
            "h/attn/attend/prompt": last(only("adaption_prompt")[0]),
            "h/attn/attend/gate": last(only("adaption_gate")[0]),
        }
    elif kind == "prompt":
        method, arrays = prompt(tokens=4), {}
        (path,) = tree.flatten(method.init(jax.random.key(0), ours.params, ours.sites).trainable)
        arrays[path] = only("prompt_encoder")
    else:
        method = prefix(tokens=4)
        both = only("prompt_encoder").reshape(4, parity.LAYERS, 2, -1)  # k0 v0 k1 v1...
        arrays = {f"h/attn/attend/{x}": both[:, :, i].swapaxes(0, 1) for i, x in enumerate("kv")}
    return method, parity.filled(method.init(jax.random.key(0), ours.params, ours.sites), arrays)


def of_the_text(model, virtual):
    """A torch module like PEFT's, whose logits are those of the text alone."""
    torch = require("torch")

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            logits = self.model(input_ids=input_ids).logits[:, virtual:]
            return types.SimpleNamespace(logits=logits)

    return Text()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", "prefix"),
        ("llama", "prompt"),
        ("llama", "llama-adapter"),
        pytest.param("gpt2", "prompt", marks=pytest.mark.soak),
        pytest.param("llama", "prefix", marks=pytest.mark.soak),
    ],
)
def test_logits_and_training_are_pefts(family, kind, tmp_path):
    peft = require("peft")
    ours, theirs = parity.pair(family, tmp_path)
    model = peft.get_peft_model(theirs, peft_config(kind)).eval()
    parity.disturb(model)
    method, state = state_of(kind, model, ours)
    text = of_the_text(model, 4 if kind == "prompt" else 0)
    got, want = parity.logits(ours, method, state), parity.logits_torch(text)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert (
        np.abs(
            parity.logits(ours, method, method.init(jax.random.key(1), ours.params)) - want
        ).max()
        > 1e-3
    )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method.count(ours.params, ours.sites) == count
    mine, peers = parity.train(ours, method, state), parity.train_torch(text)
    np.testing.assert_allclose(mine, peers, rtol=1e-4)


# -------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prefix(tokens=0), "method.tokens: 0 given, must be at least 1"),
        (lambda: prompt(tokens=-1), "method.tokens: -1 given"),
        (lambda: llama_adapter(tokens=0), "method.tokens: 0 given"),
        (lambda: prefix(std=-1.0), "method.std: -1.0 given, must not be negative"),
        (lambda: prefix(layers=(3,)).count(base("gpt2").params), r"method.layers: \[3\] given"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("prefix", "gpt2", "7 tokens after 30 more, but n_positions is 32"),
        ("prompt", "gpt2", "37 tokens, but n_positions is 32"),
        ("prefix", "bert", "7 tokens, but max_position_embeddings leaves room for 2"),
    ],
)
def test_more_than_there_are_positions_is_an_error(kind, name, message):
    adapted = bound(name, METHODS[kind](tokens=30))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(lorax.apply, MODULES[name]), adapted, TOKENS)


@pytest.mark.parametrize("kind", METHODS)
def test_a_model_without_a_place_for_them_says_so(kind):
    module = deberta.DeBERTa(deberta.Config(vocab_size=24, intermediate_size=20, **SMALL))
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    method = METHODS[kind](tokens=2)
    adapted = method.bind(*method.init(jax.random.key(0), params), params)
    with pytest.raises(ValueError, match="DeBERTa has no place for virtual tokens"):
        jax.eval_shape(functools.partial(lorax.apply, module), adapted, TOKENS)


class Keys(nn.Module):
    """Called as attention is, and none."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="k")(x) + nn.Dense(4, name="v")(x)


class Foreign(nn.Module):
    """A language model of someone else."""

    def setup(self):
        self.embed, self.attn = nn.Embed(24, 4), Keys()

    def __call__(self, tokens):
        return self.attn(self.embed(tokens))


class WithHidden(Foreign):
    """The same with a `hidden` that knows of a first position."""

    def __call__(self, tokens):
        return self.hidden(tokens)

    def hidden(self, tokens, first=0):
        return self.attn(self.embed(tokens))


class PastHidden(WithHidden):
    def __call__(self, tokens):
        return self.attn(self.embed(tokens))


FOREIGN = [(kind, Foreign()) for kind in METHODS] + [(kind, PastHidden()) for kind in METHODS]
FOREIGN += [("prefix", WithHidden()), ("llama-adapter", WithHidden())]


@pytest.mark.parametrize(("kind", "module"), FOREIGN)
def test_a_model_that_makes_none_of_the_calls_is_refused(kind, module):
    """It would be trained without them, and its gradient be zero."""
    params, method = module.init(jax.random.key(0), TOKENS)["params"], METHODS[kind](tokens=2)
    adapted = method.bind(*method.init(jax.random.key(0), params), params)
    with pytest.raises(ValueError, match=f"method.name: {type(module).__name__} makes no call"):
        lorax.apply(module, adapted, TOKENS)


@pytest.mark.parametrize("kind", METHODS)
def test_a_plain_apply_does_not_compute_without_them(kind):
    with pytest.raises(TypeError, match="lorax.apply"):
        MODULES["gpt2"].apply({"params": bound("gpt2", METHODS[kind](tokens=2))}, TOKENS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("prefix", "method.name: virtual tokens need attention .*there is dense/kernel"),
        ("llama-adapter", "method.name: virtual tokens need attention .*there is dense/kernel"),
        ("prompt", "method.name: a prompt needs one token embedding.*there is dense/kernel"),
    ],
)
def test_no_word_is_blamed_that_nobody_gave(kind, message):
    params = {"dense": {"kernel": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=message):
        METHODS[kind]().init(jax.random.key(0), params)


@pytest.mark.parametrize("kind", METHODS)
def test_a_text_has_room_beside_them_and_they_can_not_be_merged(kind):
    nano, method = lorax.load("gpt2-nano"), METHODS[kind](tokens=60)
    state = method.init(jax.random.key(0), nano.params, nano.sites)
    adapted = method.bind(*state, nano.params, sites=nano.sites)
    room = nano.config.n_positions - (0 if kind == "llama-adapter" else 60)
    with pytest.raises(ValueError, match=f"256 positions of gpt2-nano.*; at most {room - 1} new"):
        decode.complete(nano, ["a"], adapted, decode.DecodingOptions(max_new_tokens=room))
    with pytest.raises(ValueError, match=f"{kind}: is no change of weights"):
        methods.merge(method, state, nano.params)
