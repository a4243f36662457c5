"""Starts: the base at step 0, PEFT's own starts, what is drawn, what is exported."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from quick import jit
from support import require

import lorax
from lorax import adapters, methods, tree
from lorax.catalogue import TAKEN_OFF
from lorax.interop import peft as adapter_files
from lorax.methods import sensitivity, starts
from lorax.tasks.kinds import TEXTS

pytestmark = pytest.mark.usefixtures("unoptimised")
RANK, ALPHA = 4, 8.0
#: our path -> PEFT's module
MODULES = {
    "h/attn/q/kernel": "self_attn.q_proj",
    "h/attn/o/kernel": "self_attn.o_proj",
    "h/mlp/down/kernel": "mlp.down_proj",
}
TARGETS = ("q", "o", "down")
#: LoftQ's start makes up for what quantising took, and is tested with it (test_evidence).
EXACT = TAKEN_OFF


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return parity.pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def evidence(pair):
    tokens = parity.batches()[:2]
    batches = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}
    paths = [path for path, site in pair[0].sites.items() if path.startswith("h/")]
    return sensitivity.evidence(pair[0], TEXTS, batches, paths, sensitivity.STATISTICS)


def of(init: str, name: str = "lora", **hp):
    return lorax.method(name, **dict(rank=RANK, alpha=ALPHA, targets=TARGETS, init=init) | hp)


def started(method, base, evidence, **how):
    return method.init(jax.random.key(0), base.params, base.sites, evidence=evidence, **how)


def base_logits(base):
    forward = jit(functools.partial(lorax.apply, base.module))
    return np.asarray(forward(base.params, jnp.asarray(parity.batches()[0, :, :-1])))


# ------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(("name", "init"), [*(("lora", init) for init in EXACT), ("dora", "pissa")])
def test_an_adapted_model_starts_as_its_base(pair, evidence, name, init):
    base, targets = pair[0], ("attention", "mlp")
    method = of(init, name, targets=targets)
    state = started(method, base, evidence)
    want = base_logits(base)
    np.testing.assert_allclose(parity.logits(base, method, state), want, atol=1e-5)
    for path, own in methods.joined(*state).items():
        assert np.all(np.any(own["a"] != 0, axis=-2)), path  # every direction is used
        assert np.any(own["b"]) == (init != "eva") and own["a0"].shape == own["a"].shape
    leaves = tree.flatten(lorax.merge(method, state, base.params, base.sites))
    for path, leaf in tree.flatten(base.params).items():
        np.testing.assert_allclose(leaves[path], leaf, atol=1e-5)


@pytest.mark.parametrize("init", EXACT)
def test_a_member_starts_the_same_whatever_it_is_padded_to(pair, evidence, init):
    base = pair[0]
    method = of(init, rank=2, targets=("q", "down"), layers=(1,))
    alone = methods.joined(*started(method, base, evidence))
    union = methods.resolve(("attention", "mlp"), base.sites)
    for path, own in methods.joined(*started(method, base, evidence, targets=union, pad=7)).items():
        for name in ("a", "b", "a0", "b0"):
            x = np.asarray(own[name] if name[0] == "a" else np.swapaxes(own[name], -2, -1))
            assert x.shape[-1] == 7 and not x[..., 2:].any() and not x[0].any()
            if path in alone:
                y = alone[path][name]
                y = y if name[0] == "a" else np.swapaxes(y, -2, -1)
                np.testing.assert_array_equal(x[..., :2], y)
            else:
                assert not x.any()


def test_what_is_exported_is_the_whole_update_and_peft_loads_it(pair, evidence, tmp_path):
    """Away from the start: rank 2 r factors s [a a0] [b; -b0], on the base as it is."""
    peft, torch = require("peft"), require("torch")
    base, model = pair
    method = of("pissa", rank=3, layers=(1,))
    state = started(method, base, evidence, pad=5)
    moved = jax.tree.map(lambda x: jnp.where(x != 0, x + 0.1, x), state.trainable)
    state = state._replace(trainable=moved)
    found = method.factors(*state, base.params, base.sites)
    delta = method.delta(*state, base.params, base.sites)
    for path, (a, b, s, m) in found.items():
        assert m is None and a.shape[-1] == b.shape[-2] == 10
        own = methods.joined(*state)[path]
        want = s[:, None, None] * (own["a"] @ own["b"] - own["a0"] @ own["b0"])
        np.testing.assert_allclose(delta[path], want, atol=1e-5)
        np.testing.assert_allclose(s[:, None, None] * (a @ b), want, atol=1e-5)
    adapter = adapters.factored(base, method, state)
    adapter_files.save(tmp_path, adapter, base.sources, "base")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    with torch.no_grad():
        theirs = parity.logits_torch(loaded)
    ours = parity.logits(base, method, state)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - base_logits(base)).max() > 0.01


# ------------------------------------------------------------------------------------------ drawn


def test_drawn_starts_have_their_widths(pair):
    """Init[A], Init[B] and Init[AB] of one seed share their factors; what is left out is zero."""
    base = pair[0]
    own = {
        init: methods.joined(*started(of(init, targets=("q", "down")), base, None))
        for init in ("kaiming", "init-b", "both", "both-kept")
    }
    for path, f in own["both"].items():
        n_in, drawn = f["a"].shape[-2], {init: own[init][path] for init in own}
        np.testing.assert_array_equal(f["a"], drawn["kaiming"]["a"])
        for name in ("a", "b"):
            np.testing.assert_array_equal(f[name], drawn["both-kept"][name])
            np.testing.assert_array_equal(f[name], f[f"{name}0"])
            assert 0.9 < np.abs(f[name]).max() * n_in**0.5 <= 1
        b = drawn["init-b"]["b"]
        assert not drawn["init-b"]["a"].any() and 0.9 < np.abs(b).max() * RANK**0.5 <= 1
        assert "a0" not in drawn["init-b"] and "a0" not in drawn["both-kept"]


def test_noise_stays_in_the_base_or_is_taken_out(pair):
    base, want = pair[0], base_logits(pair[0])
    logits = lambda init: parity.logits(base, of(init), started(of(init), base, None))
    np.testing.assert_array_equal(logits("init-b"), want)
    np.testing.assert_allclose(logits("both"), want, atol=1e-5)
    kept = of("both-kept")
    state = started(kept, base, None)
    for path, dw in kept.delta(*state, base.params, base.sites).items():
        f = methods.joined(*state)[path]
        np.testing.assert_allclose(dw, ALPHA / RANK * (f["a"] @ f["b"]), rtol=1e-5, atol=1e-7)
    assert np.abs(logits("both-kept") - want).max() > 0.01


def test_an_embedding_starts_by_the_same_rules():
    params = {"wte": {"embedding": jnp.ones((50, 6))}}
    for init in ("init-b", "both"):
        method = lorax.method("lora", rank=3, targets="embed", init=init)
        f = methods.joined(*method.init(jax.random.key(0), params))["wte/embedding"]
        assert f["a"].any() == (init == "both")
        assert np.abs(f["b"]).max() <= (1 / 3**0.5 if init == "init-b" else 1 / 50**0.5)


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_the_largest_and_the_smallest_singular_values_of_w(pair, name):
    """What is subtracted, s a0 b0, by numpy in float64."""
    base, method = pair[0], of(name)
    flat = tree.flatten(base.params)
    for path, f in methods.joined(*started(method, base, None)).items():
        w = np.asarray(base.sites[path].to_matrix(flat[path]), float)
        u, sigma, vt = np.linalg.svd(w, full_matrices=False)
        chosen = slice(RANK) if name == "pissa" else slice(-RANK, None)
        want = (u[..., chosen] * sigma[:, None, chosen]) @ vt[:, chosen]
        np.testing.assert_allclose(ALPHA / RANK * (f["a0"] @ f["b0"]), want, atol=2e-6)


def test_lora_one_is_a_step_of_gradient_descent(pair, evidence):
    """a b is along minus the gradient's best rank-r part; a small step lowers the loss."""
    base, method = pair[0], of("lora-one", alpha=0.1)
    state = started(method, base, evidence)
    for path, f in methods.joined(*state).items():
        g = np.asarray(evidence[path]["gradient"], float)
        u, sigma, vt = np.linalg.svd(g, full_matrices=False)
        part = (u[..., :RANK] * sigma[:, None, :RANK] / sigma[:, :1, None]) @ vt[:, :RANK]
        want = -part * g.shape[-1] ** 0.5 / 128
        np.testing.assert_allclose(f["a"] @ f["b"], want, atol=1e-5 * np.abs(want).max())
        lengths = [np.linalg.norm(f["a"], axis=-2), np.linalg.norm(f["b"], axis=-1)]
        np.testing.assert_allclose(*lengths, rtol=1e-4)
        assert "a0" not in f

    def loss(params):
        tokens = jnp.concatenate(list(parity.batches()[:2]))
        batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape)}
        return float(jit(lambda params: TEXTS.loss(base.module, params, batch)[0])(params))

    bound = method.bind(*state, base.params, sites=base.sites)
    assert loss(bound) < loss(base.params) - 1e-3


# ------------------------------------------------------------------------------------------- PEFT


def theirs(model, init: str, rho: float = 1.0):
    """A PEFT model with its own start of that name, from the batches that `evidence` has seen."""
    peft, torch = require("peft"), require("torch")
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.eva import initialize_lora_eva_weights
    from peft.tuners.lora.loraga import preprocess_loraga

    model = copy.deepcopy(model)
    more = {
        "corda": {"corda_config": CordaConfig(corda_method="ipm")},
        "corda-kpm": {"corda_config": CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "eva": {"eva_config": EvaConfig(rho=rho)},
    }
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[m.split(".")[1] for m in MODULES.values()],
        init_lora_weights=init.removesuffix("-kpm"), **more.get(init, {}),
    )  # fmt: skip
    batches = torch.tensor(parity.batches()[:2]).long()

    def run():
        for row in batches.flatten(0, 1)[:, :-1]:
            model(input_ids=row[None])

    def step():
        for tokens in batches:
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()

    if init.startswith("corda"):
        preprocess_corda(model, settings, run_model=run)
    if init == "lora_ga":
        model.enable_input_require_grads()  # or its hooks warn
        preprocess_loraga(model, settings, step)
    adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=init == "eva")
    if init == "eva":
        data = [{"input_ids": batches[:, :, :-1].flatten(0, 1)}]
        initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    return adapted


def factors(adapted) -> dict:
    """{(our path, layer): (A^T (in, r), B (out, r), s)}"""
    found = {}
    for name, module in adapted.named_modules():
        for path, own in MODULES.items():
            if name.endswith(own) and hasattr(module, "lora_A"):
                a, b = (
                    m["default"].weight.detach().numpy() for m in (module.lora_A, module.lora_B)
                )
                layer = int(name.split("layers.")[1].split(".")[0])
                found[path, layer] = a.T, b, module.scaling["default"]
    return found


@pytest.mark.parametrize(
    ("init", "name", "tolerance"),
    [
        ("pissa", "pissa", 1e-4),  # rounding over the gap between two singular values
        ("olora", "olora", 1e-5),
        ("corda", "corda", 1e-3),  # the covariance is inverted: its condition is up to 2e4
        ("corda-kpm", "corda-kpm", 1e-3),
        ("lora-ga", "lora_ga", 1e-4),
        ("eva", "eva", 1e-4),
    ],
)
def test_starts_are_pefts(pair, evidence, monkeypatch, init, name, tolerance):
    """Direction by direction, up to its sign: a a^T, b b^T, and a b where their signs go together
    (LoRA-GA's a and b are of different singular values)."""
    torch = require("torch")

    def exact(x, q, niter):
        u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        return u[:, :q], sigma[:q], vt[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)  # theirs is at random, ours is exact
    method = of(init)
    own = methods.joined(*started(method, pair[0], evidence))
    found = factors(theirs(pair[1], name))
    assert len(found) == 2 * len(MODULES)
    outer = lambda x, y: np.einsum("ir,jr->rij", x, y)
    worst = {"a": 0.0, "b": 0.0, "ab": 0.0}
    for (path, layer), (a, b, s) in found.items():
        assert s == method.hp["scale"]
        a0, b0 = np.asarray(own[path]["a"][layer]), np.asarray(own[path]["b"][layer]).T
        pairs = {"a": (outer(a0, a0), outer(a, a)), "b": (outer(b0, b0), outer(b, b))}
        if init != "lora-ga":
            pairs["ab"] = (a0 @ b0.T, a @ b.T)
        for what, (ours, want) in pairs.items():
            off = float(np.abs(ours - want).max() / (np.abs(want).max() or 1))
            worst[what] = max(worst[what], off)
    assert max(worst.values()) <= tolerance and worst["ab"] <= tolerance / 5, worst


def test_orthogonal_is_pefts_by_the_same_draws(pair, monkeypatch):
    torch, drawn = require("torch"), []
    normal = jax.random.normal
    record = lambda key, shape: drawn.append(normal(key, shape)) or drawn[-1]
    monkeypatch.setattr(jax.random, "normal", record)
    params = {"h": {"down": {"kernel": jnp.ones((2, 24, 16))}}}
    method = lorax.method("lora", rank=RANK, targets="down", init="orthogonal")
    own = methods.joined(*method.init(jax.random.key(0), params))["h/down/kernel"]
    layers = list(zip(own["a"], own["b"], strict=True))
    monkeypatch.undo()
    layer = require("peft.tuners.lora.layer")
    for n, (a, b) in enumerate(layers):
        given = iter(torch.tensor(np.asarray(x)) for x in drawn[3 * n : 3 * n + 3])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, given=given: next(given))
            settings = layer.LoraConfig(r=RANK, init_lora_weights="orthogonal")
            frozen = torch.nn.Linear(a.shape[0], b.shape[1])
            theirs = layer.Linear(frozen, "default", settings, r=RANK)
        for ours, factor in ((a, theirs.lora_A), (b, theirs.lora_B)):
            want = factor["default"].weight.detach().numpy().T
            np.testing.assert_allclose(ours, want, atol=1e-6)
        assert np.abs(a @ b).max() < 1e-7 < 0.01 < np.abs(a).max()


def test_training_from_pissa_goes_as_with_peft(pair):
    """AdamW does not see the sign of a direction, so nothing has to be copied."""
    method = of("pissa")
    ours = parity.train(pair[0], method, started(method, pair[0], None))
    np.testing.assert_allclose(ours, parity.train_torch(theirs(pair[1], "pissa")), rtol=1e-4)


def test_ranks_are_redistributed_as_by_eva(pair, evidence):
    own = {path: kinds for path, kinds in evidence.items() if path in MODULES}
    ranks = starts.redistribute(starts.explained(own), RANK, rho=2.0)
    found = {m: a.shape[1] for m, (a, _, _) in factors(theirs(pair[1], "eva", rho=2.0)).items()}
    assert {(p, i): r for (p, (i,)), r in ranks.items()} == found
    assert sum(ranks.values()) == RANK * len(ranks) and len(set(ranks.values())) > 1
    # A member with these ranks: as many directions, the scale of the mean rank, the formula.
    method = of("eva", ranks=starts.by_path(ranks))
    state, total = started(method, pair[0], evidence, pad=9), 0
    for path, f in methods.joined(*state).items():
        for i in range(parity.LAYERS):
            used = np.any(np.asarray(f["a"][i]) != 0, axis=0)
            assert used.sum() == ranks[path, (i,)] and not used[ranks[path, (i,)] :].any()
            total += used.sum() * (f["a"].shape[1] + f["b"].shape[2])
        np.testing.assert_array_equal(f["s"], ALPHA / RANK)
    assert method.count(pair[0].params, pair[0].sites) == total
    np.testing.assert_array_equal(parity.logits(pair[0], method, state), base_logits(pair[0]))


# ----------------------------------------------------------------------------- LoftQ, LoRA-GA, fast


def coarse(w):
    """Eight levels for the whole matrix."""
    step = jnp.max(jnp.abs(w)) / 4
    return jnp.round(w / step) * step


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_is_pefts_where_s_is_one_and_right_for_any(monkeypatch, iterations):
    torch, loftq_utils = require("torch"), require("peft.utils.loftq_utils")
    bitsandbytes = require("bitsandbytes")
    functional = bitsandbytes.functional

    def quantise(w):
        packed, state = functional.quantize_4bit(torch.tensor(np.asarray(w)), quant_type="nf4")
        return jnp.asarray(functional.dequantize_4bit(packed, state).numpy())

    # Theirs asks for a GPU by name; everything it calls runs on a CPU as well.
    here = lambda x: "cpu" if isinstance(x, str) and x == "cuda" else x
    for owner in (torch.Tensor, bitsandbytes.nn.Params4bit):

        def to(self, *args, of=owner.to, **kwargs):
            return of(self, *map(here, args), **{k: here(v) for k, v in kwargs.items()})

        monkeypatch.setattr(owner, "to", to)
    w = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    q, A, B = loftq_utils.loftq_init(torch.tensor(w.T), 4, RANK, iterations)
    for scale in (1.0, 2.5):
        a, b, ours = starts.loftq(
            jnp.asarray(w), RANK, scale, lambda w: quantise(w.T).T, iterations
        )
        np.testing.assert_allclose(ours, q.numpy().T, atol=1e-5)
        np.testing.assert_allclose(scale * a @ b, (B @ A).numpy().T, atol=1e-5)


def test_loftq_comes_closer_than_the_quantised_weight():
    w = jax.random.normal(jax.random.key(0), (40, 24))
    error = lambda n, s: (lambda a, b, q: jnp.linalg.norm(w - q - s * a @ b))(
        *starts.loftq(w, RANK, s, coarse, n)
    )
    assert error(1, 0.5) < 0.95 * jnp.linalg.norm(w - coarse(w))
    assert error(5, 2.0) < error(1, 2.0)


def test_the_papers_lora_ga_has_directions_of_one_length(pair, evidence):
    own = methods.joined(*started(of("lora-ga-paper"), pair[0], evidence))
    peft = methods.joined(*started(of("lora-ga"), pair[0], evidence))
    for path, f in own.items():
        stable = f["b"].shape[-1] ** 0.25 / 4
        for x in (f["a"], np.swapaxes(f["b"], -2, -1)):
            gram = np.swapaxes(x, -2, -1) @ x
            np.testing.assert_allclose(gram, stable**2 * np.stack([np.eye(RANK)] * 2), atol=1e-4)
        np.testing.assert_allclose(f["a"], stable * peft[path]["a"], atol=1e-5)


def test_randomised_svd_finds_the_largest_singular_values():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 60)))[0] for n in (80, 60))
    sigma = 1 / np.arange(1, 61)
    w = jnp.asarray((u * sigma) @ v.T, jnp.float32)
    exact, fast = (f(jax.random.key(1), w, 8, 2.0) for f in (starts.pissa, starts.pissa_fast))
    assert fast[0].shape == (80, 8) and fast[1].shape == (8, 60)
    np.testing.assert_allclose(fast[0] @ fast[1], exact[0] @ exact[1], atol=1e-5)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(init="pisa"), "method.init: 'pisa' is not one of kaiming, .*did you mean 'pissa'"),
        (dict(init="pissa", alpha=0.0), "method.alpha: 0.0 given, must be positive with init"),
        (dict(init="eva"), "method.init: 'eva' reads data: pass evidence with 'moments' of h/attn"),
        (dict(init="lora-ga", rank=9), "method.rank: 9 given, but LoRA-GA .*: at most 8"),
        (dict(init="orthogonal", rank=3), "method.rank: 3 given, must be even with init 'ortho"),
        (dict(init="pissa", ranks={"h/x": 1}), "method.ranks: h/x are not among method.targets"),
        (
            dict(ranks={"h/attn/q/kernel": [1, 17]}),
            r"method.ranks: h/attn/q/kernel: \[1, 17\] given, should be integers from 0 to 16",
        ),
        (dict(ranks={"h/attn/q/kernel": [1, 2, 3]}), r"one or \(2,\) of them"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(pair, evidence, hp, message):
    given = evidence if hp.get("init") == "lora-ga" else None
    with pytest.raises(ValueError, match=message):
        started(of(**{"init": "kaiming"} | hp), pair[0], given)


def test_lora_fa_needs_an_a_to_read_through():
    with pytest.raises(ValueError, match="method.init: 'init-b' given, but it starts a at zero"):
        lorax.method("lora-fa", init="init-b")
    params = {"wte": {"embedding": jnp.ones((50, 6))}}
    of_embedding = functools.partial(lorax.method, "lora-fa", rank=3, targets="embed")
    for init in starts.OF_A:
        message = f"method.targets: wte/embedding is an embedding, whose a init '{init}' starts at"
        method = of_embedding(init=init)
        for refuses in (method.adapts, functools.partial(method.init, jax.random.key(0))):
            with pytest.raises(ValueError, match=message):
                refuses(params)
    state = of_embedding(init="both").init(jax.random.key(0), params)
    assert np.any(state.constants["wte"]["embedding"]["a"])


def test_variants_count_ranks_of_their_own():
    params = {"h": {n: {"kernel": jnp.ones((3, 4, 6))} for n in ("q", "v")}}
    ranks = {"h/q/kernel": [0, 1, 3]}
    for name, want in (("lora", 4 * 10), ("dora", 4 * 10 + 2 * 6), ("lora-fa", 4 * 6)):
        method = lorax.method(name, rank=2, targets=("q", "v"), ranks=ranks)
        state = method.init(jax.random.key(0), params)
        assert method.count(params) == want and method.hp["widest"] == 3
        moving = jax.grad(lambda t, m=method, s=state: jnp.sum(
            jnp.sin(tree.flatten(m.delta(t, s.constants, params))["h/q/kernel"])
        ))  # fmt: skip
        grads = methods.joined(moving(state.trainable), {})["h/q/kernel"]
        assert [int(np.count_nonzero(x)) for x in grads["b"]] == [0, 6, 18]
