"""AdaLoRA: a rank budget that matrices compete for (Zhang et al. 2023, arXiv:2303.10512).

    y = x w + s dropout(x) a diag(e) b      a (in, r), e (r,), b (r, out), s = alpha / (r + 1e-5)

Column k of a, e[k] and row k of b are a triplet (section 3.1). e starts at zero, a and b at
N(0, 0.02^2), and a penalty, orthogonal mean |P^T P - 1|, P = a and b^T of every matrix, keeps the
columns of each close to orthonormal, so that e are singular values. After step t = 1, 2... every
entry p of the three, with gradient g, has (section 3.2)

    I = |p g|,    average += (1 - beta1) (I - average),
    deviation += (1 - beta2) (|I - average| - deviation),    score = average deviation

and the score of a triplet is the score of its e, plus the mean over its column of a, plus the mean
over its row of b. Of all triplets of all matrices and layers, the `budget` highest keep their e;
the e of the others become zero. With n adapted matrices the budget is r n until step tinit,
target_rank n from step steps - tfinal on, and falls as a cubic between the two (section 3.3).
Pruning happens at multiples of `every`; an e that was set to zero may grow again until the next.
From steps - tfinal on the averages are frozen and every step prunes: the choice of triplets is
final.

Where the paper and PEFT differ, this file follows PEFT (0.21, `peft.tuners.adalora`):

- p in I is the parameter after the optimiser's step, g the gradient before it; the paper takes both
  before. g includes the penalty's gradient and is not yet clipped (PEFT uses what the caller has
  left in `.grad`).
- The paper's update has no s (equation 3). r in s is the initial rank, whatever is pruned.
- The penalty is a mean of Frobenius norms; the paper has a sum of their squares (equation 4).
- The budget falls as (1 - (t - tinit) / (steps - tfinal - tinit))^3, rounded down, in float64.

It departs from PEFT in three points. Steps count from 1, `update_and_allocate(step + 1)`, so that
with tfinal = 0 the final pruning happens after the last step; counting from 0 never reaches it.
Ties are broken by path, layer and column, so that exactly the budget is kept; PEFT drops all
triplets that equal its threshold. target_rank may equal the rank, which prunes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices, words_of


def adalora(
    rank: int = 12,
    alpha: float = 8.0,
    target_rank: int | None = None,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    tinit: int = 0,
    tfinal: int = 0,
    every: int = 1,
    orthogonal: float = 0.5,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Method:
    """AdaLoRA with the given hyperparameters; see `lorax.methods.Method` for its functions.

    rank: r >= 1 of every matrix at the start, at most min(in, out) of every target.
    target_rank: mean rank at the end, 1 to rank; None for two thirds of rank (PEFT: 8 of 12).
    alpha: sets the scale s. targets, layers, dropout: as for `lora.lora`. tinit, tfinal: steps
    before the budget falls and after it has fallen; at least one of `train.steps` must be between
    them. every: steps between two prunings.
    orthogonal: weight of the penalty. beta1, beta2: of the averages, in (0, 1).
    Raises ValueError for a value out of range.
    """
    target_rank = max(1, round(2 * rank / 3)) if target_rank is None else target_rank
    hp = dict(rank=rank, alpha=alpha, target_rank=target_rank, targets=words_of(targets))
    hp |= dict(layers=layers, dropout=dropout, tinit=tinit, tfinal=tfinal, every=every)
    hp |= dict(orthogonal=orthogonal, beta1=beta1, beta2=beta2)
    _check(hp)
    hp["scale"] = alpha / (rank + 1e-5)

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        r, trainable, constants = pad or rank, {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):

            def draw(key, index, m=m):
                for_a, for_b = jax.random.split(key)
                a = 0.02 * jax.random.normal(for_a, (m.n_in, rank), jnp.float32)
                return {"a": a, "b": 0.02 * jax.random.normal(for_b, (rank, m.n_out), jnp.float32)}

            trainable[m.path] = m.fill({"a": (m.n_in, r), "e": (r,), "b": (r, m.n_out)}, draw)
            constants[m.path] = {
                "s": m.full(hp["scale"]),
                **{name: m.full(hp[name]) for name in ("dropout", "orthogonal", "beta1", "beta2")},
                **{name: m.full(hp[name], jnp.int32) for name in ("tinit", "tfinal", "every")},
                "target": jnp.asarray(m.active * target_rank, jnp.int32),
                "real": jnp.asarray(m.active[..., None] & (np.arange(r) < rank)),
            }
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank * (m.n_in + m.n_out + 1) for m in adapted)

    functions = init, bind, delta, count, factors, optimizer, penalty
    return Method("adalora", hp, *functions, adapts=adapts, width=rank)


def _check(hp: dict) -> None:
    """Raises ValueError for a hyperparameter out of range."""
    rank, at_least_0 = hp["rank"], ("tinit", "tfinal", "orthogonal")
    for field, ok, right in (
        ("rank", rank >= 1, "at least 1"),
        ("target_rank", 1 <= hp["target_rank"] <= rank, f"from 1 to the rank, {rank}"),
        ("dropout", 0 <= hp["dropout"] < 1, "in [0, 1)"),
        *((field, hp[field] >= 0, "at least 0") for field in at_least_0),
        ("every", hp["every"] >= 1, "at least 1"),
        *((field, 0 < hp[field] < 1, "in (0, 1)") for field in ("beta1", "beta2")),
    ):
        if not ok:
            raise ValueError(f"method.{field}: {hp[field]} given, must be {right}")


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update, s (a diag(e)) b."""
    thin = joined(trainable, constants)
    for x in thin.values():
        x["a"] = x["a"] * x.pop("e")[..., None, :]
    return tree.unflatten(thin)


#: `LowRank` leaves, and s a diag(e) b.
bind, delta, _factors = lora.through(_as_lora)


def factors(trainable, constants, params, sites=None):
    """{path: (a diag(e), b, s, None)}, a pruned triplet's column and row both zero."""
    products = _factors(trainable, constants, params)
    unpruned = lambda a, b: jnp.where(jnp.any(a != 0, axis=-2)[..., None], b, 0)
    return {path: (a, unpruned(a, b), s, None) for path, (a, b, s, _) in products.items()}


def penalty(trainable, constants):
    """() orthogonal times the mean of |P^T P - 1| over P = a and b^T of the adapted matrices."""
    total, n = 0.0, 0
    for x in joined(trainable, constants).values():
        n += 2 * jnp.sum(x["real"][..., 0])
        for p in (x["a"], jnp.swapaxes(x["b"], -1, -2)):
            p = p.astype(np.promote_types(p.dtype, np.float32))
            gram = jnp.swapaxes(p, -1, -2) @ p
            identity = jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), gram.shape)
            identity = identity * x["real"][..., None, :].astype(p.dtype)
            squares = jnp.sum(jnp.square(gram - identity), axis=(-2, -1))
            # The root's gradient is infinite at zero: unadapted layers, or an orthonormal P.
            norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
            total = total + jnp.sum(norms)
    return _of_member(constants, "orthogonal").astype(total.dtype) * total / n.astype(total.dtype)


# --------------------------------------------------------------------------------------- allocation


class Allocation(NamedTuple):
    """State of `optimizer`. inner: state of the inner optimiser. step: () int32, steps done.

    budgets: (train.steps + 1,) int32, see `schedule`. average, deviation: {path: {"a", "e", "b"}},
    float32.
    """

    inner: object
    step: jax.Array
    budgets: jax.Array
    average: dict
    deviation: dict


def schedule(full: int, target: int, tinit: int, tfinal: int, every: int, steps: int):
    """(steps + 1,) int32: number of triplets kept after each step, `full` where none is pruned.

    full, target: number of triplets at the start and at the end.
    Raises ValueError if tinit and tfinal leave no step between them.
    """
    last = steps - tfinal
    if tinit >= last:
        raise ValueError(
            f"method.tinit: {tinit} given, with method.tfinal {tfinal} must leave at least one of "
            f"the {steps} steps of train.steps"
        )
    budgets = np.full(steps + 1, full, np.int32)
    for t in range(tinit + 1, last):
        if t % every == 0:
            budgets[t] = int((full - target) * (1 - (t - tinit) / (last - tinit)) ** 3 + target)
    budgets[last:] = target
    return budgets


def optimizer(inner, constants, train):
    """`inner`, followed after each step by setting the e of triplets beyond the budget to zero.

    Its `init` reads the constants' values; if it is traced, as for a plan, only shapes are right.
    """
    fixed = joined(constants)

    def adapted(tree_):
        """{path: {"a", "e", "b"}}, without additional parameters that are trained in full."""
        return {path: x for path, x in joined(tree_).items() if path in fixed}

    def init(trainable):
        budgets = jnp.zeros(train.steps + 1, jnp.int32)
        if not isinstance(_of_member(constants, "tinit"), jax.core.Tracer):
            total = lambda name: int(sum(np.sum(x[name]) for x in fixed.values()))
            phases = (int(_of_member(constants, name)) for name in ("tinit", "tfinal", "every"))
            budgets = jnp.asarray(schedule(total("real"), total("target"), *phases, train.steps))
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), adapted(trainable))
        return Allocation(inner.init(trainable), jnp.int32(0), budgets, zeros(), zeros())

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, params)
        step = state.step + 1
        beta1, beta2, tfinal = (_of_member(constants, n) for n in ("beta1", "beta2", "tfinal"))
        sensitivity = jax.tree.map(
            lambda p, g: jnp.abs(p.astype(jnp.float32) * g.astype(jnp.float32)),
            adapted(optax.apply_updates(params, updates)),
            adapted(grads),
        )
        smooth = lambda beta, old, new: jnp.where(
            step < train.steps - tfinal, beta * old + (1 - beta) * new, old
        )
        average = jax.tree.map(lambda m, i: smooth(beta1, m, i), state.average, sensitivity)
        deviation = jax.tree.map(
            lambda d, i, m: smooth(beta2, d, jnp.abs(i - m)), state.deviation, sensitivity, average
        )
        masks = keep(jax.tree.map(jnp.multiply, average, deviation), fixed, state.budgets[step])
        flat, old = tree.flatten(updates), tree.flatten(params)
        for path, mask in masks.items():
            u, e = flat[f"{path}/e"], old[f"{path}/e"]
            flat[f"{path}/e"] = jnp.where(mask, u, -e.astype(u.dtype))
        new = Allocation(inner_state, step, state.budgets, average, deviation)
        return tree.unflatten(flat), new

    return optax.GradientTransformation(init, update)


def keep(scores, fixed, budget):
    """{path: (layers..., r) bool}: the `budget` triplets with the highest scores; ties go to the
    first.

    scores: {path: {"a", "e", "b"}} of each entry. fixed: {path: constants}. budget: () int32.
    """
    triplets = {}
    for path, x in scores.items():
        score = x["e"] + jnp.mean(x["a"], axis=-2) + jnp.mean(x["b"], axis=-1)
        # Padding, and layers that this member does not adapt, come last.
        triplets[path] = jnp.where(fixed[path]["real"], score, -jnp.inf)
    flat = jnp.concatenate([score.ravel() for score in triplets.values()])
    order = jnp.argsort(-flat, stable=True)
    mask = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(len(flat)) < budget)
    ends = np.cumsum([score.size for score in triplets.values()])
    parts = jnp.split(mask, ends[:-1])
    return {p: m.reshape(triplets[p].shape) for p, m in zip(triplets, parts, strict=True)}


def _of_member(constants, name):
    """() a constant of the whole member, of which every matrix has a copy."""
    return next(iter(joined(constants).values()))[name].ravel()[0]
