"""A whole model on a base that a mesh divides: the losses and gradients of one device. No device
gathers more than one layer's weights, or other devices' tokens or logits."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax import leaves, losses, quant, sharding
from lorax.sharding import Shape

WIDTH, INNER, TOKENS, LAYERS = 128, 256, 512, 2
MEMBERS, ROWS, LENGTH = 2, 8, 12
LLAMA = dict(
    model_type="llama", vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=INNER,
    num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
    tie_word_embeddings=False,
)  # fmt: skip


def made(directory, **changes):
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    return lorax.load(f"random:{directory}", unroll=1)


def batches():
    tokens = np.random.default_rng(0).integers(0, TOKENS, (MEMBERS, ROWS, LENGTH + 1))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.ones(tokens.shape, jnp.float32)}


def members(method, base):
    """(trainable, constants) of some members, moved away from their start."""
    states = [method.init(jax.random.key(i), base.params, base.sites) for i in range(MEMBERS)]
    trainable, constants = jax.tree.map(lambda *x: jnp.stack(x), *map(tuple, states))
    move = lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return jax.tree.map(move, trainable), constants


def compared(base, method, shape, rows=False, halved=None):
    """The program's text on a mesh of this shape, after its losses and gradients were found to be
    those of one device; with `rows` what evaluation gives of each row instead."""

    def of_member(params, trainable, constants, batch):
        params = leaves.to_bfloat16(params, halved or {})
        bound = lambda trainable: method.bind(trainable, constants, params, None, base.sites)
        if rows:
            return losses.lm_rows(base.module, bound(trainable), batch)[:3]
        loss = lambda trainable: losses.lm_loss(base.module, bound(trainable), batch)[0]
        return jax.value_and_grad(loss)(trainable)

    def of_members(params, *member):
        return jax.vmap(functools.partial(of_member, params))(*member)

    given = base.params, *members(method, base), batches()
    expected = jax.jit(of_members)(*given)
    mesh = sharding.mesh(shape)
    spec = P(), P("member"), P("member"), P("member")
    on_mesh = jax.shard_map(
        of_members, mesh=mesh, in_specs=spec, out_specs=P("member"), axis_names={"member"},
        check_vma=False,
    )  # fmt: skip
    places = [sharding.shardings(base.params, base.sites, mesh)]
    places += [NamedSharding(mesh, P("member"))] * 2 + [NamedSharding(mesh, P("member", "fsdp"))]
    given = [jax.device_put(x, place) for x, place in zip(given, places, strict=True)]
    compiled = jax.jit(on_mesh).lower(*given).compile()
    pairs = zip(jax.tree.leaves(compiled(*given)), jax.tree.leaves(expected), strict=True)
    for found, one in pairs:
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
    return compiled.as_text()


def assert_local(text, shape):
    """Nothing that a device gathers is larger than its part of one layer's largest weight."""
    size = lambda axes: int(np.prod([int(n) for n in axes.split(",") if n]))
    gathers = [size(axes) for axes in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)]
    assert gathers and max(gathers) <= max(INNER, TOKENS) * WIDTH // shape.tensor


def test_lora_on_codes(tmp_path):
    base, shape = made(tmp_path), Shape(1, 4, 2)
    base = base.replace(params=quant.quantize(base.params, "nf4", True, 32, base.sites))
    text = compared(base, lorax.method("lora", rank=4, targets=("q", "o", "up")), shape)
    assert_local(text, shape)
    # Of kernels that are codes, nothing but codes is gathered; no logits are whole.
    assert not re.search(rf"f32\[{WIDTH},{INNER // 2}\]\S* all-gather", text)
    assert not re.search(rf"f32\[(\d+,)*\d+,{TOKENS}\]", text)


def test_dora_on_a_tied_base(tmp_path):
    base, shape = made(tmp_path, tie_word_embeddings=True), Shape(2, 4, 1)
    text = compared(base, lorax.method("dora", rank=4, targets=("q", "down", "embed")), shape)
    assert_local(text, shape)


def test_parameters_that_are_trained_in_full(tmp_path):
    base, shape = made(tmp_path), Shape(1, 4, 2)
    assert_local(compared(base, lorax.method("full"), shape), shape)


def test_rows_of_an_evaluation(tmp_path):
    base, shape = made(tmp_path), Shape(1, 2, 2)
    method = lorax.method("lora", rank=4, targets=("q",))
    text = compared(base, method, shape, rows=True)
    assert_local(text, shape)


def test_experts_take_each_devices_own_tokens(tmp_path):
    experts = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    base, shape = made(tmp_path, **experts), Shape(1, 2, 2)
    base = base.replace(params=quant.quantize(base.params, "nf4", True, 32, base.sites))
    targets = ("experts.up", "experts.down")
    text = compared(base, lorax.method("lora", rank=4, targets=targets), shape)
    rows = ROWS * LENGTH * 2  # of a member, on all devices
    assert not re.search(rf"f32\[({MEMBERS * rows}|{MEMBERS},{rows}),{WIDTH}\]", text)
