"""LoRA on a base in 4 bits: what a step keeps, and that it learns as on the base itself."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import data

import lorax
from lorax import config, intercept, ops, quant, tree
from lorax.models import decoder, gpt2
from lorax.train import loop, prepare
from lorax.train import step as steps

MODELS = {
    "gpt2": gpt2.GPT2(gpt2.Config(vocab_size=64, n_positions=32, n_embd=512, n_layer=6, n_head=4)),
    # 352 is no multiple of 64: blocks go across the rows of "down", which is decoded whole.
    "llama": decoder.Decoder(
        decoder.Config(
            vocab_size=64, hidden_size=512, intermediate_size=352, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_holds_no_decoded_copy_of_more_than_one_layer(family, remat):
    """Against the same step on a float32 base, of which it needs no copy either."""
    module, example = MODELS[family], jnp.zeros((1, 1), jnp.int32)
    section = config.default().train
    section.remat = remat
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    sites = intercept.sites(module, shapes, example)
    method = lorax.method("lora", rank=2, targets=("all-linear",))
    concrete = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    state = method.init(jax.random.key(0), concrete, sites)
    hyper = steps.Hyper(jnp.float32(0.1), jnp.float32(0.1), jax.random.key(0))
    member = steps.start(method, *state, section, hyper, sites)
    batch = {"tokens": jnp.zeros((1, 2, 8), jnp.int32), "mask": jnp.ones((1, 2, 8))}
    program = steps.Program(module, method, sites, section, dropout=False, merge=False)
    step = jax.jit(functools.partial(steps.train_step, program))
    needed = lambda params: (
        step.lower(params, state.constants, hyper, member, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    coded = jax.eval_shape(lambda p: quant.quantize(p, double=True, sites=sites), shapes)
    kernels = [x for x in tree.flatten(coded).values() if ops.is_operator(x)]
    layer = sum(4 * leaf.n_in * leaf.n_out for leaf in kernels)
    assert needed(coded) - needed(shapes) < layer
    assert needed(coded) < 2 * layer  # of six


@pytest.mark.soak  # four members of 200 steps; the gate has every kernel and a model on codes
def test_the_loss_on_four_bits_follows_that_on_sixteen(tmp_path):
    """Within 2 % on a real pretrained model, means of 50 training steps over two seeds."""
    c = config.default()
    c.base = str(data("models/stories-llama-260k"))
    c.param_dtype = "bfloat16"
    c.method.update(rank=8, alpha=16.0, targets=("all-linear",))
    c.train.update(steps=200, batch_size=8, seq_len=96, lr=3e-3, warmup=20, parallel="none")
    c.eval.update(every=50, examples=64, test=64)
    c.sweep.quant, c.sweep.seed = (None, "nf4"), (0, 1)
    groups = prepare.groups(config.members(c), lambda line: None)
    loop.train(tmp_path, groups, loop.Terminal(*[lambda *_: None] * 3))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    coded = [member.config.quant for member in config.members(c)]
    losses = np.zeros((4, 4, 5))  # (member, quarter of the training, tenth step of it)
    for row in rows:
        if row["split"] == "train":
            tenth = row["step"] // 10 - 1
            losses[row["member"], tenth // 5, tenth % 5] = row["loss"]
    assert np.all(losses > 0)
    means = losses.reshape(2, 2, 4, 5).mean(axis=(1, 3))  # (base, quarter)
    assert coded == [None, None, "nf4", "nf4"] and means[0, -1] < 0.6 * means[0, 0]
    np.testing.assert_allclose(means[1, 1:], means[0, 1:], rtol=0.02)
