"""What tests of methods share: a small base, noise on a tree, a few steps of training."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quick import jit

import lorax
from lorax import config, intercept
from lorax.models import gpt2
from lorax.tasks import kinds
from lorax.train import stacks
from lorax.train import step as steps


def noisy(tree, scale=0.1, seed=0):
    """The same tree with random numbers added to every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


@functools.cache
def three_layers():
    """A GPT-2 of three layers and 20 tokens, whose biases are not zero: .module .params .sites"""
    c = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2, n_inner=12)
    module, tokens = gpt2.GPT2(c), np.zeros((2, 6), np.int32)
    params = noisy(jit(module.init)(jax.random.key(0), tokens)["params"], 0.2, 3)
    sites = intercept.sites(module, params, tokens)
    return types.SimpleNamespace(module=module, params=params, sites=sites)


def trained(module, base, tokens, n, method, trainable, constants):
    """The trainables after n steps of AdamW with weight decay on the next token of tokens (B, T).
    base: a function that returns (params, sites)."""
    params, sites = base()
    # The large eps keeps Adam from making steps of the rounding errors of vanishing gradients.
    optimizer = optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)

    def loss(trainable):
        bound = method.bind(trainable, constants, params, None, sites)
        logits = lorax.apply(module, bound, tokens)[:, :-1]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nats)

    def step(carry, _):
        trainable, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    return jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, n)[0][0]


def swept(built, base, n=4, batches=None, kind=kinds.TEXTS):
    """The members of a sweep after n steps: (state, losses (M, n)), as `lorax.train.programs` has
    them side by side. batches: leaves (n, 1, B, ...), by default texts of 20 tokens."""
    c = config.default()
    c.train.update(lr=0.01, weight_decay=0.1, warmup=0)
    members = [config.Member(i, str(i), {}, c) for i in range(len(built))]
    stacked = stacks.stack(members, built, base)
    program = steps.Program(
        base.module, built[0], base.sites, c.train, dropout=False, merge=False, kind=kind
    )
    if batches is None:
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (n, 1, 2, 7), np.int32))
        batches = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.float32)}
    run = lambda *member: steps.train_steps(program, base.params, *member, batches)
    state, logs = jit(jax.vmap(run))(stacked.constants, stacked.hyper, stacked.state)
    return state, np.asarray(logs["loss"])
