"""LoRA's variants beside PEFT's: rsLoRA, DoRA, LoRA-FA, LoRA+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from support import few, require

import lorax
from lorax import leaves, methods, ops, tree
from lorax.config import default, members
from lorax.train import stacks

# PEFT's names of the modules and where they lie in our stacks.
MODULES = {
    "gpt2": {"attn.c_proj": "h/attn/o", "mlp.c_fc": "h/mlp/up", "mlp.c_proj": "h/mlp/down"},
    "llama": {
        "self_attn.q_proj": "h/attn/q", "self_attn.v_proj": "h/attn/v",
        "self_attn.o_proj": "h/attn/o", "mlp.gate_proj": "h/mlp/gate",
        "mlp.up_proj": "h/mlp/up", "mlp.down_proj": "h/mlp/down",
    },
}  # fmt: skip
LAYER = {"gpt2": "transformer.h", "llama": "model.layers"}
HP = dict(rank=3, alpha=6.0)


def from_peft(found: dict[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """{our path/name: array with a layer axis} of PEFT's tensors."""
    names = {"lora_A.default.weight": "a", "lora_B.default.weight": "b",
             "lora_magnitude_vector.default.weight": "m"}  # fmt: skip
    ours = {}
    for module, path in MODULES[family].items():
        for theirs, name in names.items():
            layers = [
                found.get(f"base_model.model.{LAYER[family]}.{i}.{module}.{theirs}")
                for i in range(parity.LAYERS)
            ]
            if layers[0] is not None:
                ours[f"{path}/kernel/{name}"] = np.stack([x.T for x in layers])
    return ours


def both(name, family, tmp_path, peft_fields, hp=HP):
    """(base, our method, our state, PEFT's model) with the same arrays, off the identity."""
    peft = require("peft")
    base, theirs = parity.pair(family, tmp_path)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(MODULES[family]), lora_dropout=0.0,
        fan_in_fan_out=family == "gpt2", **peft_fields,
    )  # fmt: skip
    model = peft.get_peft_model(theirs, config)
    parity.disturb(model)
    words = tuple(path.rsplit("/", 1)[-1] for path in MODULES[family].values())
    method = lorax.method(name, targets=words, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    return base, method, parity.filled(state, from_peft(parity.arrays(model), family)), model


def plus(model):
    """PEFT's LoRA+ optimiser at the rates of `parity`."""
    from peft.optimizers import create_loraplus_optimizer

    torch = require("torch")
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=parity.LR, loraplus_lr_ratio=4.0,
        loraplus_weight_decay=parity.DECAY, weight_decay=parity.DECAY,
    )  # fmt: skip


def frozen(model, factor):
    for name, p in model.named_parameters():
        if factor in name:
            p.requires_grad = False


VARIANTS = {
    "lora": ({}, HP),
    "rslora": ({"use_rslora": True}, HP),
    "dora": ({"use_dora": True}, HP),
    "lora-fa": ({}, HP),
    "frozen-b": ({}, HP),
    "lora+": ({}, HP | {"ratio": 4.0}),
}
#: Each variant on one family; on the other one it is soak.
PAIRS = [(name, family) for name in VARIANTS for family in ("gpt2", "llama")]
SLOW = [("lora", "gpt2"), ("dora", "gpt2"), ("lora-fa", "llama"), ("lora+", "llama")]
SLOW += [("frozen-b", "gpt2")]


@pytest.mark.parametrize(("name", "family"), few(PAIRS, [("rslora", "llama")], SLOW))
def test_same_as_peft_in_logits_and_over_twenty_steps(name, family, tmp_path):
    fields, hp = VARIANTS[name]
    base, method, state, model = both(name, family, tmp_path, fields, hp)
    if name in ("lora-fa", "frozen-b"):
        frozen(model, "lora_A" if name == "lora-fa" else "lora_B")
    parity.assert_same(base, method, state, model, plus(model) if name == "lora+" else None)


def test_dora_keeps_the_lengths_as_constants_to_the_gradient():
    """Against the formula with dense matrices, in float64."""
    with jax.enable_x64(True):
        draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).standard_normal(shape))
        x, w, a, b, m = draw(0, 5, 6), draw(1, 6, 4), draw(2, 6, 2), draw(3, 2, 4), draw(4, 4)
        site, s = ops.Site("linear", 0, (0,), (1,)), jnp.asarray(0.7)

        def ours(a, b, m):
            return jnp.sum(ops.linear(x, leaves.dora(leaves.LowRank(w, a, b, s), m, site)) ** 2)

        def formula(a, b, m):
            full = w + s * (a @ b)
            n = jax.lax.stop_gradient(jnp.linalg.norm(full, axis=0))
            return jnp.sum((x @ (full * (m / n)[None])) ** 2)

        for got, want in zip(
            jax.grad(ours, (0, 1, 2))(a, b, m), jax.grad(formula, (0, 1, 2))(a, b, m), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-9)


def test_doras_update_of_a_bfloat16_weight_is_not_rounded_to_bfloat16():
    """The update is small beside the weight, whose rounding would hide it."""
    rough = {"q": {"kernel": jax.random.normal(jax.random.key(1), (16, 8)).astype(jnp.bfloat16)}}
    exact = jax.tree.map(lambda w: w.astype(jnp.float32), rough)
    method = lorax.method("dora", rank=2, targets=("q",))
    state = method.init(jax.random.key(0), rough)
    state.trainable["q"]["kernel"]["b"] = 1e-3 * jax.random.normal(jax.random.key(2), (2, 8))
    got, want = (method.delta(*state, params)["q/kernel"] for params in (rough, exact))
    assert got.dtype == jnp.float32 and np.abs(want).max() < 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthonormal"])
def test_frozen_b_is_lora_fa_of_the_transposed_matrix(init):
    """Kernels 8 x 12 and 12 x 8, whose constant and trained factor swap."""
    params = lambda *shape: {"q": {"kernel": jnp.ones(shape)}}
    draw = lambda name, *shape: lorax.method(name, rank=3, init=init, targets=("q",)).init(
        jax.random.key(0), params(*shape)
    )
    fa, fb = draw("lora-fa", 12, 8), draw("frozen-b", 8, 12)
    np.testing.assert_array_equal(
        fb.constants["q"]["kernel"]["b"], fa.constants["q"]["kernel"]["a"].T
    )
    assert fb.trainable["q"]["kernel"]["a"].shape == (8, 3)
    assert not np.any(fb.trainable["q"]["kernel"]["a"])
    if init == "orthonormal":
        b = np.asarray(fb.constants["q"]["kernel"]["b"])
        np.testing.assert_allclose(b @ b.T, np.eye(3), rtol=0, atol=1e-6)


def test_frozen_b_of_another_start_keeps_that_b():
    params = {"q": {"kernel": jax.random.normal(jax.random.key(1), (8, 12))}}
    draw = lambda name, init: lorax.method(name, rank=3, init=init, targets=("q",)).init(
        jax.random.key(0), params
    )
    for init in ("init-b", "both", "pissa"):
        b = draw("frozen-b", init).constants["q"]["kernel"]["b"]
        np.testing.assert_array_equal(b, draw("lora", init).trainable["q"]["kernel"]["b"])
    with pytest.raises(ValueError, match="'eva' given, but it starts b at zero"):
        draw("frozen-b", "eva")


def test_lora_plus_moves_b_as_much_faster_as_it_says():
    """The inner optimiser's update, b's times the ratio."""
    base = {"q": {"kernel": jnp.ones((4, 6))}}
    method = lorax.method("lora+", rank=2, targets=("q",), ratio=5.0)
    state = method.init(jax.random.key(0), base)
    inner = optax.sgd(1.0)
    grads = jax.tree.map(jnp.ones_like, state.trainable)
    wrapped = method.optimizer(inner, state.constants, None)
    updates, _ = wrapped.update(grads, wrapped.init(state.trainable), state.trainable)
    flat = tree.flatten(updates)
    assert np.all(np.asarray(flat["q/kernel/a"]) == -1)
    assert np.all(np.asarray(flat["q/kernel/b"]) == -5)
    with pytest.raises(ValueError, match="method.ratio: 0 given"):
        lorax.method("lora+", ratio=0)


def test_unknown_hyperparameters_of_a_variant_are_named():
    with pytest.raises(ValueError, match="method.ratio: lora has no such hyperparameter"):
        lorax.method("lora", ratio=2.0)
    assert "ratio" in methods.hyperparameters("lora+")


def test_a_config_of_loras_scaling_leaves_rslora_its_own():
    """The config's `method.scaling` is for methods that have a choice."""
    assert "scaling" not in methods.hyperparameters("rslora")
    c = default()
    c.sweep.method = ("lora", "rslora")
    base = lorax.load("gpt2-nano")
    plain, stabilised = stacks.build_methods(members(c), base)
    assert plain.hp["scale"] == 16 / 8 and stabilised.hp["scale"] == 16 / 8**0.5
