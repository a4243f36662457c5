"""Singular values of updates and of the base's kernels, and the ranks computed from them."""

from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import pandas as pd

from lorax.analysis.tables.matrices import SVDs, Updates, identity, kernel_shape, stacks
from lorax.analysis.tables.statistics import each, in_order, numbers
from lorax.analysis.tables.update import BUILT_IN, Update


def spectra(
    updates: Mapping[Hashable, Updates], delta_svds: Mapping[Hashable, SVDs] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectra of all updates, and the ranks computed from them.

    updates: {member: {path: Factors, or dW (in, out)}}. All singular values of a dense update are
    computed, whatever its size, because ranks need the small ones too. delta_svds: from
    `update_svds`, if already computed.
    Returns two tables: (member, path, layer, target, index from 1, sigma), and (member, path,
    layer, target, rank, norm = ||dW||_F, effective, stable, energy90, numerical).
    """
    sigmas, ranks = {}, {}
    for update in each(updates, delta_svds=delta_svds):
        key, sigma = (update.member, update.path), update.singular_values
        row = identity(*key)
        sigmas[key] = [{**row, "index": i, "sigma": x} for i, x in enumerate(sigma, 1)]
        ranks[key] = {**row, "rank": update.rank, **built_in(update)}
    values = [row for rows in in_order(sigmas, updates) for row in rows]
    return pd.DataFrame(values), pd.DataFrame(in_order(ranks, updates))


def built_in(update: Update) -> dict[str, float | int]:
    """{column: number} of lorax's own statistics."""
    return {name: x for statistic in BUILT_IN for name, x in numbers(statistic, update).items()}


def base_svds(
    kernels: Mapping[str, np.ndarray], paths: Iterable[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{path: (u (in, k), sigma (k,), vt (k, out))}, k = min(in, out): the thin SVD of each kernel.

    This is most of the work in comparing updates with W: compute it once and pass it on.

    Args:
      paths: which kernels; by default all.
    """
    chosen = list(kernels) if paths is None else list(dict.fromkeys(paths))
    svds = {}
    for keys in stacks({path: kernel_shape(kernels, path) for path in chosen}):
        stack = np.stack([np.asarray(kernels[path], np.float64) for path in keys])
        svd = np.linalg.svd(stack, full_matrices=False)
        svds |= dict(zip(keys, zip(*svd, strict=True), strict=True))
    return {path: svds[path] for path in chosen}


def base_spectra(
    kernels: Mapping[str, np.ndarray], svds: SVDs | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The spectrum of W itself, and its rank deficiency.

    Returns two tables: (path, layer, target, index from 1, sigma), and (path, layer, target, rows,
    columns, norm = ||W||_F, effective, stable, energy90, numerical, deficiency = min(rows,
    columns) - numerical).

    Args:
      svds: from `base_svds`; without it only singular values are computed.
    """
    sigmas, ranks = [], []
    for path, w in kernels.items():
        sigma = svds[path][1] if svds is not None and path in svds else None
        kernel = Update("base", path, w, sigma=sigma)  # W has the same statistics as an update
        row = {"path": path, "layer": kernel.layer, "target": kernel.target}
        sigmas += [{**row, "index": i, "sigma": x} for i, x in enumerate(kernel.singular_values, 1)]
        row |= {"rows": w.shape[0], "columns": w.shape[1], **built_in(kernel)}
        ranks.append({**row, "deficiency": min(w.shape) - row["numerical"]})
    return pd.DataFrame(sigmas), pd.DataFrame(ranks)
