"""What one member does: its loss, a training step, an evaluation. No function has a member axis.

Axes: B sequences, T tokens, D features, V vocabulary.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import ops
from lorax.train import optim

ROWS = 256  # most tokens whose logits exist at a time


class Hyper(NamedTuple):
    """What a member brings into the compiled step as data: () float32 each, key a PRNG key."""

    lr: jax.Array
    weight_decay: jax.Array
    key: jax.Array


class MemberState(NamedTuple):
    """All of a member that training changes. diverged_at: () int32, -1 while it has not."""

    trainable: dict
    opt_state: object
    step: jax.Array
    diverged_at: jax.Array


def optimizer(method, constants, train, hyper: Hyper) -> optax.GradientTransformation:
    """The method's own around what `train`, the config's section, asks for."""
    return method.optimizer(optim.optimizer(train, hyper.lr, hyper.weight_decay), constants, train)


def start(method, trainable, constants, train, hyper: Hyper) -> MemberState:
    """State at step 0. train: the config's `train` section."""
    opt_state = optimizer(method, constants, train, hyper).init(trainable)
    return MemberState(trainable, opt_state, jnp.int32(0), jnp.int32(-1))


# -------------------------------------------------------------------------------------------- loss


def token_losses(module, params, hidden, labels, smoothing=0.0):
    """Negative log-likelihood in nats: hidden (N, D), labels (N,) int32 -> (N,) float32.

    smoothing: share of the target that is spread over the vocabulary (arXiv:1512.00567, section 7).
    """
    logits = ops.apply(module, params, hidden, method="logits")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return nats
    even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nats + smoothing * even


def weighted_loss(module, params, hidden, labels, weights, smoothing=0.0):
    """sum(weights * nats) as float32 (): hidden (N, D), labels (N,), weights (N,) float32.

    Logits are made at most `ROWS` tokens at a time, and the gradient with respect to what depends
    on the trained parameters is made in the same pass, so that the backward pass has nothing to do
    but to scale it, and no (N, V) array ever exists.
    """
    n = len(labels)
    rows = -(-n // -(-n // ROWS))  # equal parts of at most ROWS
    pad = -n % rows
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    labels, weights = (jnp.pad(x, (0, pad)).reshape(-1, rows) for x in (labels, weights))
    head = {name: params[name] for name in module.head if name in params}

    def one(head, hidden, labels, weights):
        return jnp.sum(weights * token_losses(module, head, hidden, labels, smoothing))

    return _sum_over_rows(one, head, hidden, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_rows(f, head, hidden, labels, weights):
    add = lambda total, rows: (total + f(head, *rows), None)
    return jax.lax.scan(add, jnp.float32(0), (hidden, labels, weights))[0]


def _sum_over_rows_forward(f, head, hidden, labels, weights):
    # symbolic_zeros says which leaves are trained: a frozen head costs no gradient.
    leaves, treedef = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    values = [leaf.value for leaf in leaves]
    trained = [i for i, leaf in enumerate(leaves) if leaf.perturbed]

    def loss(moving, hidden, labels, weights):
        full = list(values)
        for i, value in zip(trained, moving, strict=True):
            full[i] = value
        return f(jax.tree.unflatten(treedef, full), hidden, labels, weights)

    def add(carry, rows):
        total, grads = carry
        value, (more, dhidden) = jax.value_and_grad(loss, argnums=(0, 1))(moving, *rows)
        return (total + value, jax.tree.map(jnp.add, grads, more)), dhidden

    moving = [values[i] for i in trained]
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, moving))
    rows = tuple(x.value for x in (hidden, labels, weights))
    (total, grads), dhidden = jax.lax.scan(add, zero, rows)
    dhead = [None] * len(leaves)
    for i, grad in zip(trained, grads, strict=True):
        dhead[i] = grad
    return total, (jax.tree.unflatten(treedef, dhead), dhidden)


def _sum_over_rows_backward(f, saved, dtotal):
    # None in place of a frozen leaf is JAX's own sign for "no gradient"; tree.map passes it by.
    dhead, dhidden = jax.tree.map(lambda g: dtotal.astype(g.dtype) * g, saved)
    return dhead, dhidden, None, None


_sum_over_rows.defvjp(_sum_over_rows_forward, _sum_over_rows_backward, symbolic_zeros=True)


def lm_loss(module, params, batch, smoothing=0.0):
    """(sum of weighted nats, sum of weights) of next-token prediction.

    batch: {"tokens": (B, T + 1) int32, "mask": (B, T + 1) float32} and, where a row holds several
    texts, "segments" (B, T + 1) int32; see `lorax.tasks.Task`.
    """
    tokens, weights, segments = batch["tokens"], batch["mask"][:, 1:], batch.get("segments")
    segments = None if segments is None else segments[:, :-1]
    hidden = ops.apply(module, params, tokens[:, :-1], segments, method="hidden")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    total = weighted_loss(module, params, hidden, labels, weights.reshape(-1), smoothing)
    return total, jnp.sum(weights)


def class_loss(module, params, batch, smoothing=0.0):
    """(sum of losses, number of examples, scores (B, k) float32) of a classifier.

    batch: {"tokens", "segments", "types": (B, T) int32, "label": (B,)}. An int32 label is a class
    (cross entropy in nats), a float32 one a value to be predicted (squared error). A row without
    tokens does not count.
    """
    tokens, segments, label = batch["tokens"], batch["segments"], batch["label"]
    scores = ops.apply(module, params, tokens, segments, batch["types"])
    if jnp.issubdtype(label.dtype, jnp.integer):
        target = optax.smooth_labels(jax.nn.one_hot(label, scores.shape[-1]), smoothing)
        losses = optax.softmax_cross_entropy(scores, target)
    else:
        losses = jnp.square(scores[:, 0] - label)
    weights = jnp.any(segments > 0, axis=1).astype(jnp.float32)
    return jnp.sum(weights * losses), jnp.sum(weights), scores


# --------------------------------------------------------------------------------- train, evaluate


class Program(NamedTuple):
    """What is static for all members of a group.

    module: Linen module; method: of any member; sites: the base's; train: the config's section;
    dropout: whether any member has some; merge: whether leaves may take the merged forward pass
    (members run one at a time); halved: {path: Site} of the frozen kernels that multiply in
    bfloat16.
    """

    module: object
    method: object
    sites: Mapping[str, ops.Site]
    train: object
    dropout: bool
    merge: bool
    halved: Mapping[str, ops.Site] = MappingProxyType({})


def _bound(program, trainable, constants, params, key=None):
    params = ops.halve(params, program.halved)
    bound = program.method.bind(trainable, constants, params, key, program.sites)
    return ops.allow_merge(bound) if program.merge else bound


def train_step(program: Program, params, constants, hyper: Hyper, state: MemberState, batch):
    """One optimiser step: (new state, metrics {"loss", "grad_norm"} () float32).

    batch: leaves (A, B, ...), A parts whose gradients are added. A step whose loss, gradient norm
    or new parameter norm is not finite changes nothing, and neither does any after it or past
    `train.steps`.
    """

    def loss(trainable, part, key):
        bound = _bound(program, trainable, constants, params, key if program.dropout else None)
        loss_of = class_loss if "label" in part else lm_loss
        return loss_of(program.module, bound, part, program.train.label_smoothing)[:2]

    def add(carry, indexed):
        index, part = indexed
        key = jax.random.fold_in(jax.random.fold_in(hyper.key, state.step), index)
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, part, key)
        return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

    parts = jax.tree.leaves(batch)[0].shape[0]
    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
    if parts == 1:
        (total, weight, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], batch)))
    else:
        (total, weight, grads), _ = jax.lax.scan(add, zero, (jnp.arange(parts), batch))
    weight = jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    if program.method.penalty is not None:
        more = jax.grad(program.method.penalty)(state.trainable, constants)
        grads = jax.tree.map(jnp.add, grads, more)
    value, norm = total / weight, optax.tree.norm(grads)

    transformation = optimizer(program.method, constants, program.train, hyper)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, opt_state = transformation.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)

    due = (state.diverged_at < 0) & (state.step < program.train.steps)
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(trainable))
    keep = lambda new, old: jnp.where(due & finite, new, old)
    new = MemberState(
        jax.tree.map(keep, trainable, state.trainable),
        jax.tree.map(keep, opt_state, state.opt_state),
        state.step + due.astype(jnp.int32),
        jnp.where(due & ~finite, state.step + 1, state.diverged_at),
    )
    return new, {"loss": value, "grad_norm": norm}


def train_steps(program: Program, params, constants, hyper, state, batches):
    """Several steps: batches' leaves (K, A, B, ...) -> (state, metrics of shape (K,))."""
    step = functools.partial(train_step, program, params, constants, hyper)
    return jax.lax.scan(step, state, batches)


def evaluate(program: Program, params, constants, trainable, batches):
    """(mean loss () float32, scores) over batches with leaves (N, B, ...).

    A language model's loss is in nats a completion token, and it has no scores (None); a
    classifier's are (N, B, k) float32.
    """
    bound = _bound(program, trainable, constants, params)
    loss_of = class_loss if "label" in batches else lm_loss

    def add(carry, batch):
        total, weight, *scores = loss_of(program.module, bound, batch)
        return jax.tree.map(jnp.add, carry, (total, weight)), scores

    (total, weight), scores = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), batches)
    return total / weight, scores[0] if scores else None
