"""Optimisers whose learning rate and weight decay can be traced: they differ between members."""

import math
from collections.abc import Mapping

import jax
import optax

from lorax import ops, tree
from lorax.train import factor_optim, matrix_optim

#: What an optimiser reads of the keys `READ` of `config.train`, with its values for None.
USUAL = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "sgd": {"b1": 0.9},
    "adafactor": {},
    "lion": {"b1": 0.9, "b2": 0.99},
    "muon": {"b1": 0.95, "b2": 0.999, "eps": 1e-8},
    "riemannian": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "damping": 1e-2},
    "lora-muon": {"b1": 0.95, "b2": 0.999, "eps": 1e-8},
    "schedule-free": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
}
READ = ("b1", "b2", "eps", "damping")


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


def optimizer(
    train,
    lr,
    weight_decay,
    sites: Mapping[str, ops.Site],
    constants: dict | None = None,
) -> optax.GradientTransformation:
    """The optimiser of that name, after clipping by the global norm: AdamW (arXiv:1711.05101), SGD
    with momentum, Lion (arXiv:2302.06675, algorithm 2), Adafactor or Muon (`matrix_optim`),
    Riemannian AdamW or LoRA-Muon (`factor_optim`); for schedule-free AdamW the steps of z, which
    `averaging` completes.

    A method may wrap it (`Method.optimizer`). lr, weight_decay: numbers or traced scalars. sites:
    {path: Site} of the base's kernels. constants: of the method's state, for the scale of LoRA's
    factors. Weight decay is decoupled, multiplied by the learning rate, and not applied to biases
    and norms.
    """
    factor = schedule(train)
    rate = lambda count: lr * factor(count)
    clip = optax.clip_by_global_norm(train.clip) if train.clip else optax.identity()
    decayed = (
        optax.masked(optax.add_decayed_weights(weight_decay), _decays),
        optax.scale_by_learning_rate(rate),
    )
    if train.optimizer == "lora-muon":  # which decays the product of two parameters
        values = _values(train)
        adam = optax.scale_by_adam(b2=values["b2"], eps=values["eps"])
        rest = optax.chain(adam, *decayed)
        scales = factor_optim.scales(constants or {})
        muon = factor_optim.lora_muon(rest, rate, weight_decay, values["b1"], scales)
        return optax.chain(clip, muon)
    return optax.chain(clip, _scaling(train, sites), *decayed)


def _values(train) -> dict:
    """The numbers that the optimiser reads, {name: value}."""
    usual = USUAL[train.optimizer]
    return usual | {name: train[name] for name in READ if name in usual and train[name] is not None}


def _scaling(train, sites) -> optax.GradientTransformation:
    """What an optimiser makes of gradients, without rate and decay."""
    values = _values(train)
    match train.optimizer:
        case "adamw":
            return optax.scale_by_adam(**values)
        case "sgd":
            return optax.trace(values["b1"])
        case "lion":
            return optax.scale_by_lion(**values)
        case "adafactor":
            return matrix_optim.adafactor(sites)
        case "muon":
            adam = optax.scale_by_adam(b2=values["b2"], eps=values["eps"])
            return matrix_optim.muon(sites, adam, values["b1"])
        case "riemannian":
            gradients = factor_optim.riemannian(values.pop("damping"))
            return optax.chain(gradients, optax.scale_by_adam(**values))
        case "schedule-free":  # Adam without first moment
            rms = {"decay": values["b2"], "eps": values["eps"], "eps_in_sqrt": False}
            return optax.scale_by_rms(**rms, bias_correction=True)


def averaging(inner: optax.GradientTransformation, train, lr) -> optax.GradientTransformation:
    """`inner`, or with `train.optimizer` "schedule-free" what makes it that (Defazio et al. 2024,
    arXiv:2405.15682, section 2):

        y = (1 - b1) z + b1 x          gradients are taken at y, the parameters in training
        z' = z - lr g(y)               g: the steps of `inner`
        x' = (1 - c) x + c z'          the average, which is evaluated and exported; c = lr^2 over
                                       the sum of lr^2 so far

    It goes around what a method makes of its optimiser: b of LoRA+ is faster in z.
    """
    if train.optimizer != "schedule-free":
        return inner
    factor = schedule(train)
    rate = lambda count: lr * factor(count - 1)  # that of the step; optax counts from 1
    b1 = USUAL["schedule-free"]["b1"] if train.b1 is None else train.b1
    return optax.contrib.schedule_free(inner, rate, b1)


def averaged(trainable, z, b1):
    """x of schedule-free training: y is `trainable`. Equal to y, to the bit, where z is."""
    return jax.tree.map(lambda y, z: z + (y - z) / b1.astype(y.dtype), trainable, z)


def _decays(params) -> dict:
    """False for biases and norms, including fully trained ones: ".../bias/w"."""
    words = lambda path: path.removesuffix("/w").rsplit("/", 1)[-1]
    flat = tree.flatten(params)
    spared = lambda word: word == "scale" or word.endswith("bias")  # "down_bias" as well
    return tree.unflatten({path: not spared(words(path)) for path in flat})
