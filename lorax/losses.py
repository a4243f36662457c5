"""Losses of a batch: next-token prediction without storing all logits, classification, regression.

Each loss of a kind of rows (`lorax.tasks.kinds`) returns the sum of the weighted losses, the sum of
the weights, and the model's outputs, None for language models. Its namesake ending in `_rows`
returns `Rows`, what becomes of each row.

Axes: B sequences, T tokens, D features, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import divided, intercept

#: The Linen collection in which a model may sow `Routed` in training.
ROUTED = "routed"
ROWS = 256  # logits are computed for at most this many tokens at a time


class Routed(NamedTuple):
    """How a mixture of experts routes each token, the mean over layers.

    used: (B, T, E) float32, how often the token goes to an expert. p: (B, T, E) float32, the
    router's probabilities. coefficient: () float32, of `balance` in the training loss.
    """

    used: jax.Array
    p: jax.Array
    coefficient: jax.Array


class Rows(NamedTuple):
    """What becomes of each row of an evaluation.

    loss: (B,) float32, summed over the row's targets. weight: (B,) float32, the number of targets:
    tokens, or 1; 0 for a row that fills up a batch. right: (B,) float32, how many of the targets
    have the largest output; None for values. outputs: (B, k) float32, the model's; None for
    language models, except in `string_rows`. kl: (B,) float32, KL(base || model) in nats, summed
    over the row's targets; None unless it is asked for, and for values.
    """

    loss: jax.Array
    weight: jax.Array
    right: jax.Array | None
    outputs: jax.Array | None
    kl: jax.Array | None = None


class Reference(NamedTuple):
    """What a model is compared with by KL(base || model).

    params: the base's. states: (B, T, D), its hidden states of the batch, from which its logits are
    computed a part at a time; of a classifier (B, k), its outputs.
    """

    params: dict
    states: jax.Array


def token_losses(module, params, hidden, labels, smoothing=0.0):
    """Negative log-likelihood in nats: hidden (..., D), labels (...,) int32 -> (...,) float32.

    smoothing: share of the target that is spread over the vocabulary (arXiv:1512.00567, section 7).
    """
    logits = intercept.apply(module, params, hidden, method="logits")
    nats = _nats(logits, labels)
    if not smoothing:
        return nats
    even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nats + smoothing * even


def _nats(logits, labels):
    """Cross-entropy: logits (..., V) float32, labels (...) int32 -> (...) float32."""
    if not divided.divides_base():
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jax.nn.logsumexp(logits, axis=-1) - divided.entries(logits, labels)


def weighted_loss(module, params, hidden, labels, weights, smoothing=0.0):
    """sum(weights * nats) as float32 (): hidden (N, D), labels (N,), weights (N,) float32.

    Logits are computed for at most `ROWS` tokens at a time, together with the gradient for `hidden`
    and the trained part of the head. The backward pass only scales that gradient, and no (N, V)
    array ever exists. Where a mesh divides the rows of a batch, each device computes the logits of
    `ROWS` of its own tokens at a time.
    """
    hidden, labels, weights = _in_parts(hidden, labels, weights)
    head = {name: params[name] for name in module.head if name in params}

    def loss(head, hidden, labels, weights):
        return jnp.sum(weights * token_losses(module, head, hidden, labels, smoothing))

    return _sum_over_rows(loss, head, hidden, labels, weights)


def _in_parts(*arrays):
    """Arrays (n, ...) as equal parts of at most `ROWS`, the last filled up with zeros: (parts,
    rows, ...); where a mesh divides the n, parts of each device's own: (parts, devices, rows, ...).
    """
    arrays = tuple(map(divided.of_devices(len(arrays[0])), arrays))
    divides = arrays[-1].ndim == 2  # (devices, n)
    n = arrays[-1].shape[-1]
    rows = -(-n // -(-n // ROWS))

    def parts(x):  # (n, ...) -> (parts, rows, ...)
        x = jnp.pad(x, ((0, -n % rows), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, rows, *x.shape[1:])

    def parts_of_devices(x):
        return divided.constrained(jax.vmap(parts, out_axes=1)(x), None, "fsdp")

    return tuple(map(parts_of_devices if divides else parts, arrays))


def _together(x, n: int):
    """(n,), the inverse of `_in_parts` for an array of one number a row."""
    if x.ndim == 3:  # (parts, devices, rows)
        x = jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)
        return x[:, : n // len(x)].reshape(-1)
    return x.reshape(-1)[:n]


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
    # JAX takes None in place of a frozen leaf for "no gradient"; tree.map skips it.
    dhead, dhidden = jax.tree.map(lambda g: dtotal.astype(g.dtype) * g, saved)
    return dhead, dhidden, None, None


_sum_over_rows.defvjp(_sum_over_rows_forward, _sum_over_rows_backward, symbolic_zeros=True)


def lm_loss(module, params, batch, smoothing=0.0, training=False):
    """(sum of weighted nats, sum of weights, None) of next-token prediction.

    batch: {"tokens": (B, T + 1) int32, "mask": (B, T + 1) float32} and, if rows hold several texts,
    "segments" (B, T + 1) int32; see `lorax.tasks.Task`. training: with the model's load-balancing
    loss (`balance`) times its coefficient and the sum of weights, so that it is added to the mean.
    """
    (hidden, labels, weights), routed = _hidden(module, params, batch, training)
    total = weighted_loss(module, params, hidden, labels, weights.reshape(-1), smoothing)
    whole = jnp.sum(weights)
    for router in routed:
        total += router.coefficient * balance(router, text_positions(batch)) * whole
    return total, whole, None


def balance(router: Routed, real) -> jax.Array:
    """The load-balancing loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as in
    transformers, () float32: E times the sum over experts of how often a token goes to the expert
    times its mean probability. It is k, the experts of a token, if all are used alike.

    real: (B, T) bool, tokens that count, the last columns of the router's.
    """
    real = real.astype(jnp.float32)
    share = lambda x: jnp.einsum("bte,bt->e", x[:, -real.shape[1] :], real)
    whole = jnp.maximum(jnp.sum(real), 1)
    experts = router.p.shape[-1]
    return experts * jnp.sum(share(router.used) / whole * share(router.p) / whole)


def text_positions(batch) -> jax.Array:
    """(B, T) bool: the tokens of a batch of texts that a model reads and that are not padding."""
    if "segments" in batch:  # packed rows
        return batch["segments"][:, :-1] > 0
    # A text continues as long as targets follow.
    weighted = (batch["mask"][:, 1:] > 0).astype(jnp.int32)
    return jnp.flip(jnp.cumsum(jnp.flip(weighted, 1), 1), 1) > 0


def lm_rows(module, params, batch, base: Reference | None = None) -> Rows:
    """`Rows` of next-token prediction; batch as for `lm_loss`. base: to compare with, if any."""
    return _of_targets(*_of_tokens(module, params, batch, base))


def string_loss(module, params, batch, smoothing=0.0, training=False):
    """`lm_loss`; in evaluation with the outputs of `string_rows`."""
    if training:
        return lm_loss(module, params, batch, smoothing, training)
    return _summed(string_rows(module, params, batch))


def string_rows(module, params, batch, base: Reference | None = None) -> Rows:
    """`lm_rows` with outputs (B, 2) float32: the row's loss in nats, and how many of its targets
    have a probability above 1/2."""
    weights, nats, *others = _of_tokens(module, params, batch, base)
    rows = _of_targets(weights, nats, *others)
    likely = jnp.sum(weights * (nats < np.log(2)).astype(jnp.float32), axis=1)
    return rows._replace(outputs=jnp.stack([rows.loss, likely], axis=1))


def _of_tokens(module, params, batch, base: Reference | None):
    """(weights, nats, 1.0 where the label alone has the largest logit, KL if there is a base to
    compare with), each (B, T) float32, of next-token prediction."""
    (hidden, labels, weights), _ = _hidden(module, params, batch)
    states = () if base is None else (base.states.reshape(-1, base.states.shape[-1]),)

    def of_part(part):
        hidden, *states, labels = part
        logits = intercept.apply(module, params, hidden, method="logits")
        nats = _nats(logits, labels)
        given = divided.entries(logits, labels)[..., None]
        alone = jnp.sum(logits >= given, axis=-1) == 1  # no other reaches the label's
        of_base = [intercept.apply(module, base.params, x, method="logits") for x in states]
        return nats, alone.astype(jnp.float32), *[_kl(x, logits) for x in of_base]

    of_tokens = jax.lax.map(of_part, _in_parts(hidden, *states, labels))
    return weights, *(_together(x, weights.size).reshape(weights.shape) for x in of_tokens)


def _of_targets(weights, *of_tokens) -> Rows:
    nats, right, *kl = (jnp.sum(weights * x, axis=1) for x in of_tokens)
    return Rows(nats, jnp.sum(weights, axis=1), right, None, *kl)


def lm_states(module, params, batch) -> jax.Array:
    """`Reference.states` of a batch of texts: (B, T, D)."""
    (hidden, _, weights), _ = _hidden(module, params, batch)
    return hidden.reshape(*weights.shape, -1)


def _kl(of_base, outputs) -> jax.Array:
    """KL(base || model) in nats: logits (..., V) float32 of both -> (...) float32."""
    base, model = (jax.nn.log_softmax(x, axis=-1) for x in (of_base, outputs))
    return optax.losses.kl_divergence_with_log_targets(model, base)


def _hidden(module, params, batch, training=False):
    """((hidden states (B T, D), labels (B T,), weights of the labels (B, T)) of a batch of texts,
    [`Routed`] in training, if the model has a load-balancing loss)."""
    tokens, weights, segments = batch["tokens"], batch["mask"][:, 1:], batch.get("segments")
    segments = None if segments is None else segments[:, :-1]
    apply = functools.partial(intercept.apply, module, params, method="hidden")
    if training:
        hidden, sown = apply(tokens[:, :-1], segments, mutable=[ROUTED])
    else:
        hidden, sown = apply(tokens[:, :-1], segments), {}
    rows = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1), weights
    return rows, jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, Routed))


def class_loss(module, params, batch, smoothing=0.0, training=False):
    """(sum of losses, number of examples, scores (B, k) float32) of a classifier.

    batch: {"tokens", "segments", "types": (B, T) int32, "label": (B,)}. An int32 label is a class
    (cross entropy in nats), a float32 one a value to predict (squared error). A row without tokens
    does not count.
    """
    return _summed(class_rows(module, params, batch, smoothing))


def class_rows(module, params, batch, smoothing=0.0, base: Reference | None = None) -> Rows:
    """`Rows` of a classifier; batch as for `class_loss`. base: to compare with, if any."""
    segments, label = batch["segments"], batch["label"]
    scores = class_states(module, params, batch)
    weights = jnp.any(segments > 0, axis=1).astype(jnp.float32)
    if jnp.issubdtype(label.dtype, jnp.integer):
        return _of_classes(scores, label, weights, smoothing, base)
    return Rows(weights * jnp.square(scores[:, 0] - label), weights, None, scores)


def class_states(module, params, batch) -> jax.Array:
    """The outputs of a classifier, (B, k) float32."""
    return intercept.apply(module, params, batch["tokens"], batch["segments"], batch["types"])


def array_loss(module, params, batch, smoothing=0.0, training=False):
    """(sum of weighted losses, sum of weights, outputs (B, k) float32) of a model of arrays.

    batch: {"inputs": (B, ...) uint8, scaled to [0, 1] here, or float32; "label": (B,) int32, a
    class (cross entropy in nats), or (B, k) float32, values (squared error, the mean over the k);
    "weight": (B,) float32}.
    """
    return _summed(array_rows(module, params, batch, smoothing))


def array_rows(module, params, batch, smoothing=0.0, base: Reference | None = None) -> Rows:
    """`Rows` of a model of arrays; batch as for `array_loss`. base: to compare with, if any."""
    label, weights = batch["label"], batch["weight"]
    outputs = array_states(module, params, batch)
    if jnp.issubdtype(label.dtype, jnp.integer):
        return _of_classes(outputs, label, weights, smoothing, base)
    losses = jnp.mean(jnp.square(outputs - label), axis=-1)
    return Rows(weights * losses, weights, None, outputs)


def array_states(module, params, batch) -> jax.Array:
    """The outputs of a model of arrays, (B, k) float32."""
    inputs = batch["inputs"]
    if inputs.dtype == jnp.uint8:
        inputs = inputs.astype(jnp.float32) / 255
    return intercept.apply(module, params, inputs)


def _summed(rows: Rows):
    return jnp.sum(rows.loss), jnp.sum(rows.weight), rows.outputs


def _of_classes(scores, classes, weights, smoothing, base: Reference | None) -> Rows:
    """`Rows` of classes: scores (B, k) float32, classes (B,) int32, weights (B,) float32."""
    target = optax.smooth_labels(jax.nn.one_hot(classes, scores.shape[-1]), smoothing)
    losses = optax.softmax_cross_entropy(scores, target)
    right = (jnp.argmax(scores, axis=-1) == classes).astype(jnp.float32)
    kl = None if base is None else weights * _kl(base.states, scores)
    return Rows(weights * losses, weights, weights * right, scores, kl)
