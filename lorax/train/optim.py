"""Optimisers whose learning rate and weight decay can be traced: they differ between members."""

import math

import optax

from lorax import tree


def schedule(train):
    """step -> factor in [0, 1] on the learning rate: linear warm-up, then `train.schedule`.

    train: the config's `train` section (`schedule`, `warmup`, `warmup_ratio`, `steps`). The first
    step of a warm-up has a rate of zero; without warm-up it has the full rate.
    """
    warmup = math.ceil(train.warmup_ratio * train.steps) if train.warmup_ratio else train.warmup
    rest = max(train.steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "constant": optax.constant_schedule(1.0),
    }[train.schedule]
    if not warmup:
        return after
    up = optax.linear_schedule(0.0, 1.0, warmup)
    return optax.join_schedules([up, after], [warmup])


def optimizer(train, lr, weight_decay) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) or SGD with momentum, after clipping by the global norm.

    A method may wrap it (`Method.optimizer`). lr, weight_decay: numbers or traced scalars. Weight
    decay is decoupled, multiplied by the learning rate, and not applied to biases and norms.
    """
    factor = schedule(train)
    core = (
        optax.scale_by_adam(train.b1, train.b2, train.eps)
        if train.optimizer == "adamw"
        else optax.trace(train.b1)
    )
    return optax.chain(
        optax.clip_by_global_norm(train.clip) if train.clip else optax.identity(),
        core,
        optax.masked(optax.add_decayed_weights(weight_decay), _decays),
        optax.scale_by_learning_rate(lambda count: lr * factor(count)),
    )


def _decays(params) -> dict:
    """False for biases and norms, including fully trained ones: ".../bias/w"."""
    words = lambda path: path.removesuffix("/w").rsplit("/", 1)[-1]
    flat = tree.flatten(params)
    spared = lambda word: word == "scale" or word.endswith("bias")  # "down_bias" as well
    return tree.unflatten({path: not spared(words(path)) for path in flat})
