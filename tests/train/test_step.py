"""One member: its loss, its step, and that nothing is computed for what is frozen."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from quick import jit
from support import traced

import lorax
from lorax import config, leaves, losses, ops, tree
from lorax.models import gpt2, vision
from lorax.tasks import kinds
from lorax.train import step as steps

CONFIG = dict(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, unroll=1)
TIED, UNTIED = (
    gpt2.GPT2(gpt2.Config(**CONFIG, tie_word_embeddings=tied)) for tied in (True, False)
)


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random(shapes, seed=0):
    arrays, treedef = jax.tree.flatten(shapes)
    values = [normal([seed, i], *x.shape, scale=0.3) for i, x in enumerate(arrays)]
    return jax.tree.unflatten(treedef, values)


def shapes_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Several rounds of rows, the last one not full."""
    monkeypatch.setattr(losses, "ROWS", 8)


# -------------------------------------------------------------------------------------------- loss

N = 21
HIDDEN, LABELS = (
    normal(1, N, 8),
    jnp.asarray(np.random.default_rng(2).integers(0, 20, N), jnp.int32),
)
WEIGHTS = jnp.asarray(np.random.default_rng(3).random(N) * (np.arange(N) % 3 > 0), jnp.float32)


@pytest.mark.parametrize(
    ("module", "target", "trained"),
    [(TIED, "q", 0), (UNTIED, "q", 0), (TIED, "embed", 2), (UNTIED, "head", 2), (UNTIED, None, 1)],
)
def test_weighted_loss_is_cross_entropy_in_value_and_gradients(module, target, trained):
    """Head frozen, adapted (two factors) or trained as it is; embedding and head may be one."""
    params = random(shapes_of(module))
    if target is None:
        trainable, bind = params, lambda trainable: trainable
    else:
        method = lorax.method("lora", rank=2, targets=target)
        state, key = method.init(jax.random.key(0), params), jax.random.key(0)
        trainable = random(state.trainable, seed=1)
        bind = lambda trainable: method.bind(trainable, state.constants, params, key)

    def ours(trainable, hidden):
        return losses.weighted_loss(module, bind(trainable), hidden, LABELS, WEIGHTS)

    def plain(trainable, hidden):
        logits = lorax.apply(module, bind(trainable), hidden, method="logits")
        return WEIGHTS @ optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)

    @functools.partial(jit, static_argnums=0)
    def run(loss):
        twice = lambda *args: 2 * loss(*args)  # a cotangent other than one
        grads = jax.grad(twice, argnums=(0, 1))(trainable, HIDDEN)
        return loss(trainable, HIDDEN), grads

    (value, grads), (expected, expected_grads) = run(ours), run(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    moving = [g for g in jax.tree.leaves(expected_grads) if np.abs(g).max() > 1e-3]
    assert len(moving) == 1 + trained
    for ours, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [TIED, UNTIED])
def test_rows_of_texts_are_sums_over_their_tokens(module):
    """The rows' losses add up to the batch's; a right token's logit is above all others."""
    params, batch = random(shapes_of(module)), jax.tree.map(lambda x: x[0], batches(1))
    rows = jit(functools.partial(losses.lm_rows, module))(params, batch)
    total, weight, _ = losses.lm_loss(module, params, batch)
    np.testing.assert_allclose(rows.loss.sum(), total, rtol=1e-5)
    np.testing.assert_allclose(rows.weight.sum(), weight, rtol=1e-6)
    hidden = lorax.apply(module, params, batch["tokens"][:, :-1], method="hidden")
    logits = lorax.apply(module, params, hidden, method="logits")
    labels, weights = batch["tokens"][:, 1:], batch["mask"][:, 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(rows.loss, (weights * nats).sum(axis=1), rtol=1e-5)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    np.testing.assert_allclose(rows.right, (weights * right).sum(axis=1), rtol=1e-6)
    flat = jax.tree.map(jnp.zeros_like, params)  # all logits are the same: nothing is predicted
    assert not losses.lm_rows(module, flat, batch).right.any()


def test_rows_of_fewer_batches_are_the_first():
    member, part = start(), batches(3)
    run = jit(functools.partial(steps.evaluate_rows, member.program))
    arguments = member.params, member.constants, member.state.trainable, part
    all_, first = run(*arguments, jnp.int32(3)), run(*arguments, jnp.int32(2))
    loss, _ = steps.evaluate(member.program, *arguments)
    np.testing.assert_allclose(all_.loss.sum() / all_.weight.sum(), loss, rtol=1e-5)
    np.testing.assert_array_equal(first.loss[:2], all_.loss[:2])
    assert not first.loss[2].any() and all_.loss.shape == (3, 4) and all_.outputs is None


def test_no_logits_of_all_tokens_are_ever_made():
    params = shapes_of(TIED)
    loss = lambda hidden, params: losses.weighted_loss(TIED, params, hidden, LABELS, WEIGHTS)
    text = str(jax.make_jaxpr(jax.grad(loss))(HIDDEN, params))
    assert "f32[8,20]" in text and "f32[21,20]" not in text and "f32[24,20]" not in text


def batches(n, seed=0):
    """{"tokens": (n, 4, 7), "mask": (n, 4, 7)}; every row weighs differently."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (n, 4, 7))
    mask = rng.random((n, 4, 7)) * (rng.random((n, 4, 7)) > 0.3)
    return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask, jnp.float32)}


def test_evaluate_is_the_mean_over_weighted_tokens():
    member = start()
    data = batches(3)
    loss, scores = jit(functools.partial(steps.evaluate, member.program))(
        member.params, member.constants, member.state.trainable, data
    )
    bound = member.program.method.bind(member.state.trainable, member.constants, member.params)
    tokens = data["tokens"].reshape(-1, 7)
    logits = jit(functools.partial(lorax.apply, TIED))(bound, tokens[:, :-1])
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1)
    weights = np.asarray(data["mask"]).reshape(-1, 7)[:, 1:]
    assert scores is None
    np.testing.assert_allclose(loss, np.sum(weights * nll[..., 0]) / weights.sum(), rtol=1e-5)


def test_label_smoothing_mixes_the_target_with_the_even_distribution():
    params = random(shapes_of(TIED))
    ours = jit(losses.weighted_loss, static_argnums=(0, 5))(
        TIED, params, HIDDEN, LABELS, WEIGHTS, 0.1
    )
    logits = lorax.apply(TIED, params, HIDDEN, method="logits")
    target = optax.smooth_labels(jax.nn.one_hot(LABELS, 20), 0.1)
    want = WEIGHTS @ optax.softmax_cross_entropy(logits, target)
    np.testing.assert_allclose(ours, want, rtol=1e-5)


def test_packed_examples_have_the_loss_of_examples_apart():
    params, rng = random(shapes_of(TIED)), np.random.default_rng(5)
    first, second = rng.integers(0, 20, 4), rng.integers(0, 20, 3)
    apart = {"tokens": np.zeros((2, 9), np.int32), "mask": np.zeros((2, 9), np.float32)}
    for row, text in enumerate((first, second)):
        apart["tokens"][row, : len(text)], apart["mask"][row, 1 : len(text)] = text, 1
    packed = {
        "tokens": np.concatenate([first, second, [0, 0]])[None].astype(np.int32),
        "mask": np.array([[0, 1, 1, 1, 0, 1, 1, 0, 0]], np.float32),
        "segments": np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32),
    }
    loss = jit(functools.partial(losses.lm_loss, TIED))
    (one, n, _), (other, m, _) = loss(params, packed), loss(params, apart)
    assert n == m == 5
    np.testing.assert_allclose(one, other, rtol=1e-5)
    blind = {name: x for name, x in packed.items() if name != "segments"}
    assert abs(loss(params, blind)[0] - other) > 1e-3


class Classifier(nn.Module):
    """The least that `class_loss` asks of an encoder."""

    labels: int

    @nn.compact
    def __call__(self, tokens, segments, types):
        x = nn.Embed(20, 8)(tokens) + nn.Embed(2, 8)(types)
        return nn.Dense(self.labels)(jnp.sum(x * (segments > 0)[..., None].astype("float32"), 1))


@pytest.mark.parametrize("labels", [1, 3])
def test_class_loss_counts_rows_with_tokens(labels):
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 2, (5, 4)).astype(np.int32) for name in ("tokens", "types")}
    batch["segments"] = np.ones((5, 4), np.int32)
    batch["segments"][4] = 0
    kind = np.float32 if labels == 1 else np.int32
    batch["label"] = rng.integers(0, 3, 5).astype(kind)
    module = Classifier(labels)
    params = random(jax.eval_shape(module.init, jax.random.key(0), *[batch["tokens"]] * 3))
    total, n, scores = jit(functools.partial(losses.class_loss, module))(params["params"], batch)
    if labels == 1:
        want = np.square(scores[:4, 0] - batch["label"][:4]).sum()
    else:
        want = -np.asarray(jax.nn.log_softmax(scores))[np.arange(4), batch["label"][:4]].sum()
    assert n == 4 and scores.shape == (5, labels)
    np.testing.assert_allclose(total, want, rtol=1e-5)


MLP = vision.MLP(vision.MLPConfig((12, 6, 3)))


def arrays(labels, n=7):
    """Images (n, 2, 2, 3) uint8 with classes, or (n, 12) float32 with 3 values; the last row of
    either has no weight. And an MLP's parameters."""
    rng = np.random.default_rng(0)
    batch = {"weight": np.array([1.0] * (n - 1) + [0], np.float32)}
    if labels == "classes":
        batch["inputs"] = rng.integers(0, 256, (n, 2, 2, 3)).astype(np.uint8)
        batch["label"] = rng.integers(0, 3, n).astype(np.int32)
    else:
        batch["inputs"] = rng.standard_normal((n, 12)).astype(np.float32)
        batch["label"] = rng.standard_normal((n, 3)).astype(np.float32)
    example = jnp.zeros((1, 12), jnp.float32)
    return batch, random(jax.eval_shape(MLP.init, jax.random.key(0), example)["params"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_array_loss_of_classes_is_the_cross_entropy_of_scaled_pixels(smoothing):
    batch, params = arrays("classes")
    loss = jit(functools.partial(losses.array_loss, MLP, smoothing=smoothing))
    total, weight, scores = loss(params, batch)
    pixels = jnp.asarray(batch["inputs"] / 255, jnp.float32)
    np.testing.assert_allclose(scores, MLP.apply({"params": params}, pixels), rtol=1e-5)
    nats = -np.asarray(jax.nn.log_softmax(scores))[:6]
    right = nats[np.arange(6), batch["label"][:6]]
    want = (1 - smoothing) * right.sum() + smoothing * nats.mean(axis=1).sum()
    assert weight == 6 and scores.shape == (7, 3)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    same = loss(params, batch | {"inputs": pixels})  # floats are taken as they are
    assert_same(same, (total, weight, scores), rtol=1e-6)


def test_array_loss_of_values_is_the_mean_squared_error():
    batch, params = arrays("values")
    found = jit(functools.partial(losses.array_loss, MLP))(params, batch)
    outputs = np.asarray(MLP.apply({"params": params}, batch["inputs"]))
    np.testing.assert_allclose(found[2], outputs, rtol=1e-5)
    assert found[1] == 6
    np.testing.assert_allclose(
        found[0], np.square(outputs - batch["label"])[:6].mean(axis=1).sum(), rtol=1e-5
    )


@pytest.mark.parametrize("labels", ["classes", "values"])
def test_evaluation_of_arrays_does_not_count_rows_without_weight(labels):
    batch, params = arrays(labels)
    method = lorax.method("full")
    trainable, constants = method.init(jax.random.key(0), params)
    program = steps.Program(
        MLP, method, {}, config.default().train, False, False, kind=kinds.ARRAYS
    )
    run = jit(functools.partial(steps.evaluate, program))
    lead = lambda *index: {name: x[list(index)][None] for name, x in batch.items()}
    loss, scores = run(params, constants, trainable, lead(0, 1, 2, 3, 4, 5, 6))
    fewer, _ = run(params, constants, trainable, lead(0, 1, 2, 3, 4, 5))
    np.testing.assert_allclose(loss, fewer, rtol=1e-6)
    assert scores.shape == (1, 7, 3)
    unscored = program._replace(kind=kinds.ARRAYS._replace(scored=False))
    without = steps.evaluate(unscored, params, constants, trainable, lead(*range(7)))
    assert without[1] is None


# -------------------------------------------------------------------------------------------- step


class Member(NamedTuple):
    program: steps.Program
    params: dict
    constants: dict
    hyper: steps.Hyper
    state: steps.MemberState
    step: Callable  # (state, batch) -> (state, metrics)


@functools.cache
def start(dropout=0.0, merge=False, dtype="float32", **train):
    """A member in the middle of training: both of its factors are off zero."""
    section = config.default().train
    plain = dict(steps=100, warmup=0, lr=0.1, schedule="constant", clip=0.0, weight_decay=0.1)
    section.update(plain | train)
    module = gpt2.GPT2(gpt2.Config(**CONFIG, dtype=dtype))
    params = random(shapes_of(module))
    method = lorax.method("lora", rank=2, targets=("q", "up", "embed"), dropout=dropout)
    trainable, constants = method.init(jax.random.key(0), params)
    hyper = steps.Hyper(
        jnp.float32(section.lr), jnp.float32(section.weight_decay), jax.random.key(7)
    )
    program = steps.Program(
        module, method, ops.sites_from_shapes(params), section, dropout > 0, merge
    )
    state = steps.start(method, random(trainable, seed=1), constants, section, hyper, program.sites)
    run = jit(functools.partial(steps.train_step, program))
    step = lambda state, batch, hyper=hyper: run(params, constants, hyper, state, batch)
    return Member(program, params, constants, hyper, state, step)


def assert_same(one, two, rtol=0.0, atol=0.0):
    """Trees of the same numbers; NaN is no number."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, equal_nan=False)


SGD = dict(optimizer="sgd", b1=0.0, weight_decay=0.0, lr=1.0)


def test_adam_does_not_see_how_scale_and_rates_are_shared():
    """alpha / (p q), p times A and its rate, q times B and its rate: the same training (LoRA
    Without Regret), bit for bit where p and q are powers of two; eps = 0, no clipping, no decay."""
    params, section = random(shapes_of(TIED)), config.default().train
    section.update(steps=9, warmup=0, schedule="constant", clip=0.0)
    sites = ops.sites_from_shapes(params)
    several = jax.tree.map(lambda x: jnp.repeat(x[None], 3, axis=0), batches(1))

    @functools.cache
    def program(eps):  # one for all: the scale and the ratio are data to it
        own = section.copy_and_resolve_references()
        own.eps = eps
        method = lorax.method("lora+", rank=2, targets=("q", "v"))
        made = steps.Program(TIED, method, sites, own, dropout=False, merge=False)
        return made, jit(functools.partial(steps.train_steps, made))

    def run(p, q, eps=0.0):
        made, go = program(eps)
        hp = dict(rank=2, alpha=4 / (p * q), targets=("q", "v"), ratio=q / p)
        method = lorax.method("lora+", **hp)
        trainable, constants = method.init(jax.random.key(0), params)
        flat = tree.flatten(random(trainable, seed=1))  # B off zero: eps = 0 makes 0 / 0 of it
        flat = {path: (p if path.endswith("/a") else q) * x for path, x in flat.items()}
        hyper = steps.Hyper(jnp.float32(0.1 * p), jnp.float32(0), jax.random.key(0))
        state = steps.start(method, tree.unflatten(flat), constants, made.train, hyper, sites)
        state, logs = go(params, constants, hyper, state, several)
        return logs["loss"], method.delta(state.trainable, constants, params)

    plain = run(1, 1)
    assert plain[0][0] > plain[0][-1]
    assert_same(plain, run(8, 0.5))
    assert_same(plain, run(0.25, 16))
    assert np.abs(plain[0] - run(8, 0.5, eps=1e-3)[0]).max() > 1e-4


def test_an_accumulated_batch_is_the_whole_batch():
    whole, parts = batches(1), jax.tree.map(lambda x: x.reshape(2, 2, 7), batches(1))
    member = start(**SGD)
    (one, metrics), (two, in_parts) = (member.step(member.state, b) for b in (whole, parts))
    assert_same(metrics, in_parts, rtol=1e-5)
    assert_same(one.trainable, two.trainable, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.trainable, member.state.trainable)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_the_merged_forward_pass_trains_the_same(monkeypatch):
    plain, merged = start(**SGD), start(**SGD, merge=True)
    (one, metrics), (two, merged_metrics) = (m.step(m.state, batches(1)) for m in (plain, merged))
    assert_same(metrics, merged_metrics, rtol=1e-5)
    assert_same(one.trainable, two.trainable, rtol=1e-4, atol=1e-5)
    for member, merges in ((plain, False), (merged, True)):
        step = functools.partial(steps.train_step, member.program)
        with monkeypatch.context() as patched:
            calls = traced(patched, leaves, "merged_linear")
            jax.eval_shape(step, *member[1:5], batches(1))
        assert bool(calls) == merges


def test_clipping_bounds_the_step_and_not_the_metric():
    (free, metrics), (clipped, clipped_metrics) = (
        member.step(member.state, batches(1)) for member in (start(**SGD), start(**SGD, clip=0.01))
    )
    assert_same(metrics, clipped_metrics, rtol=1e-6)
    length = lambda state: optax.tree.norm(
        jax.tree.map(jnp.subtract, state.trainable, start(**SGD).state.trainable)
    )
    np.testing.assert_allclose(length(free), metrics["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(length(clipped), 0.01, rtol=1e-2)


def test_a_step_that_is_not_finite_ends_the_member_where_it_was():
    member, good = start(), batches(1)
    bad = good | {"mask": good["mask"].at[0, 1, 2].set(jnp.nan)}
    first, metrics = member.step(member.state, good)
    assert first.step == 1 and first.diverged_at == -1 and np.isfinite(metrics["loss"])
    second, metrics = member.step(first, bad)
    assert second.step == 2 and second.diverged_at == 2 and np.isnan(metrics["loss"])
    assert_same(second[:2], first[:2])
    third, _ = member.step(second, good)
    assert_same(third[:2], first[:2])
    assert third.diverged_at == 2


def test_steps_past_the_last_change_nothing():
    member, data = start(), batches(1)
    for done, changes in ((99, True), (100, False), (101, False)):
        before = member.state._replace(step=jnp.int32(done))
        after, _ = member.step(before, data)
        assert after.step == done + changes and after.diverged_at == -1
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after[:2], before[:2])
        assert set(jax.tree.leaves(moved)) == {changes}


def test_train_steps_is_step_after_step():
    member, data = start(), batches(3)
    one_by_one = member.state
    for i in range(3):
        one_by_one, last = member.step(one_by_one, jax.tree.map(lambda x, i=i: x[i : i + 1], data))
    together, metrics = jit(functools.partial(steps.train_steps, member.program))(
        member.params,
        member.constants,
        member.hyper,
        member.state,
        jax.tree.map(lambda x: x[:, None], data),
    )
    assert metrics["loss"].shape == (3,)
    np.testing.assert_allclose(metrics["loss"][-1], last["loss"], rtol=1e-4)
    assert_same(together.trainable, one_by_one.trainable, rtol=1e-3, atol=1e-4)


def test_dropout_is_a_function_of_key_and_step():
    member, data = start(dropout=0.5), batches(1)
    loss = lambda state, key: float(
        member.step(state, data, member.hyper._replace(key=jax.random.key(key)))[1]["loss"]
    )
    later = member.state._replace(step=jnp.int32(1))
    assert loss(member.state, 7) == loss(member.state, 7)
    assert len({loss(member.state, 7), loss(member.state, 8), loss(later, 7)}) == 3


def test_bfloat16_computation_trains_float32_adapters():
    full, half = start(), start(dtype="bfloat16")
    (_, expected), (after, metrics) = (m.step(m.state, batches(1)) for m in (full, half))
    assert {x.dtype for x in jax.tree.leaves(after.trainable)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0.02)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=0.1)


def test_the_loss_falls():
    member, data = start(), batches(1)
    state, hyper, losses = member.state, member.hyper._replace(lr=jnp.float32(0.02)), []
    for _ in range(30):
        state, metrics = member.step(state, data, hyper)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------ memory


def temporaries(method, trainable, constants, params, module):
    """Bytes that the compiled step needs besides its arguments and results."""
    section = config.default().train
    hyper = steps.Hyper(jnp.float32(0.1), jnp.float32(0.1), jax.random.key(0))
    program = steps.Program(module, method, {}, section, dropout=False, merge=False)
    state = jax.eval_shape(
        lambda t: steps.start(method, t, constants, section, hyper, {}), trainable
    )
    batch = {"tokens": jnp.zeros((1, 1, 7), jnp.int32), "mask": jnp.ones((1, 1, 7))}
    compiled = (
        jit(functools.partial(steps.train_step, program))
        .lower(params, constants, hyper, state, batch)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes, state.opt_state


def test_nothing_is_computed_or_kept_for_a_frozen_weight():
    """Weights dwarf activations here, so a gradient of them would be seen."""
    module = gpt2.GPT2(gpt2.Config(**CONFIG | dict(n_embd=128, n_layer=8, vocab_size=2000)))
    params = shapes_of(module)
    method = lorax.method("lora", rank=1, targets=("q", "v"))
    trainable, constants = method.init(jax.random.key(0), params)
    adapter, opt_state = temporaries(method, trainable, constants, params, module)
    everything = method._replace(bind=lambda trainable, *_: trainable)
    full, _ = temporaries(everything, params, {}, params, module)
    assert full > 0.8 * tree.nbytes(params)  # the control: so much would gradients of all take
    assert adapter < 0.2 * tree.nbytes(params)
    assert tree.nbytes(opt_state) == 2 * tree.nbytes(trainable) + 4 + 4  # and two counts
