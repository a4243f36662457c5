"""Singular values of updates and of the base's kernels, and the ranks read off them."""

from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import pandas as pd

from lorax.analysis.measures import spectrum
from lorax.analysis.tables.matrices import (
    SVDs,
    by_matrix,
    identity,
    layer_and_target,
    shape_of,
    stacked,
    stacks,
)
from lorax.interop.peft import Factors


def spectra(
    found: Mapping[Hashable, Mapping[str, Factors]],
    dense: Mapping[Hashable, Mapping[str, np.ndarray]] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectra of all updates, and the ranks read off them.

    found: factors of members by path. dense: updates (in, out) of those that have no factors; all
    their singular values are found, of every size, as a rank needs the small ones too.
    Returns two tables: (member, path, layer, target, index from 1, sigma), and (member, path,
    layer, target, rank, norm = ||dW||_F, effective, stable, energy90, numerical).
    """
    every = by_matrix(found, dense)
    values = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        update = stacked([every[key] for key in keys])
        if isinstance(update, tuple):
            sigma = spectrum.factor_svd(*update)[1]
        else:
            sigma = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        values |= dict(zip(keys, sigma, strict=True))
    sigmas, ranks = [], []
    for key in every:
        row, shape, sigma = identity(*key), shape_of(every[key]), values[key]
        sigmas += [{**row, "index": i, "sigma": x} for i, x in enumerate(sigma, 1)]
        width = shape[2] if len(shape) == 3 else min(shape)
        ranks.append({**row, "rank": width, **_ranks(sigma, shape[:2])})
    return pd.DataFrame(sigmas), pd.DataFrame(ranks)


def base_svds(
    kernels: Mapping[str, np.ndarray], paths: Iterable[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{path: (u (in, k), sigma (k,), vt (k, out))}, k = min(in, out): the thin SVD of each kernel.

    It is most of the work of all that compares updates with W: find it once, hand it to each.

    Args:
      paths: which of the kernels; all without it.
    """
    chosen = list(kernels) if paths is None else list(dict.fromkeys(paths))
    found = {}
    for keys in stacks({path: kernels[path].shape for path in chosen}):
        stack = np.stack([np.asarray(kernels[path], np.float64) for path in keys])
        svd = np.linalg.svd(stack, full_matrices=False)
        found |= dict(zip(keys, zip(*svd, strict=True), strict=True))
    return {path: found[path] for path in chosen}


def base_spectra(
    kernels: Mapping[str, np.ndarray], svds: SVDs | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The spectrum of W itself, and what rank it lacks.

    Returns two tables: (path, layer, target, index from 1, sigma), and (path, layer, target, rows,
    columns, norm = ||W||_F, effective, stable, energy90, numerical, deficiency = min(rows,
    columns) - numerical).

    Args:
      svds: of `base_svds`; without it only singular values are computed.
    """
    sigmas, ranks = [], []
    for path, w in kernels.items():
        if svds is not None and path in svds:
            sigma = svds[path][1]
        else:
            sigma = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
        layer, target = layer_and_target(path)
        row = {"path": path, "layer": layer, "target": target}
        sigmas += [{**row, "index": i, "sigma": x} for i, x in enumerate(sigma, 1)]
        of = _ranks(sigma, w.shape)
        lacks = min(w.shape) - of["numerical"]
        ranks.append({**row, "rows": w.shape[0], "columns": w.shape[1], **of, "deficiency": lacks})
    return pd.DataFrame(sigmas), pd.DataFrame(ranks)


def _ranks(sigma: np.ndarray, shape: tuple[int, int]) -> dict[str, float | int]:
    return {
        "norm": float(np.linalg.norm(sigma)),
        "effective": float(spectrum.effective_rank(sigma)),
        "stable": float(spectrum.stable_rank(sigma)),
        "energy90": int(spectrum.energy_rank(sigma, 0.9)),
        "numerical": int(spectrum.numerical_rank(sigma, shape)),
    }
