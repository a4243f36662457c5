"""Losses of a batch: next-token prediction without storing all logits, classification, regression.

Each loss of a kind of rows (`lorax.tasks.kinds`) returns the sum of the weighted losses, the sum of
the weights, and the model's outputs, None for language models.

Axes: B sequences, T tokens, D features, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from lorax import intercept

ROWS = 256  # logits are computed for at most this many tokens at a time


def token_losses(module, params, hidden, labels, smoothing=0.0):
    """Negative log-likelihood in nats: hidden (N, D), labels (N,) int32 -> (N,) float32.

    smoothing: share of the target that is spread over the vocabulary (arXiv:1512.00567, section 7).
    """
    logits = intercept.apply(module, params, hidden, method="logits")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return nats
    even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nats + smoothing * even


def weighted_loss(module, params, hidden, labels, weights, smoothing=0.0):
    """sum(weights * nats) as float32 (): hidden (N, D), labels (N,), weights (N,) float32.

    Logits are computed for at most `ROWS` tokens at a time, together with the gradient for `hidden`
    and the trained part of the head. The backward pass only scales that gradient, and no (N, V)
    array ever exists.
    """
    n = len(labels)
    rows = -(-n // -(-n // ROWS))  # equal parts of at most ROWS
    pad = -n % rows
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    labels, weights = (jnp.pad(x, (0, pad)).reshape(-1, rows) for x in (labels, weights))
    head = {name: params[name] for name in module.head if name in params}

    def loss(head, hidden, labels, weights):
        return jnp.sum(weights * token_losses(module, head, hidden, labels, smoothing))

    return _sum_over_rows(loss, head, hidden, labels, weights)


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


def lm_loss(module, params, batch, smoothing=0.0):
    """(sum of weighted nats, sum of weights, None) of next-token prediction.

    batch: {"tokens": (B, T + 1) int32, "mask": (B, T + 1) float32} and, if rows hold several texts,
    "segments" (B, T + 1) int32; see `lorax.tasks.Task`.
    """
    tokens, weights, segments = batch["tokens"], batch["mask"][:, 1:], batch.get("segments")
    segments = None if segments is None else segments[:, :-1]
    hidden = intercept.apply(module, params, tokens[:, :-1], segments, method="hidden")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    total = weighted_loss(module, params, hidden, labels, weights.reshape(-1), smoothing)
    return total, jnp.sum(weights), None


def class_loss(module, params, batch, smoothing=0.0):
    """(sum of losses, number of examples, scores (B, k) float32) of a classifier.

    batch: {"tokens", "segments", "types": (B, T) int32, "label": (B,)}. An int32 label is a class
    (cross entropy in nats), a float32 one a value to predict (squared error). A row without tokens
    does not count.
    """
    tokens, segments, label = batch["tokens"], batch["segments"], batch["label"]
    scores = intercept.apply(module, params, tokens, segments, batch["types"])
    if jnp.issubdtype(label.dtype, jnp.integer):
        losses = _cross_entropy(scores, label, smoothing)
    else:
        losses = jnp.square(scores[:, 0] - label)
    weights = jnp.any(segments > 0, axis=1).astype(jnp.float32)
    return jnp.sum(weights * losses), jnp.sum(weights), scores


def array_loss(module, params, batch, smoothing=0.0):
    """(sum of weighted losses, sum of weights, outputs (B, k) float32) of a model of arrays.

    batch: {"inputs": (B, ...) uint8, scaled to [0, 1] here, or float32; "label": (B,) int32, a
    class (cross entropy in nats), or (B, k) float32, values (squared error, the mean over the k);
    "weight": (B,) float32}.
    """
    inputs, label, weights = batch["inputs"], batch["label"], batch["weight"]
    if inputs.dtype == jnp.uint8:
        inputs = inputs.astype(jnp.float32) / 255
    outputs = intercept.apply(module, params, inputs)
    if jnp.issubdtype(label.dtype, jnp.integer):
        losses = _cross_entropy(outputs, label, smoothing)
    else:
        losses = jnp.mean(jnp.square(outputs - label), axis=-1)
    return jnp.sum(weights * losses), jnp.sum(weights), outputs


def _cross_entropy(scores, classes, smoothing):
    """Nats of each row: scores (B, k) float32, classes (B,) int32 -> (B,) float32."""
    target = optax.smooth_labels(jax.nn.one_hot(classes, scores.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(scores, target)
