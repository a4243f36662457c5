"""The computation of one member: training step and evaluation, without a member axis."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import leaves, losses, ops
from lorax.tasks import kinds
from lorax.train import optim


class Hyper(NamedTuple):
    """A member's inputs to the compiled step: () float32 each, and a PRNG key."""

    lr: jax.Array
    weight_decay: jax.Array
    key: jax.Array


class MemberState(NamedTuple):
    """All of a member that training changes. trainable: where gradients are taken; what is
    evaluated and exported is `learned`. diverged_at: () int32, -1 unless it has diverged."""

    trainable: dict
    opt_state: object
    step: jax.Array
    diverged_at: jax.Array


def optimizer(method, constants, train, hyper: Hyper, sites) -> optax.GradientTransformation:
    """The optimiser of `train`, the config's section, wrapped by the method's."""
    inner = optim.optimizer(train, hyper.lr, hyper.weight_decay, sites, constants)
    return optim.averaging(method.optimizer(inner, constants, train), train, hyper.lr)


def start(method, trainable, constants, train, hyper: Hyper, sites) -> MemberState:
    """State at step 0. train: the config's `train` section. sites: the base's."""
    opt_state = optimizer(method, constants, train, hyper, sites).init(trainable)
    return MemberState(trainable, opt_state, jnp.int32(0), jnp.int32(-1))


def learned(train, state: MemberState) -> dict:
    """The trainable tree to evaluate and export: the state's, or the average that schedule-free
    training keeps beside it. Leaves may have a member axis."""
    if train.optimizer != "schedule-free":
        return state.trainable
    of_member = jax.vmap(optim.averaged) if jnp.ndim(state.step) else optim.averaged
    return of_member(state.trainable, state.opt_state.z, state.opt_state.b1)


# --------------------------------------------------------------------------------- train, evaluate


class Program(NamedTuple):
    """The static part of the computation, the same for all members of a group.

    module: Linen module; method: of any member; sites: the base's; train: the config's section;
    dropout: whether any member uses dropout; merge: whether leaves may take the merged forward pass
    (members run one at a time); halved: {path: Site} of the frozen kernels that multiply in
    bfloat16. kind: of the rows.
    """

    module: object
    method: object
    sites: Mapping[str, ops.Site]
    train: object
    dropout: bool
    merge: bool
    halved: Mapping[str, ops.Site] = MappingProxyType({})
    kind: kinds.Kind = kinds.TEXTS


def _bound(program, trainable, constants, params, key=None):
    params = leaves.to_bfloat16(params, program.halved)
    bound = program.method.bind(trainable, constants, params, key, program.sites)
    return leaves.allow_merge(bound) if program.merge else bound


def train_step(program: Program, params, constants, hyper: Hyper, state: MemberState, batch):
    """One optimiser step: (new state, metrics {"loss", "grad_norm"} () float32).

    batch: leaves (A, B, ...), A parts whose gradients are added. A step whose loss, gradient norm
    or new parameter norm is not finite changes nothing; nor does any step after it or after
    `train.steps`.
    """
    at = state.trainable, state.step
    value, grads = gradients(program, params, constants, hyper, *at, batch)
    return update(program, constants, hyper, state, value, grads)


def gradients(program: Program, params, constants, hyper: Hyper, trainable, step, batch):
    """The half of a step that reads the base: (mean loss () float32, gradients like trainable)."""

    def loss(trainable, part, key):
        bound = _bound(program, trainable, constants, params, key if program.dropout else None)
        smoothing = program.train.label_smoothing
        return program.kind.loss(program.module, bound, part, smoothing, training=True)[:2]

    def add(carry, indexed):
        index, part = indexed
        key = jax.random.fold_in(jax.random.fold_in(hyper.key, step), index)
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(trainable, part, key)
        return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

    parts = jax.tree.leaves(batch)[0].shape[0]
    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    if parts == 1:
        (total, weight, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], batch)))
    else:
        (total, weight, grads), _ = jax.lax.scan(add, zero, (jnp.arange(parts), batch))
    weight = jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    if program.method.penalty is not None:
        penalty_grads = jax.grad(program.method.penalty)(trainable, constants)
        grads = jax.tree.map(jnp.add, grads, penalty_grads)
    return total / weight, grads


def update(program: Program, constants, hyper: Hyper, state: MemberState, value, grads):
    """The half of a step that reads the optimiser's state; value, grads: from `gradients`."""
    norm = optax.tree.norm(grads)
    transformation = optimizer(program.method, constants, program.train, hyper, program.sites)
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
    constants = program.method.expand(constants, params, program.sites)
    step = functools.partial(train_step, program, params, constants, hyper)
    return jax.lax.scan(step, state, batches)


def hessian_product(program: Program, params, constants, trainable, batches, vector):
    """H v, like trainable: H the Hessian of the mean training loss over batches with leaves
    (N, B, ...) with respect to the trainable parameters, without dropout and penalty; `vector` v
    like trainable. DoRA's lengths of columns are constants in it, as they are for its gradient.
    """
    constants = program.method.expand(constants, params, program.sites)
    smoothing = program.train.label_smoothing

    def loss(trainable, batch):
        bound = _bound(program, trainable, constants, params)
        return program.kind.loss(program.module, bound, batch, smoothing, training=True)[:2]

    def add(carry, batch):
        def along(trainable):  # the derivative of the loss along the vector
            gradient, weight = jax.grad(loss, has_aux=True)(trainable, batch)
            return optax.tree.vdot(gradient, vector), weight

        # Not a jvp of the gradient: layers with a backward pass of their own have none.
        product, weight = jax.grad(along, has_aux=True)(trainable)
        return jax.tree.map(jnp.add, carry, (product, weight)), None

    zero = jax.tree.map(jnp.zeros_like, trainable), jnp.float32(0)
    (product, weight), _ = jax.lax.scan(add, zero, batches)
    weight = jnp.maximum(weight, 1.0)
    return jax.tree.map(lambda x: x / weight.astype(x.dtype), product)


def evaluate(program: Program, params, constants, trainable, batches):
    """(mean loss () float32, outputs) over batches with leaves (N, B, ...).

    A language model's loss is in nats per completion token. outputs: (N, B, k) float32 if the kind
    of rows is `scored`, else None.
    """
    bound = _bound(program, trainable, constants, params)

    def add(carry, batch):
        total, weight, outputs = program.kind.loss(program.module, bound, batch)
        outputs = outputs if program.kind.scored else None
        return jax.tree.map(jnp.add, carry, (total, weight)), outputs

    (total, weight), outputs = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), batches)
    return total / weight, outputs


def evaluate_rows(program: Program, params, constants, trainable, batches, n) -> losses.Rows:
    """What becomes of each row of the first n batches: leaves (N, B, ...), zeros after them.

    batches: leaves (N, B, ...). n: () int32, so that one program evaluates sets of several sizes.
    """
    return _rows(program, _bound(program, trainable, constants, params), batches, n)


def compared_rows(
    program: Program, params, constants, trainable, batches, n, states
) -> losses.Rows:
    """`evaluate_rows` with the KL from the base. states: `base_states` of the batches; None where
    they are too large to be kept, and computed again, once for all members side by side."""
    bound, base = _bound(program, trainable, constants, params), _base(program, params)

    def reference(i, batch):
        of_batch = program.kind.states(program.module, base, batch) if states is None else states[i]
        return losses.Reference(base, of_batch)

    return _rows(program, bound, batches, n, reference)


def base_rows(program: Program, params, batches, n) -> losses.Rows:
    """`evaluate_rows` of the base without any member."""
    return _rows(program, _base(program, params), batches, n)


def base_states(program: Program, params, batches, n: int) -> jax.Array:
    """`losses.Reference.states` of the first n batches with leaves (N, B, ...): (n, B, T, D), or
    (n, B, k)."""
    base, batches = _base(program, params), jax.tree.map(lambda x: x[:n], batches)
    return jax.lax.map(lambda batch: program.kind.states(program.module, base, batch), batches)


def _base(program: Program, params) -> dict:
    return leaves.to_bfloat16(params, program.halved)


def _rows(program: Program, bound, batches, n, reference=lambda i, batch: None) -> losses.Rows:
    def of_batch(i):
        batch = jax.tree.map(lambda x: x[i], batches)
        rows = program.kind.rows(program.module, bound, batch, base=reference(i, batch))
        return rows if program.kind.scored else rows._replace(outputs=None)

    size = len(jax.tree.leaves(batches)[0])
    space = lambda x: jnp.zeros((size, *x.shape), x.dtype)
    write = lambda i, done: jax.tree.map(lambda x, row: x.at[i].set(row), done, of_batch(i))
    return jax.lax.fori_loop(0, n, write, jax.tree.map(space, jax.eval_shape(of_batch, 0)))
