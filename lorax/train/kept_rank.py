"""The loss of trained members against the rank that is kept of their updates.

Every update is decomposed once. For k = 0, 1, 2, 4... all matrices keep their k leading singular
directions, the best approximation of rank k (Eckart & Young 1936), and all members are evaluated
side by side, in one program for all k. What low-rank training could have left out shows where the
curve is flat; it is not what training at rank k would have found.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import divided, gather, methods, spectrum, tree
from lorax.models import Base
from lorax.train import evaluation
from lorax.train.part import Part, decimal


class Decomposed(NamedTuple):
    """The updates of a member. factors: {path: (u (layers..., in, K), sigma (layers..., K), vt
    (layers..., K, out))}, float32. lengths: {path: DoRA's m (layers..., out)}. whole: {path: a
    parameter that is trained in full}."""

    factors: dict
    lengths: dict
    whole: dict


def why_not(method: methods.Method, base: Base) -> str:
    """Why a method's updates can't be cut to a rank, "" if they can."""
    if method.delta is None:
        return f"{method.name} does not change weights and has no rank to keep"
    if method.factors is None and gather.mesh_of(base.params) is not None:
        return f"{method.name} has no factors, and its updates are divided over devices"
    return ""


def measure(part: Part, trainable, trained: list[int]) -> list[list[dict]]:
    """For each of the members at `trained`: rows with "kept" (k, of every matrix; the last is all
    that the member has), "energy" (share of the squared norm of all its updates), "loss" and the
    scores of the validation rows. trainable: of all members, on the host; those that diverged are
    left out."""
    stack, base, programs = part.stack, part.group.base, part.programs
    member = lambda i: jax.tree.map(lambda x: x[i], (trainable, stack.constants))
    updates = [decomposed(stack.methods[i], base, *member(i)) for i in trained]
    stacked, constants = together(updates)
    constants, rows = programs.place(constants), [[] for _ in trained]
    own = [rank_of(update) for update in updates]
    for k in ranks(max(own)):
        arguments = part.params, constants, programs.place(cut(stacked, k))
        on = part.group.task, part.splits["eval"]
        with divided.on(gather.mesh_of(part.params)):
            measured = evaluation.evaluate_rows(
                programs.truncated_rows, arguments, len(updates), *on
            )
        for i, (row, update, rank) in enumerate(zip(rows, updates, own, strict=True)):
            if not row or row[-1]["kept"] < rank:  # else it has no further directions
                row.append({"kept": min(k, rank), "energy": energy(update, k)})
                row[-1] |= {"loss": decimal(measured.losses[i])}
                row[-1] |= {name: decimal(x[i]) for name, x in measured.scores.items()}
    return rows


def decomposed(method: methods.Method, base: Base, trainable, constants) -> Decomposed:
    """The updates of a member, decomposed."""
    factors, lengths, whole = {}, {}, {}
    single = lambda svd: tuple(x.astype(np.float32) for x in svd)
    if method.factors is not None:
        learned = method.factors(trainable, constants, base.params, base.sites)
        for path, (a, b, s, m) in learned.items():
            factors[path] = single(spectrum.factor_svd(a, b, s))
            lengths |= {} if m is None else {path: np.asarray(m, np.float32)}
        joined = methods.joined(trainable).items()
        whole = {path: arrays["w"] for path, arrays in joined if "w" in arrays}
        return Decomposed(factors, lengths, whole)
    flat = tree.flatten(base.params)
    for path, dw in method.delta(trainable, constants, base.params, base.sites).items():
        if path in base.sites and path not in base.fresh:
            factors[path] = single(spectrum.update_svd(base.sites[path].to_matrix(dw)))
        else:
            whole[path] = flat[path].astype(jnp.float32) + dw
    return Decomposed(factors, lengths, whole)


def together(members: list[Decomposed]) -> tuple[dict, dict]:
    """(trainable, constants) for `lorax.methods.truncated`, stacked, with all directions."""
    trees = []
    for updates, lengths, whole in members:
        trainable = {f"{path}/w": w for path, w in whole.items()}
        constants = {}
        for path, (u, sigma, vt) in updates.items():
            half = np.sqrt(sigma)
            trainable |= {f"{path}/a": u * half[..., None, :], f"{path}/b": half[..., None] * vt}
            constants[f"{path}/s"] = np.ones(sigma.shape[:-1], np.float32)
            if path in lengths:
                trainable[f"{path}/m"] = lengths[path]
                constants[f"{path}/on"] = sigma.any(axis=-1).astype(np.float32)
        trees.append((tree.unflatten(trainable), tree.unflatten(constants)))
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def cut(stacked: dict, k: int) -> dict:
    """Stacked factors with zeros after the first k directions."""
    first = lambda x: jnp.where(jnp.arange(x.shape[-1]) < k, 1.0, 0.0)
    keep = lambda path, x: x * jnp.broadcast_to(first(x), x.shape) if path.endswith("/a") else x
    return tree.unflatten({path: keep(path, x) for path, x in tree.flatten(stacked).items()})


def rank_of(member: Decomposed) -> int:
    """The largest numerical rank of its updates."""
    ranks = [0]
    for u, sigma, vt in member.factors.values():
        of_layers = spectrum.numerical_rank(sigma, (u.shape[-2], vt.shape[-1]))
        ranks.append(int(of_layers.max(initial=0)))
    return max(ranks)


def ranks(most: int) -> list[int]:
    """0, the powers of two, and `most`, the largest rank of any member."""
    return sorted({0, most, *(2**n for n in range(most.bit_length()) if 2**n <= most)})


def energy(member: Decomposed, k: int) -> float:
    """The share of the squared norm of all updates in their k leading directions, 0 of none."""
    squares = [sigma.astype(np.float64) ** 2 for _, sigma, _ in member.factors.values()]
    whole = sum(x.sum() for x in squares)
    return round(float(sum(x[..., :k].sum() for x in squares) / whole), 6) if whole else 0.0
