"""What holds for every registered method, on one small GPT-2 and one table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit
from support import few

import lorax
from lorax import config, intercept, methods, tasks, tree
from lorax.models import Base, gpt2
from lorax.train import programs, stacks
from lorax.train import step as steps
from lorax.train.batches import train_batches

#: method -> hyperparameters of two members that share a program.
CASES = {
    "lora": (dict(rank=2), dict(rank=3, targets=("q", "up"))),
    "rslora": (dict(rank=2), dict(rank=3, layers=(1,))),
    "dora": (dict(rank=2), dict(rank=3, targets=("v", "down"), layers=(0,))),
    "lora-fa": (dict(rank=2), dict(rank=3)),
    "lora+": (dict(rank=2, ratio=4.0), dict(rank=3)),
    "frozen-b": (dict(rank=2), dict(rank=3, init="orthonormal", targets=("q", "up"))),
    "lora-xs": (dict(rank=2), dict(rank=3, layers=(1,))),
    "adalora": (dict(rank=3), dict(rank=4, target_rank=2, layers=(1,))),
    "ia3": (dict(), dict(targets=("q", "down"), layers=(0,))),
    "houlsby": (dict(rank=2), dict(rank=3, layers=(1,))),
    "pfeiffer": (dict(rank=2), dict(rank=3, layers=(1,))),
    "loha": (dict(rank=2), dict(rank=3, layers=(1,))),
    "lokr": (dict(rank=2), dict(rank=3, layers=(1,))),
    "vera": (dict(rank=3), dict(rank=4, layers=(1,))),
    "miss": (dict(rank=3), dict(rank=5, layers=(1,))),
    "tinylora": (dict(numbers=3), dict(numbers=4, tying=1.0, layers=(1,))),
    "hira": (dict(rank=2), dict(rank=3, layers=(1,))),
    "shira": (dict(rank=2), dict(rank=3, mask="magnitude", layers=(1,))),
    "prefix": (dict(tokens=2), dict(tokens=2, layers=(1,))),
    "prompt": (dict(tokens=2), dict(tokens=2)),
    "llama-adapter": (dict(tokens=2), dict(tokens=2, layers=(1,))),
    "full": (dict(), dict()),
    "bitfit": (dict(), dict()),
    "ln-tuning": (dict(), dict()),
    "subspace": (dict(dim=5), dict(dim=9)),
    "said": (dict(dim=14), dict(dim=20)),
    "lora-subspace": (dict(dim=5, rank=2), dict(dim=9, rank=2)),
    "gralora": (dict(rank=2), dict(rank=4, layers=(1,))),
    "oft": (dict(block_size=4), dict(block_size=8, layers=(1,))),
    "fourierft": (dict(frequencies=9), dict(frequencies=14, layers=(1,))),
    "hra": (dict(rank=2), dict(rank=4, layers=(1,))),
    "randlora": (dict(rank=3, alpha=6.0), dict(rank=3, alpha=9.0, layers=(1,))),
}
#: Methods that do not start as the base, and why.
NOT_THE_IDENTITY = {
    "prefix": "keys of any value take a share of the attention, and positions shift",
    "prompt": "the text is read behind other tokens",
}
#: Methods that change the attention itself and not the weights of a layer.
IN_ATTENTION = ("prefix", "prompt", "llama-adapter")
#: Methods whose arrays have no padding between members: members that differ are other groups.
UNPADDED = ("full", "bitfit", "ln-tuning", *IN_ATTENTION)

CONFIG = gpt2.Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)


@functools.cache
def base() -> Base:
    """Random weights, biases and norms too, large enough to be felt."""
    module = gpt2.GPT2(CONFIG)
    params = module.init(jax.random.key(0), TOKENS)["params"]
    leaves, treedef = jax.tree.flatten(params)
    draw = lambda i, x: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape)
    params = jax.tree.unflatten(treedef, [draw(i, x) for i, x in enumerate(leaves)])
    sites = intercept.sites(module, params, TOKENS)
    return Base(module, params, CONFIG, None, sites, "gpt2", "tiny")


def started(name, hp, seed=1, **kwargs):
    method = lorax.method(name, **hp)
    return method, method.init(jax.random.key(seed), base().params, base().sites, **kwargs)


def moved(state, seed=2):
    """The state with noise on what is trained and not padding: wherever a gradient would be is
    not known here, so only what is not exactly zero or stands alone moves."""
    flat = tree.flatten(state.trainable)
    draw = lambda i, x: x + 0.1 * jax.random.normal(jax.random.key(seed + i), x.shape)
    noisy = {path: draw(i, x) for i, (path, x) in enumerate(flat.items())}
    return methods.State(tree.unflatten(noisy), state.constants)


@functools.cache
def _apply():
    return jit(functools.partial(lorax.apply, base().module))


def logits(params, tokens=TOKENS):
    return np.asarray(_apply()(params, tokens))


def bound(method, state):
    return method.bind(*state, base().params, sites=base().sites)


def test_every_method_is_in_the_table():
    assert set(CASES) == set(methods.METHODS)


@pytest.mark.parametrize("name", CASES)
def test_a_method_starts_as_its_base(name):
    for hp in CASES[name]:
        method, state = started(name, hp)
        off = np.abs(logits(bound(method, state)) - logits(base().params)).max()
        assert (off > 1e-4) if name in NOT_THE_IDENTITY else (off < 1e-5), off


@pytest.mark.parametrize("name", CASES)
def test_merged_is_bound_and_the_update_is_what_was_added(name):
    method, state = started(name, CASES[name][0])
    state = moved(state)
    if method.delta is None:
        with pytest.raises(ValueError, match="can't be merged"):
            lorax.merge(method, state, base().params, base().sites)
        return
    merged = lorax.merge(method, state, base().params, base().sites)
    want = logits(bound(method, state))
    np.testing.assert_allclose(logits(merged), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - logits(base().params)).max() > 1e-3
    before, after = tree.flatten(base().params), tree.flatten(merged)
    deltas = method.delta(*state, base().params, base().sites)
    for path, leaf in after.items():
        change = np.asarray(deltas[path]) if path in deltas else np.zeros(leaf.shape)
        np.testing.assert_allclose(leaf, before[path] + change, rtol=0, atol=1e-5, err_msg=path)
    if method.factors is not None:
        for path, (a, b, s, m) in method.factors(*state, base().params, base().sites).items():
            if m is None:
                product = np.asarray(s)[..., None, None] * (np.asarray(a) @ np.asarray(b))
                site = base().sites[path]
                np.testing.assert_allclose(site.to_matrix(deltas[path]), product, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_count_is_what_is_trained(name):
    for hp in CASES[name]:
        method, state = started(name, hp)
        if hp.get("layers") is None:  # other layers' arrays are there, and zero
            assert tree.count(state.trainable) == method.count(base().params, base().sites)
    assert not set(tree.flatten(state.trainable)) & set(tree.flatten(state.constants))


def section(**changes):
    found = config.default().train
    found.update(steps=20, warmup=0, schedule="constant", lr=0.02, weight_decay=0.05, **changes)
    return found


def trained(method, state, count=6, **changes):
    """Trainable tree after a few steps, losses, and the logits then. changes: of `section`."""
    part = section(**changes)
    hyper = steps.Hyper(jnp.float32(part.lr), jnp.float32(part.weight_decay), jax.random.key(3))
    program = steps.Program(base().module, method, base().sites, part, dropout=False, merge=False)
    member = steps.start(method, *state, part, hyper, program.sites)
    tokens = np.random.default_rng(4).integers(0, 40, (count, 1, 4, 9)).astype(np.int32)
    batches = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}
    run = jit(functools.partial(steps.train_steps, program))
    member, logs = run(base().params, state.constants, hyper, member, batches)
    after = methods.State(member.trainable, state.constants)
    return after, np.asarray(logs["loss"]), logits(bound(method, after))


#: Methods whose padding is checked with SGD as well.
WITH_SGD = ("frozen-b", "lora-xs", "miss", "tinylora", "hira", "shira")
PADDED = [(name, "adamw") for name in CASES if name not in UNPADDED]
PADDED += [(name, "sgd") for name in WITH_SGD]


@pytest.mark.parametrize(("name", "optimizer"), few(PADDED, (("dora", "adamw"), ("vera", "adamw"))))
def test_padding_and_other_members_targets_change_nothing(name, optimizer):
    """Alone, and in arrays for a larger rank and for more matrices."""
    hp = CASES[name][1]
    method, alone = started(name, hp)
    union = methods.resolve(("all-linear",), base().sites)
    wider = 5 if "rank" in method.hp else None
    wider = 24 if "dim" in method.hp else wider
    _, padded = started(name, hp, targets=union, pad=wider)
    assert tree.count(padded.trainable) > tree.count(alone.trainable)
    _, losses, out = trained(method, alone, optimizer=optimizer)
    _, padded_losses, padded_out = trained(method, padded, optimizer=optimizer)
    np.testing.assert_allclose(losses, padded_losses, rtol=2e-6)
    np.testing.assert_allclose(out, padded_out, rtol=0, atol=2e-5)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("name", few(CASES, ("lora", "adalora", "lokr", "subspace")))
def test_no_step_calls_lapack(name):
    """Steps run on all of a CPU's devices at once, where LAPACK's batched calls can wait for each
    other for ever."""
    method, state = started(name, CASES[name][0])
    program = steps.Program(base().module, method, base().sites, section(), False, False)
    hyper = steps.Hyper(jnp.float32(1e-2), jnp.float32(0.1), jax.random.key(3))
    member = steps.start(method, *state, section(), hyper, program.sites)
    batch = {"tokens": TOKENS[None, None], "mask": jnp.ones((1, 1, *TOKENS.shape))}
    given = base().params, state.constants, hyper, member, batch
    step = jax.jit(functools.partial(steps.train_steps, program)).lower(*given)
    assert "lapack" not in step.as_text()
    assert "lapack" in jax.jit(jnp.linalg.svd).lower(jnp.ones((3, 3))).as_text()  # so it is called


@pytest.mark.parametrize("name", few(CASES, ("dora",)))
def test_alone_is_in_the_sweep(name):
    """Two members in one program, vmapped, and the second by itself; what the first is padded with
    is the test above."""
    c = config.default()
    c.train.update(section().to_dict())
    c.train.update(batch_size=4, seq_len=8, parallel="none", width=2, steps=5)
    c.method.name = name
    c.sweep.seed = (0, 1)
    members = config.members(c)
    built = [lorax.method(name, **hp) for hp in CASES[name]]
    tokens = np.random.default_rng(4).integers(0, 40, (32, 9)).astype(np.int32)
    rows = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}
    task = tasks.Task("random", rows, {key: x[:4] for key, x in rows.items()}, "")

    def losses(pick):
        stacked = stacks.stack([members[i] for i in pick], [built[i] for i in pick], base())
        program = programs.program_of(stacked, base(), len(pick), task.kind)
        train = jit(programs.training(program, len(pick)))
        arguments = stacked.constants, stacked.hyper, stacked.state
        _, logs = train(base().params, *arguments, train_batches(stacked, task, 0, 5))
        return np.asarray(logs["loss"])

    first, second = losses((0, 1))
    np.testing.assert_allclose(second, losses((1,))[0], rtol=5e-6)
    assert np.all(np.isfinite(first)) and np.any(first != second)


class Norm(nn.Module):
    """Flax's own has its statistics in float32 under strict promotion."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (8,), jnp.float64)
        bias = self.param("bias", nn.initializers.zeros, (8,), jnp.float64)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        rstd = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 0.1)
        return centred * rstd * scale[None] + bias[None]


class Words(nn.Module):
    """Layers by their canonical names, in the precision of the parameters."""

    @nn.compact
    def __call__(self, x):
        for word in ("q", "k", "v", "o", "up", "down"):
            wide = dict(dtype=jnp.float64, param_dtype=jnp.float64)
            normal = Norm(name=f"norm_{word}")(x)
            x = x + nn.tanh(nn.Dense(8, name=word, **wide)(normal))
        return x


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_ATTENTION])
def test_the_gradient_is_that_of_finite_differences(name):
    """In float64, along a random direction of all that is trained."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((5, 8)))
        shapes = jax.eval_shape(Words().init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape)), shapes)
        hp = {key: value for key, value in CASES[name][0].items() if key != "layers"}
        method = lorax.method(name, **hp)
        state = method.init(jax.random.key(1), params)
        wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
        trainable, constants = jax.tree.map(wide, tuple(state))
        leaves, treedef = jax.tree.flatten(trainable)
        draw = lambda scale: [
            leaf + scale * jnp.asarray(rng.standard_normal(leaf.shape)) for leaf in leaves
        ]
        start, end = draw(0.3), draw(1.0)

        def loss(t):
            moved = [a + t * b for a, b in zip(start, end, strict=True)]
            bound = method.bind(jax.tree.unflatten(treedef, moved), constants, params)
            return jnp.sum(jnp.sin(lorax.apply(Words(), bound, x)))

        if name == "dora":  # its lengths are constants to the gradient: see test_variants
            pytest.skip("the gradient is not that of the function")
        run = jit(loss)
        h = 1e-6
        numeric = (run(h) - run(-h)) / (2 * h)
        np.testing.assert_allclose(jit(jax.grad(loss))(0.0), numeric, rtol=1e-6)


WIDE = gpt2.Config(vocab_size=64, n_positions=32, n_embd=512, n_layer=8, n_head=4)


@functools.cache
def step_bytes(name: str) -> int:
    """Memory that a compiled step needs beside its arguments and results."""
    module, example = gpt2.GPT2(WIDE), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    params, section = jax.tree.map(lambda x: jnp.ones(x.shape), shapes), config.default().train
    sites = intercept.sites(module, shapes, example)
    known = methods.hyperparameters(name)
    hp = {"rank": 2, "targets": ("up", "down"), "target_rank": 1}
    method = lorax.method(name, **{key: value for key, value in hp.items() if key in known})
    state = method.init(jax.random.key(0), params, sites)
    hyper = steps.Hyper(jnp.float32(0.1), jnp.float32(0.1), jax.random.key(0))
    program = steps.Program(module, method, sites, section, dropout=False, merge=False)
    member = steps.start(method, *state, section, hyper, sites)
    batch = {"tokens": jnp.zeros((1, 1, 8), jnp.int32), "mask": jnp.ones((1, 1, 8))}
    step = jit(functools.partial(steps.train_step, program))
    compiled = step.lower(shapes, state.constants, hyper, member, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


#: Methods whose steps hold more than a quarter of an update: its share. A rotation has `block_size`
#: numbers for each input; the waves of one layer are made in complex numbers.
HOLDS = {"oft": 1 / 2, "fourierft": 1}
#: Methods that are of full size: random numbers of a matrix's size are there for each layer.
FULL_SIZE = ("full", "subspace", "said", "randlora")


@pytest.mark.parametrize("name", few([n for n in CASES if n not in FULL_SIZE], ("dora", "lokr")))
def test_no_step_holds_an_update_of_full_size(name):
    """The update of all layers of one target would be 33 MB; LoHa's own is made layer by layer."""
    update = 4 * WIDE.n_layer * 512 * 2048
    assert step_bytes(name) < step_bytes("lora") + HOLDS.get(name, 1 / 4) * update
    assert step_bytes("lora") < update
