"""Directions of updates, and how much the updates of two members share them."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax.analysis.measures import overlap, spectrum
from lorax.analysis.tables.matrices import Updates, layer_and_target, shape_of, stacked, stacks
from lorax.interop.peft import Factors

KINDS = ("A", "B", "dW in", "dW out")  # whose directions a subspace similarity compares
EXACT = 512  # a dense update with more rows and columns is not decomposed as a whole
LEADING = 64  # directions of a dense update that are looked at
Bases = dict[str, dict[str, np.ndarray]]  # orthonormal columns, by path and kind


def bases(updates: Updates, k: int = LEADING) -> Bases:
    """Orthonormal directions by path and kind: of A, of B, and dW's own, input and output side. Of
    dense updates those of dW, the leading k of them (`leading` has their errors)."""
    found: Bases = {}
    factors = {path: update for path, update in updates.items() if isinstance(update, Factors)}
    for paths in stacks({path: shape_of(update) for path, update in factors.items()}):
        a, b, _ = stacked([factors[path] for path in paths])
        inputs, outputs = overlap.update_directions(a, b)
        own = overlap.directions(a), overlap.directions(np.swapaxes(b, -1, -2))
        for n, path in enumerate(paths):
            every = (*own, inputs, outputs)
            found[path] = {kind: u[n] for kind, u in zip(KINDS, every, strict=True)}
    found |= leading({path: u for path, u in updates.items() if path not in factors}, k)[0]
    return {path: found[path] for path in updates}


def leading(dense: Mapping[str, np.ndarray], k: int = LEADING) -> tuple[Bases, pd.DataFrame]:
    """The leading k directions of dense updates, as `bases` has them, and what is known of them.

    Up to EXACT rows or columns they are exact, above it `randomised_svd`'s. The table says which:
    (path, layer, target, k, randomised, energy, error, bound). energy is the share of ||dW||_F^2
    that lies in the k. error is the largest of ||dW v - sigma u|| and ||dW^T u - sigma v||, over
    sigma_1: dW has a singular value so near to each sigma. bound is how far above its sigma, over
    sigma_1, the ith value of dW can lie at most (`randomised_svd`'s upper; a worst case that the
    rest of a flat spectrum makes large). Both are 0 to rounding where the directions are exact.

    Args:
      dense: {path: dW (in, out)}.
      k: how many; a matrix with fewer rows or columns has all of its own.
    """
    found = {}
    small = {path: dw for path, dw in dense.items() if min(dw.shape) <= EXACT}
    for paths in stacks({path: dw.shape for path, dw in small.items()}):
        stack = np.stack([dense[path] for path in paths])
        u, sigma, vt = spectrum.leading_svd(stack, min(k, *stack.shape[1:]))
        found |= dict(zip(paths, zip(u, sigma, vt, sigma, strict=True), strict=True))
    for path, dw in dense.items():
        if path not in small:
            found[path] = spectrum.randomised_svd(dw, min(k, *dw.shape), iterations=8)[:4]
    kinds: Bases = {}
    rows = []
    for path in dense:
        (u, sigma, vt, upper), dw = found[path], np.asarray(dense[path], np.float64)
        # Over 1 where there is no update: nothing is off then.
        first, energy = sigma[0] or 1.0, np.sum(dw**2) or 1.0
        right = np.linalg.norm(dw @ vt.T - u * sigma, axis=0)
        left = np.linalg.norm(u.T @ dw - sigma[:, None] * vt, axis=1)
        layer, target = layer_and_target(path)
        row = {"path": path, "layer": layer, "target": target, "k": len(sigma)}
        row |= {"randomised": path not in small, "energy": float(np.sum(sigma**2) / energy)}
        row |= {"error": float(np.maximum(left, right).max() / first)}
        rows.append({**row, "bound": float(np.max(upper - sigma) / first)})
        exist = spectrum.existing(u, sigma, dw.shape), spectrum.existing(vt.T, sigma, dw.shape)
        kinds[path] = dict(zip(KINDS[2:], exist, strict=True))
    return kinds, pd.DataFrame(rows)


def similarity(pairs: Sequence[tuple[Bases, Bases]]) -> dict[str, dict[str, np.ndarray]]:
    """phi (r1, r2) by path and kind, averaged over pairs of `bases`: the paths that all have, and
    of each the kinds that all have (dense updates have no A and B). Where the pairs differ in r it
    is their smallest: phi(i, j) knows nothing of the columns after i and j.

    Raises ValueError that names the path where the two sides lie in different spaces.
    """
    sums: dict[tuple[str, str], np.ndarray] = {}
    counts: Counter = Counter()
    for pair in pairs:  # one at a time: phi of all of them at once is large
        for (path, kind, _), phi in _over_pairs([pair], overlap.basis_similarity).items():
            so_far = sums.get((path, kind), phi * 0)
            r1, r2 = np.minimum(so_far.shape, phi.shape)
            sums[path, kind] = so_far[:r1, :r2] + phi[:r1, :r2]
            counts[path, kind] += 1
    found: dict[str, dict[str, np.ndarray]] = {}
    for (path, kind), total in sums.items():
        if counts[path, kind] == len(pairs):
            found.setdefault(path, {})[kind] = total / len(pairs)
    return found


def angles(pairs: Sequence[tuple[Bases, Bases]], k: int | None = None) -> pd.DataFrame:
    """Principal angles between the updates of pairs of `bases`, in degrees: a row each.

    Columns: pair (its number), path, layer, target, kind, index (from 1, ascending angles),
    degrees (0: a direction in common, 90: none). Paths and kinds as in `similarity`, but of each
    pair by itself.

    Args:
      k: compares the first k directions of each; without it all of them.
    """
    first = lambda u, v: np.degrees(overlap.principal_angles(u[..., :k], v[..., :k]))
    rows = []
    for (path, kind, pair), degrees in _over_pairs(pairs, first).items():
        layer, target = layer_and_target(path)
        row = {"pair": pair, "path": path, "layer": layer, "target": target, "kind": kind}
        rows += [{**row, "index": i, "degrees": x} for i, x in enumerate(degrees, 1)]
    names = ["pair", "path", "layer", "target", "kind", "index", "degrees"]
    return pd.DataFrame(rows, columns=names).sort_values("pair", kind="stable", ignore_index=True)


def corners(
    phi: Mapping[str, Mapping[str, np.ndarray]], kind: str, i: int = 1, j: int = 1
) -> pd.DataFrame:
    """phi(i, j) of every matrix that goes so far: path, layer, target, value. phi: of
    `similarity` or `against_base`."""
    reach = {
        path: kinds[kind][i - 1, j - 1]
        for path, kinds in phi.items()
        if kind in kinds and kinds[kind].shape[0] >= i and kinds[kind].shape[1] >= j
    }
    rows = [(path, *layer_and_target(path), value) for path, value in reach.items()]
    return pd.DataFrame(rows, columns=["path", "layer", "target", "value"])


def _over_pairs(pairs, compare) -> dict[tuple[str, str, int], np.ndarray]:
    """compare(u1, u2) of every (path, kind, pair) that both sides have, in that order."""
    both, shapes = {}, {}
    paths = dict.fromkeys(path for u, v in pairs for path in u if path in v)
    for path in paths:
        for kind in KINDS:
            for n, (u, v) in enumerate(pairs):
                if kind in u.get(path, ()) and kind in v.get(path, ()):
                    one, other = u[path][kind], v[path][kind]
                    if len(one) != len(other):
                        raise ValueError(
                            f"{path}, {kind}: directions in spaces of {len(one)} and {len(other)} "
                            "dimensions; models of one width can be compared"
                        )
                    both[path, kind, n] = one, other
                    shapes[path, kind, n] = (*one.shape, other.shape[1])
    found = {}
    for keys in stacks(shapes):
        one, other = (np.stack([both[key][side] for key in keys]) for side in (0, 1))
        found |= dict(zip(keys, compare(one, other), strict=True))
    return {key: found[key] for key in both}
