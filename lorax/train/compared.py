"""What trajectories compare updates with: singular directions of W, and of the first full gradient.

Both are read before training, a layer at a time, from the base as it is stored (decoded if it is
quantised, gathered if several devices hold parts of it). They take part in no step.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lorax import gather, tree
from lorax.models import Base
from lorax.tasks import Task
from lorax.train import evidence
from lorax.train.stacks import Stack


class Compared(NamedTuple):
    """Directions of one parameter (layers..., in, out), float32; None for those not asked for.

    u: (layers..., 2, in, k), the k leading left singular vectors of W and its k last ones, the last
    of the min(in, out) that a thin SVD has. v: (layers..., 2, out, k), the right ones.
    gradient: (layers..., in, r), the r leading left singular vectors of the loss's gradient with
    respect to W, before the first step.
    """

    u: np.ndarray | None = None
    v: np.ndarray | None = None
    gradient: np.ndarray | None = None


def of_members(
    base: Base, task: Task, stack: Stack, paths: Mapping[str, int], known: dict
) -> list[dict]:
    """{path: Compared} of each member, {} without `analysis.subspaces` and
    `analysis.first_gradient`. paths: {path of a parameter whose updates are decomposed: columns of
    its a, 0 without one}; the gradients of those with an a are read. known: cache of `of_weights`;
    what it lacks is added."""
    k, of_all = stack.config.analysis.subspaces, {}
    for path in paths if k else ():
        key = id(base), path, k
        if key not in known:
            known[key] = of_weights(base, path, k)
        of_all[path] = Compared(*known[key])
    spans = {path: r for path, r in paths.items() if r and stack.config.analysis.first_gradient}
    if not spans:
        return [of_all] * len(stack.members)
    compared, seen, leading = [], {}, {}
    for member in stack.members:
        read = evidence.read(member, base, task, spans, "gradient", seen)
        if id(read) not in leading:  # members with the same batches share their gradient
            directions = {path: of_gradient(read[path]["gradient"], r) for path, r in spans.items()}
            leading[id(read)] = directions
        alone = dict.fromkeys(spans, Compared()) | of_all
        for path, directions in leading[id(read)].items():
            alone[path] = alone[path]._replace(gradient=directions)
        compared.append(alone)
    return compared


def of_weights(base: Base, path: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) of `Compared`; k is at most min(in, out)."""
    leaf, site = tree.flatten(base.params)[path], base.sites[path]
    axes = site.matrix_shape(leaf.shape)[0]
    found = []
    for index in np.ndindex(*axes):
        w = np.asarray(gather.matrix(leaf, site, index), np.float64)
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        few = min(k, len(vt))
        ends = lambda x, few=few: np.stack([x[:, :few], x[:, -few:]]).astype(np.float32)
        found.append((ends(u), ends(vt.T)))
    stacked = (np.stack(x) for x in zip(*found, strict=True))
    return tuple(x.reshape(*axes, *x.shape[1:]) for x in stacked)


def of_gradient(gradient, r: int) -> np.ndarray:
    """(layers..., in, r) float32: the leading left singular vectors of a gradient (layers..., in,
    out); r is at most min(in, out)."""
    axes, found = gradient.shape[:-2], []
    for index in np.ndindex(*axes):
        g = np.asarray(gather.layer(gradient, index), np.float64)
        found.append(np.linalg.svd(g, full_matrices=False)[0][:, :r].astype(np.float32))
    return np.stack(found).reshape(*axes, *found[0].shape)
