"""How much adapters change the outputs of the layers: linear CKA of the residual stream.

Kornblith et al. 2019 (arXiv 1905.00414, section 3), as in `lorax.analysis.linear_cka`, but on the
device and in float32, since activations are too large to copy to the host.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lorax import divided, gather, hosts, intercept, tasks
from lorax.errors import reason
from lorax.models import Base
from lorax.tasks import kinds
from lorax.train.batches import eval_batches


def check(base: Base, rows: int) -> None:
    """Raises ValueError if `config.analysis.cka` is set for a base without a residual stream."""
    if rows and not base.traits.stream:
        images = base.input_shape is not None
        why = "reads images" if images else "has no residual stream that lorax knows"
        raise ValueError(
            f"analysis.cka: {rows} given, but {base.name} ({base.family}) {why}; CKA "
            "compares the residual streams of models that read texts; leave it at 0"
        )


def similarity(
    base: Base, method, trainable, constants, task: tasks.Task, rows: int, batch_size: int
) -> np.ndarray:
    """CKA (M, L) float32 between the residual streams after each of L layers, with and without the
    adapter.

    trainable, constants: of M members of one method, leaves (M, ...). rows: number of evaluation
    rows, evenly spaced, `batch_size` at a time; their real tokens are the examples. There should be
    more tokens than the model has features: with fewer, CKA is always near 1.
    """
    before, compared = _programs(base, method, task.kind)
    mesh = gather.mesh_of(base.params)
    batches = gather.side_by_side(jax.device_put(_batches(task, rows, batch_size)), mesh, axis=1)
    with divided.on(mesh):
        first = before(base.params, batches)
        of_members = []
        for i in range(len(jax.tree.leaves(trainable)[0])):
            member = jax.tree.map(lambda x, i=i: x[i], (trainable, constants))
            of_members.append(hosts.whole(compared(base.params, *member, batches, first)))
        return np.stack(of_members)


def rehearse(
    base: Base, method, trainable, constants, task: tasks.Task, rows: int, batch_size: int
) -> None:
    """Raises ValueError if `similarity` can't be computed, before training. trainable, constants:
    shapes of one member."""
    before, compared = _programs(base, method, task.kind)
    batches = _batches(task, rows, batch_size)
    try:
        first = jax.eval_shape(before, base.params, batches)
        jax.eval_shape(compared, base.params, trainable, constants, batches, first)
    except Exception as error:
        raise ValueError(
            f"analysis.cka: {rows} given, but it can't be computed for method {method.name} on "
            f"{base.name} ({reason(error)}); leave it at 0"
        ) from error


def _batches(task, rows, batch_size):
    return eval_batches(task._replace(eval=tasks.spread(task.eval, rows)), batch_size)


def _programs(base, method, kind):
    """before(params, batches): the base's `residuals`. compared(params, trainable, constants,
    batches, before): CKA (L,) between them and one member's."""

    @jax.jit
    def compared(params, trainable, constants, batches, before):
        bound = method.bind(trainable, constants, params, sites=base.sites)
        return cka(before, residuals(base.module, kind, bound, batches), real(kind, batches))

    return jax.jit(lambda params, batches: residuals(base.module, kind, params, batches)), compared


def residuals(module, kind: kinds.Kind, params, batches) -> jax.Array:
    """The output of every layer: (L, N B T, D) float32 of rows with leaves (N, B, ...).

    params: may have operator leaves. The T positions are those that the loss reads.
    """

    def one(batch):
        inputs = kind.inputs(batch)
        with intercept.interceptor():
            _, captured = module.apply(
                {"params": params},
                *inputs,
                method="hidden",
                mutable="intermediates",
                capture_intermediates=lambda m, name: m.path == ("h",) and name == "__call__",
            )
        x = jax.tree.leaves(captured)[0]  # (L, B, T, D), of a layer's (x, cache) or x
        return x[:, :, -inputs[0].shape[1] :].astype(jnp.float32)  # no virtual tokens ahead

    x = jnp.moveaxis(jax.lax.map(one, batches), 0, 1)
    return x.reshape(len(x), -1, x.shape[-1])


def real(kind: kinds.Kind, batches) -> jax.Array:
    """(N B T,) float32: 1 for a text's tokens, 0 for padding."""
    return jax.vmap(kind.real)(batches).astype(jnp.float32).reshape(-1)


def cka(x, y, weights) -> jax.Array:
    """Linear CKA (L,) float32 of activations x (L, n, p) and y (L, n, q), over the examples whose
    weight (n,) is 1, not 0. CKA is 0 if x or y is the same for all examples."""
    exact = jax.lax.Precision.HIGHEST
    norm = lambda x, y: jnp.linalg.norm(jnp.matmul(x.T, y, precision=exact))

    def centred(x):
        x = weights[:, None] * (x - (weights @ x / jnp.sum(weights))[None])
        whole = jnp.linalg.norm(x)
        return x / jnp.where(whole > 0, whole, 1)

    def one(pair):
        x, y = map(centred, pair)
        scale = norm(x, x) * norm(y, y)
        return jnp.where(scale > 0, norm(x, y) ** 2 / jnp.where(scale > 0, scale, 1), 0)

    return jax.lax.map(one, (x, y))
