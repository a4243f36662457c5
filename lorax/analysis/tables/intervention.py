"""Updates with their top intruder dimension scaled, to be evaluated in the model."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax import spectrum
from lorax.analysis.measures import intruders
from lorax.analysis.tables.matrices import (
    SVDs,
    Updates,
    by_matrix,
    identity,
    shape_of,
    stacks,
    with_base,
)
from lorax.analysis.tables.singular_values import base_svds

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Interventions(NamedTuple):
    """The updates after scaling the top intruder of every matrix by lambda.

    Evaluate both in the model: an effect that `changed` has and `shrunk` hasn't is due to the
    intruder.
    """

    table: pd.DataFrame  # member, path, layer, target, lam, index (from 0; -1: no intruder, nothing
    # changes), before = ||dW||_F, norm (after), scale = norm / before
    changed: dict[float, dict[Hashable, dict]]  # {lambda: {member: {path: update}}}
    shrunk: dict[float, dict[Hashable, dict]]  # the control: scale * dW, of the same norm


def interventions(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray],
    lam: Sequence[float] = LAMBDAS,
    k: int = 10,
    epsilon: float = 0.5,
    *,
    side: str = "out",
    svds: SVDs | None = None,
) -> Interventions:
    """Shuttleworth et al.'s intervention (`intruders.intervene`) on every matrix, for every lambda.

    Updates keep their form: factors get one more column (and s = 1), dense ones stay dense. The
    min(k, in, out) leading vectors of each matrix are examined.

    Args:
      lam: 0 removes the intruder, 1 changes nothing, above 1 strengthens it.
      svds: from `base_svds`, if already computed.
    """
    update_of = by_matrix(updates, kernels)
    svds = base_svds(kernels, (path for _, path in update_of)) if svds is None else svds
    lam = [float(x) for x in lam]
    done = {}
    for keys in stacks({key: shape_of(update) for key, update in update_of.items()}):
        update, w, w_svd = with_base(update_of, kernels, svds, keys)
        k_matrix = min(k, *w.shape[1:])
        top = intruders.intruders(w, update, k_matrix, epsilon, side=side, w_svd=w_svd)
        swept = intruders.intervene(w, update, np.array(lam)[:, None], k_matrix, epsilon, found=top)
        if isinstance(update, tuple):
            before = np.linalg.norm(spectrum.factor_svd(*update)[1], axis=-1)
        else:
            before = np.linalg.norm(update, axis=(-2, -1))
        for n, key in enumerate(keys):
            done[key] = swept.index[n], before[n], *(x[:, n] for x in swept[1:])
    rows = []
    changed: dict[float, dict] = {x: {} for x in lam}
    shrunk: dict[float, dict] = {x: {} for x in lam}
    for (member, path), update in update_of.items():
        index, before, a, b, norm, scale = done[member, path]
        for n, x in enumerate(lam):
            row = {**identity(member, path), "lam": x, "index": int(index), "before": float(before)}
            rows.append({**row, "norm": float(norm[n]), "scale": float(scale[n])})
            changed[x].setdefault(member, {})[path] = _plus(update, a[n], b[n])
            shrunk[x].setdefault(member, {})[path] = _times(update, float(scale[n]))
    return Interventions(pd.DataFrame(rows), changed, shrunk)


def _plus(update, a: np.ndarray, b: np.ndarray):
    """dW + a @ b, in the form of dW."""
    if isinstance(update, np.ndarray):
        return (update + a @ b).astype(update.dtype)
    wider = np.concatenate([update.s * update.a, a], axis=1).astype(np.float32)
    return update._replace(a=wider, b=np.concatenate([update.b, b]).astype(np.float32), s=1.0)


def _times(update, scale: float):
    if isinstance(update, np.ndarray):
        return (scale * update).astype(update.dtype)
    return update._replace(s=scale * update.s)
