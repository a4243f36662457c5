"""AdaLoRA: the contract, the budget and who wins it, and training beside PEFT's."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from flax import linen as nn
from quick import jit
from support import few, require

import lorax
from lorax import config, intercept, methods, tree
from lorax.config import Member
from lorax.methods.adalora import adalora, schedule
from lorax.models import Base, gpt2
from lorax.train import stacks
from lorax.train import step as steps
from lorax.train.members import over_members

CONFIG = gpt2.Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=3, n_head=2, n_inner=24)
TOKENS = jnp.arange(20).reshape(2, 10)


@functools.cache
def base() -> Base:
    module = gpt2.GPT2(CONFIG)
    params = jit(module.init)(jax.random.key(7), TOKENS)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    return Base(module, params, CONFIG, None, intercept.sites(module, params, TOKENS), "gpt2", "")


def moved(state, seed=0):
    """The state with noise on every entry that is not padding."""
    rng, flat = np.random.default_rng(seed), {}
    for path, f in methods.joined(*state).items():
        real = np.asarray(f["real"])
        for name, mask in (("a", real[..., None, :]), ("e", real), ("b", real[..., None])):
            noise = 0.3 * rng.normal(size=f[name].shape).astype(np.float32)
            flat[f"{path}/{name}"] = jnp.asarray((np.asarray(f[name]) + noise) * mask)
    return state._replace(trainable=tree.unflatten(flat))


def section(n, **more):
    c = config.default().train
    c.update(steps=n, warmup=0, lr=5e-3, schedule="constant", clip=0.0, weight_decay=0.1, **more)
    return c


def train(method, state, section, n, tokens=None, base=base):
    """(MemberState, (n,) losses) after n steps, on random tokens or those given (n, B, T + 1)."""
    if tokens is None:
        tokens = np.random.default_rng(3).integers(0, 30, (n, 4, 11))
    hyper = steps.Hyper(
        jnp.float32(section.lr), jnp.float32(section.weight_decay), jax.random.key(0)
    )
    model = base()
    program = steps.Program(model.module, method, model.sites, section, dropout=False, merge=False)
    member = steps.start(method, *state, section, hyper, model.sites)
    tokens = jnp.asarray(tokens, jnp.int32)[:, None]
    batches = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.float32)}
    run = jit(functools.partial(steps.train_steps, program))
    member, logs = run(model.params, state.constants, hyper, member, batches)
    return member, np.asarray(logs["loss"])


def ranks(trainable) -> dict[str, np.ndarray]:
    """{path: triplets left of each layer}"""
    return {p: np.count_nonzero(f["e"], axis=-1) for p, f in methods.joined(trainable).items()}


# ---------------------------------------------------------------------------------------- contract

VARIANTS = [
    dict(rank=2, target_rank=2, targets=("all-linear", "embed"), layers=None),
    dict(rank=3, target_rank=1, targets=("q", "up"), layers=(0, -1), alpha=3.0),
]


@pytest.mark.parametrize("hp", VARIANTS)
def test_starts_as_the_base_counts_by_the_formula_and_merges(hp):
    method, params, sites = adalora(**hp), base().params, base().sites
    state = method.init(jax.random.key(0), params, sites)

    @jit
    def run(state):
        plain = lambda params: base().module.apply({"params": params}, TOKENS)
        bound = method.bind(*state, params, sites=sites)
        return (
            plain(params),
            lorax.apply(base().module, bound, TOKENS),
            plain(methods.merge(method, state, params, sites)),
            method.delta(*state, params, sites),
            method.factors(*state, params, sites),
        )

    expected, bound, merged, _, _ = run(state)
    np.testing.assert_allclose(bound, expected, atol=1e-6)
    np.testing.assert_allclose(merged, expected, atol=1e-6)
    own = methods.joined(*state)
    sizes = {p: f["a"].shape[-2] + 1 + f["b"].shape[-1] for p, f in own.items()}
    real = sum(int(np.sum(f["real"])) * sizes[path] for path, f in own.items())
    assert method.count(params, sites) == real
    if hp.get("layers") is None:
        assert real == tree.count(state.trainable)
    state = moved(state)
    own = jax.tree.map(np.asarray, methods.joined(*state))
    _, bound, merged, deltas, factors = run(state)
    assert np.abs(bound - expected).max() > 0.1
    np.testing.assert_allclose(merged, bound, atol=1e-5)
    scale = hp.get("alpha", 8.0) / (hp["rank"] + 1e-5)
    assert method.hp["scale"] == pytest.approx(scale, rel=1e-12)
    for path, (a, b, s, m) in factors.items():
        diagonal = np.einsum("...ir,...r,...ro->...io", *(own[path][n] for n in "aeb"))
        np.testing.assert_allclose(deltas[path], scale * diagonal, atol=1e-5)
        product = np.asarray(s)[..., None, None] * (np.asarray(a) @ np.asarray(b))
        np.testing.assert_allclose(product, deltas[path], atol=1e-5)
        assert m is None


def test_a_and_b_start_at_a_fiftieth_and_no_two_layers_share_a_number():
    state = adalora(rank=8, targets="attention").init(jax.random.key(0), base().params)
    own = methods.joined(state.trainable)
    drawn = np.concatenate([np.ravel(f[n]) for f in own.values() for n in "ab"])
    assert abs(drawn.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * drawn.size)
    assert abs(drawn.mean()) < 5 * 0.02 / np.sqrt(drawn.size)
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert not any(f["e"].any() for f in own.values())


class Layers(nn.Module):
    """In float64 where its input is; GPT-2's softmax is float32."""

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((6, 8, 5)):
            x = nn.tanh(nn.Dense(width, name=f"h_{i}")(x))
        return x


def test_gradients_are_finite_differences_in_float64():
    """Of the loss and the penalty together, with padding and a layer left out."""
    with jax.enable_x64():
        wide = lambda t: jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, t
        )
        x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 7)))
        params = wide(jit(Layers().init)(jax.random.key(0), x.astype(jnp.float32))["params"])
        method = adalora(rank=3, target_rank=2, targets="re:.*/kernel", layers=(0, 2))
        state = moved(method.init(jax.random.key(0), params, pad=5))
        trainable, constants = wide(state.trainable), state.constants

        def loss(trainable):
            out = lorax.apply(Layers(), method.bind(trainable, constants, params), x)
            assert out.dtype == jnp.float64
            return jnp.sum(jnp.sin(out)) + method.penalty(trainable, constants)

        grads, loss = jit(jax.grad(loss))(trainable), jit(loss)
        rng, checked = np.random.default_rng(0), 0
        for path, g in tree.flatten(grads).items():
            real = methods.joined(constants)[path.rpartition("/")[0]]["real"]
            mask = {"a": real[..., None, :], "e": real, "b": real[..., None]}[path[-1]]
            mask = np.broadcast_to(mask, g.shape)
            assert not np.any(np.asarray(g)[~mask])  # padding stays where it is
            for index in rng.permutation(np.argwhere(mask))[:2]:
                at = lambda h, path=path, index=tuple(index): loss(
                    tree.unflatten(
                        {p: x.at[index].add(h) if p == path else x
                         for p, x in tree.flatten(trainable).items()}
                    )
                )  # fmt: skip
                numeric = (at(1e-6) - at(-1e-6)) / 2e-6
                np.testing.assert_allclose(g[tuple(index)], numeric, rtol=1e-6, atol=1e-9)
                checked += 1
        assert checked == 2 * 2 * 3


def test_penalty_is_the_mean_frobenius_norm_and_has_a_gradient_where_it_is_zero():
    method = adalora(rank=3, target_rank=1, orthogonal=0.25, layers=(0, 2))
    state = method.init(jax.random.key(0), base().params, base().sites, pad=5)
    state = moved(state)
    norms = []
    for f in methods.joined(state.trainable).values():
        for layer in (0, 2):
            a, b = np.asarray(f["a"])[layer, :, :3], np.asarray(f["b"])[layer, :3]
            norms += [np.linalg.norm(a.T @ a - np.eye(3)), np.linalg.norm(b @ b.T - np.eye(3))]
    assert len(norms) == 8
    run = jit(jax.value_and_grad(method.penalty))
    np.testing.assert_allclose(run(*state)[0], 0.25 * np.mean(norms), rtol=1e-6)
    perfect = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), state.trainable)
    for f in methods.joined(perfect).values():
        f["a"][[0, 2], :3, :3] = f["b"][[0, 2], :3, :3] = np.eye(3)
    value, grads = run(perfect, state.constants)
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))  # nor NaN


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (dict(rank=4, target_rank=5), "method.target_rank: 5 given, must be from 1 to the rank, 4"),
        (dict(every=0), "method.every: 0 given, must be at least 1"),
        (dict(tfinal=-1), "method.tfinal: -1 given, must be at least 0"),
        (dict(orthogonal=-0.5), "method.orthogonal: -0.5 given"),
        (dict(beta2=1.0), r"method.beta2: 1.0 given, must be in \(0, 1\)"),
        (dict(dropout=float("nan")), "method.dropout: nan given"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(hp, message):
    with pytest.raises(ValueError, match=message):
        adalora(**hp)


def test_no_step_to_prune_in_is_an_error_before_the_first():
    method = adalora(rank=2, target_rank=1, tinit=4, tfinal=6)
    state = method.init(jax.random.key(0), base().params)
    start = lambda n: method.optimizer(optax.identity(), state.constants, section(n)).init(
        state.trainable
    )
    message = "method.tinit: 4 given, with method.tfinal 6 must leave .* the 10 steps"
    with pytest.raises(ValueError, match=message):
        start(10)
    assert start(11).budgets.tolist() == [12] * 5 + [6] * 7


# ------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize(
    ("n", "rank", "target", "tinit", "tfinal", "total"),
    [(48, 12, 8, 0, 0, 100), (7, 12, 1, 3, 5, 12), (144, 8, 3, 500, 800, 3000), (1, 2, 1, 0, 0, 1)],
)
def test_the_budgets_are_pefts(n, rank, target, tinit, tfinal, total, every):
    adalora_layer = pytest.importorskip("peft.tuners.adalora.layer") or require("peft")
    allocator = object.__new__(adalora_layer.RankAllocator)
    allocator.init_bgt, allocator.target_bgt = n * rank, n * target
    allocator.peft_config = SimpleNamespace(
        tinit=tinit, tfinal=tfinal, total_step=total, deltaT=every
    )
    ours = schedule(n * rank, n * target, tinit, tfinal, every, total)
    last = total - tfinal
    for t in range(1, total + 1):
        budget, prunes = allocator.budget_schedule(t)
        # `update_and_allocate` forces it at the last step and repeats that mask after it.
        expected = budget if prunes or t >= last else n * rank
        assert ours[t] == expected, t
    assert ours[0] == n * rank and ours[total] == n * target


def allocate(method, state, total, gradients):
    """[{path: e}] after each step of plain gradient descent by the allocator itself."""
    transformation = method.optimizer(optax.sgd(1e-3), state.constants, section(total))
    opt, trainable, seen = transformation.init(state.trainable), state.trainable, []
    for g in gradients:
        updates, opt = transformation.update(g, opt, trainable)
        trainable = optax.apply_updates(trainable, updates)
        seen.append({p: np.asarray(f["e"]) for p, f in methods.joined(trainable).items()})
    return seen


def test_the_budget_is_met_at_every_step_even_with_equal_scores():
    """Gradients of zero: all scores are equal, the first triplets stay."""
    method = adalora(rank=4, target_rank=1, tinit=1, tfinal=3, every=2, layers=(1, 2))
    state = moved(method.init(jax.random.key(0), base().params, base().sites, pad=6))
    zero = jax.tree.map(jnp.zeros_like, state.trainable)
    seen = allocate(method, state, 10, [zero] * 10)
    left = [sum(np.count_nonzero(e) for e in es.values()) for es in seen]
    # Nothing grows again: what a pruning has left is there until the next.
    assert left == np.minimum.accumulate(schedule(16, 4, 1, 3, 2, 10)[1:]).tolist()
    assert left[0] == 16 and left[-1] == 4 and len(set(left)) > 3
    first, second = (seen[-1][f"h/attn/{w}/kernel"] for w in "qv")
    assert np.count_nonzero(first[1]) == 4 and not first[0].any() and not second.any()


def test_scores_are_the_formulas_and_the_last_choice_is_final():
    """Against a plain loop in float64 that follows the equations entry by entry."""
    method = adalora(rank=3, target_rank=1, tfinal=4, beta1=0.7, beta2=0.6, every=2)
    state = moved(method.init(jax.random.key(0), base().params))
    rng, shape = np.random.default_rng(4), methods.joined(state.trainable)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    gradients = [jax.tree.map(noise, state.trainable) for _ in range(10)]
    seen = allocate(method, state, 10, gradients)
    p = {k: {n: np.float64(x) for n, x in f.items()} for k, f in shape.items()}
    mean = {k: {n: np.zeros(x.shape) for n, x in f.items()} for k, f in p.items()}
    spread = {k: {n: np.zeros(x.shape) for n, x in f.items()} for k, f in p.items()}
    budgets, masks = schedule(18, 6, 0, 4, 2, 10), []
    for t, g in enumerate(gradients, 1):
        scores = []
        for path, f in p.items():
            for name in f:
                d = np.float64(methods.joined(g)[path][name])
                f[name] -= 1e-3 * d
                if t < 6:
                    now = np.abs(f[name] * d)
                    m = mean[path][name] = 0.7 * mean[path][name] + 0.3 * now
                    spread[path][name] = 0.6 * spread[path][name] + 0.4 * np.abs(now - m)
            s = {n: mean[path][n] * spread[path][n] for n in f}
            scores.append(s["e"] + s["a"].mean(-2) + s["b"].mean(-1))
        kept = np.zeros(18, bool)
        kept[np.argsort(-np.ravel(scores))[: budgets[t]]] = True
        masks.append(kept)
        for mask, (path, f) in zip(kept.reshape(2, 3, 3), p.items(), strict=True):
            f["e"] *= mask
            np.testing.assert_allclose(seen[t - 1][path], f["e"], rtol=1e-4, atol=1e-7)
    assert all((m == masks[5]).all() for m in masks[5:])
    assert np.count_nonzero(seen[2]["h/attn/q/kernel"]) == 9  # step 3 prunes nothing: grown again


def test_training_ends_at_the_target_budget_spread_unevenly():
    method = adalora(rank=6, target_rank=2, targets=("q", "v", "up"), tinit=2, tfinal=3)
    method = methods.full.beside(method, ("biases",), "float32")
    state = method.init(jax.random.key(0), base().params, base().sites)
    member, losses = train(method, state, section(14), 14)
    own = ranks(methods.full.apart(member.trainable)[0])
    left = np.concatenate([n.ravel() for n in own.values()])
    assert left.size == 3 * 3 and left.sum() == 2 * left.size and left.max() - left.min() >= 2
    assert np.isfinite(losses).all() and int(member.step) == 14
    factors = method.factors(member.trainable, state.constants, base().params)
    for path, (a, *_) in factors.items():
        np.testing.assert_array_equal(np.any(a, axis=-2).sum(-1), own[path])


# ------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_members_of_one_program_are_themselves_alone():
    """Other ranks, targets, layers, budgets, schedules, averages and scales, side by side."""
    points = [
        dict(rank=4, target_rank=1, targets=("q", "v"), tinit=1, tfinal=2, alpha=8.0),
        dict(rank=2, target_rank=1, targets=("q", "up"), every=2, layers=(0, 2), orthogonal=0.1),
    ]
    tokens = np.random.default_rng(3).integers(0, 30, (9, 1, 4, 11)).astype(np.int32)

    def run(points):
        chosen = []
        for i, point in enumerate(points):
            c = config.default()
            c.method.update(name="adalora", **point)
            c.train = section(9)
            chosen.append(Member(i, str(i), point, c))
        stacked, m = stacks.stack(chosen, stacks.build_methods(chosen, base()), base()), len(chosen)
        program = steps.Program(
            base().module, stacked.methods[0], base().sites, chosen[0].config.train, False, False
        )
        train = functools.partial(steps.train_steps, program, base().params)
        batches = {"tokens": np.repeat(tokens[None], m, 0)}
        batches["mask"] = np.ones(batches["tokens"].shape, np.float32)
        state, logs = jit(over_members(train, m))(
            stacked.constants, stacked.hyper, stacked.state, batches
        )
        pick = lambda i: jax.tree.map(lambda x: np.asarray(x[i]), state.trainable)
        return np.asarray(logs["loss"]), [methods.joined(pick(i)) for i in range(m)]

    losses, together = run(points)
    for i, point in enumerate(points):
        alone, (own,) = run([point])
        np.testing.assert_allclose(losses[i], alone[0], rtol=1e-6)
        for path, f in together[i].items():
            for name, x in f.items():
                found = np.zeros(x.shape, np.float32)  # zeros in the padding
                if path in own:
                    found[tuple(slice(n) for n in own[path][name].shape)] = own[path][name]
                np.testing.assert_allclose(x, found, rtol=1e-4, atol=1e-6)
                np.testing.assert_array_equal(x != 0, found != 0)
    left = [sum(np.count_nonzero(f["e"]) for f in own.values()) for own in together]
    assert left == [1 * 2 * 3, 1 * 2 * 2]


# -------------------------------------------------------------------------------------------- PEFT

PLACES = {
    "gpt2": {"attn.c_proj": "attn/o", "c_fc": "mlp/up", "mlp.c_proj": "mlp/down"},
    "llama": {
        **{f"{w}_proj": f"attn/{w}" for w in "qkvo"},
        **{f"{w}_proj": f"mlp/{w}" for w in ("gate", "up", "down")},
    },
}
PHASES = dict(
    tinit=2, tfinal=86, every=2
)  # of 100 steps: pruning at 4, 6... 14, and 14 is the last


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", few(("gpt2", "llama"), ("llama",)))
def test_twenty_steps_with_pruning_are_pefts(family, tmp_path):
    torch, peft = require("torch"), require("peft")
    ours, theirs = parity.pair(family, tmp_path)
    places = PLACES[family]
    model = peft.get_peft_model(
        theirs,
        peft.AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=4, target_r=2, lora_alpha=6, target_modules=list(places),
            total_step=100, tinit=PHASES["tinit"], tfinal=PHASES["tfinal"], deltaT=PHASES["every"],
            fan_in_fan_out=family == "gpt2", orth_reg_weight=0.3, beta1=0.8, beta2=0.9,
        ),
    )  # fmt: skip
    parity.disturb(model)
    method = adalora(
        rank=4, alpha=6.0, target_rank=2, orthogonal=0.3, beta1=0.8, beta2=0.9, **PHASES,
        targets=tuple(place.rpartition("/")[2] for place in places.values()),
    )  # fmt: skip
    state = method.init(jax.random.key(0), ours.params, ours.sites)
    state = parity.filled(state, from_peft(model, places))
    difference = np.abs(parity.logits(ours, method, state) - parity.logits_torch(model)).max()
    assert difference < 1e-5

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, parity.LR, weight_decay=parity.DECAY)
    expected, left, penalties = [], [], []
    for i, tokens in enumerate(torch.tensor(parity.batches()).long()):
        out = model(input_ids=tokens, labels=tokens)  # its loss has the penalty
        flat = out.logits[:, :-1].flatten(0, 1)
        nats = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten())
        out.loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(i + 1)
        optimizer.zero_grad()
        expected.append(float(nats.detach()))
        penalties.append(float((out.loss - nats).detach()))
        now = from_peft(model, places)
        left.append(sum(np.count_nonzero(x) for p, x in now.items() if p.endswith("/e")))
    np.testing.assert_allclose(method.penalty(*state), penalties[0], rtol=1e-5)
    n = parity.LAYERS * len(places)
    assert left[0] == 4 * n and left[3] < 4 * n and left[13:] == [2 * n] * 7

    member, losses = train(
        method, state, parity._section(), 20, parity.batches(), base=lambda: ours
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    final, worst = tree.flatten(member.trainable), 0.0
    for path, x in from_peft(model, places).items():
        worst = max(worst, np.abs(final[path] - x).max())
        if path.endswith("/e"):
            np.testing.assert_array_equal(np.asarray(final[path]) != 0, x != 0)
    assert worst < 1e-4


def from_peft(model, places) -> dict[str, np.ndarray]:
    """{path/name: array} of ours, layers stacked."""
    found = {}
    for name, x in parity.arrays(model).items():
        for module, place in places.items():
            for theirs, mine in (("lora_A", "a"), ("lora_E", "e"), ("lora_B", "b")):
                if f"{module}.{theirs}." in name:
                    value = x[:, 0] if mine == "e" else x.T
                    found.setdefault(f"h/{place}/kernel/{mine}", []).append(value)
    return {path: np.stack(layers) for path, layers in found.items()}
