"""Directions of updates, and how many of them two members share."""

import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

from lorax import spectrum
from lorax.analysis.measures import overlap
from lorax.analysis.tables.matrices import (
    SVDs,
    Updates,
    by_matrix,
    layer_and_target,
    shape_of,
    stacked,
    stacks,
)
from lorax.interop.adapter import Factors, shapes_of

KINDS = ("A", "B", "dW in", "dW out")  # whose directions a subspace similarity compares
EXACT = 512  # dense updates with more rows and columns don't get a full SVD
LEADING = 64  # directions of a dense update that are analysed
Bases = dict[str, dict[str, np.ndarray]]  # orthonormal columns, by path and kind


def update_svds(updates: Mapping[Hashable, Updates]) -> dict[Hashable, SVDs]:
    """{member: {path: (u (in, k), sigma (k,), vt (k, out))}}, k = min(r, in, out): the thin SVD of
    every update with factors. Compute it once for all functions that need it."""
    flat = by_matrix(updates)
    shapes = {key: shape_of(x) for key, x in flat.items() if isinstance(x, Factors)}
    found: dict[Hashable, SVDs] = {member: {} for member in updates}
    for keys in stacks(shapes):
        svd = spectrum.factor_svd(*stacked([flat[key] for key in keys]))
        for (member, path), parts in zip(keys, zip(*svd, strict=True), strict=True):
            found[member][path] = parts
    return found


def bases(updates: Updates, k: int = LEADING, svds: SVDs | None = None) -> Bases:
    """Orthonormal directions by path and kind: of A, of B, and of dW on its input and output side.
    For dense updates only those of dW, the leading k (`leading` has their errors).

    Args:
      svds: those of the updates from `update_svds`, if already computed.
    """
    updates = dict(updates)  # each is read once
    svds = update_svds({0: updates})[0] if svds is None else svds
    directions = update_bases(updates, k, svds)
    for paths in stacks({path: shape_of(updates[path]) for path in svds if path in updates}):
        a, b, _ = stacked([updates[path] for path in paths])
        u, vt = (np.stack([svds[path][side] for path in paths]) for side in (0, 2))
        of_a = _of_factor(a, u)
        of_b = _of_factor(np.swapaxes(b, -1, -2), np.swapaxes(vt, -1, -2))
        for path, *kinds in zip(paths, of_a, of_b, strict=True):
            directions[path] = dict(zip(KINDS[:2], kinds, strict=True)) | directions[path]
    return directions


def _of_factor(a: np.ndarray, u: np.ndarray) -> np.ndarray:
    """`overlap.directions` of a factor a (..., n, r), from the directions u (..., n, k) of its dW:
    if k = r, they span what a's columns do, so an SVD of r x r is enough."""
    if u.shape[-1] < a.shape[-1]:
        return overlap.directions(a)
    inner, sigma, _ = np.linalg.svd(np.swapaxes(u, -1, -2) @ a)
    return spectrum.existing(u @ inner, sigma, a.shape[-2:])


def update_bases(updates: Updates, k: int, svds: SVDs) -> Bases:
    """The directions of dW alone in the form of `bases`, whose arguments these are."""
    directions: Bases = {}
    for path, (u, sigma, vt) in ((path, svds[path]) for path in updates if path in svds):
        sides = (spectrum.existing(x, sigma, (len(u), vt.shape[1])) for x in (u, vt.T))
        directions[path] = dict(zip(KINDS[2:], sides, strict=True))
    directions |= leading({path: u for path, u in updates.items() if path not in svds}, k)[0]
    return {path: directions[path] for path in updates}


def leading(dense: Mapping[str, np.ndarray], k: int = LEADING) -> tuple[Bases, pd.DataFrame]:
    """The leading k directions of dense updates, in the form of `bases`, and a table of their
    errors.

    Matrices with up to EXACT rows or columns have exact directions, larger ones those of
    `randomised_svd`. The table has (path, layer, target, k, randomised, energy, error, bound).
    energy is the share of ||dW||_F^2 in the k directions. error is the largest of ||dW v - sigma
    u|| and ||dW^T u - sigma v||, relative to sigma_1: dW has a singular value this close to each
    sigma. bound is how far, relative to sigma_1, the ith singular value of dW can be above its
    sigma at most (`randomised_svd`'s upper: a worst case, large if the rest of the spectrum is
    flat). Both are 0 up to rounding if the directions are exact.

    Args:
      dense: {path: dW (in, out)}.
      k: how many directions; a matrix with fewer rows or columns has as many as these.
    """
    svds = {}
    small = {path: dw for path, dw in dense.items() if min(dw.shape) <= EXACT}
    for paths in stacks({path: dw.shape for path, dw in small.items()}):
        stack = np.stack([dense[path] for path in paths])
        u, sigma, vt = spectrum.leading_svd(stack, min(k, *stack.shape[1:]))
        svds |= dict(zip(paths, zip(u, sigma, vt, sigma, strict=True), strict=True))
    for path, dw in dense.items():
        if path not in small:
            svds[path] = spectrum.randomised_svd(dw, min(k, *dw.shape), iterations=8)[:4]
    kinds: Bases = {}
    rows = []
    for path in dense:
        (u, sigma, vt, upper), dw = svds[path], np.asarray(dense[path], np.float64)
        # Divide by 1 if there is no update: then there is no error.
        first, energy = sigma[0] or 1.0, np.sum(dw**2) or 1.0
        right = np.linalg.norm(dw @ vt.T - u * sigma, axis=0)
        left = np.linalg.norm(u.T @ dw - sigma[:, None] * vt, axis=1)
        layer, target = layer_and_target(path)
        row = {"path": path, "layer": layer, "target": target, "k": len(sigma)}
        row |= {"randomised": path not in small, "energy": float(np.sum(sigma**2) / energy)}
        row |= {"error": float(np.maximum(left, right).max() / first)}
        rows.append({**row, "bound": float(np.max(upper - sigma) / first)})
        existing = spectrum.existing(u, sigma, dw.shape), spectrum.existing(vt.T, sigma, dw.shape)
        kinds[path] = dict(zip(KINDS[2:], existing, strict=True))
    return kinds, pd.DataFrame(rows)


def similarity(pairs: Sequence[tuple[Bases, Bases]]) -> dict[str, dict[str, np.ndarray]]:
    """phi (r1, r2) by path and kind, averaged over pairs of `bases`. Includes the paths and kinds
    that all pairs have (dense updates have no A and B). If pairs differ in r, the smallest is used:
    phi(i, j) doesn't depend on the columns after i and j.

    Raises ValueError that names the path if the bases are in different spaces.
    """
    firsts, seconds = ({id(pair[side]): pair[side] for pair in pairs} for side in (0, 1))
    rows, columns = ({key: n for n, key in enumerate(of)} for of in (firsts, seconds))
    counts = np.zeros((len(firsts), len(seconds)))
    for u, v in pairs:
        counts[rows[id(u)], columns[id(v)]] += 1
    means: dict[str, dict[str, np.ndarray]] = {}
    every = [*firsts.values(), *seconds.values()]
    for path in every[0]:
        for kind in KINDS:
            if all(kind in of.get(path, ()) for of in every):
                sides = ([of[path][kind] for of in side.values()] for side in (firsts, seconds))
                means.setdefault(path, {})[kind] = _mean(f"{path}, {kind}", *sides, counts)
    return means


def _mean(
    name: str, firsts: Sequence[np.ndarray], seconds: Sequence[np.ndarray], counts: np.ndarray
) -> np.ndarray:
    """The mean of phi over pairs, which occur so often as counts (firsts, seconds) says. All pairs
    of a first matrix are compared in one product."""
    _same_space(name, *firsts, *seconds)
    r1, r2 = (min(of.shape[1] for of in side) for side in (firsts, seconds))
    seconds = np.stack([of[:, :r2] for of in seconds])
    total = np.zeros((r1, r2))
    for first, weights in zip(firsts, counts, strict=True):
        some = np.flatnonzero(weights)
        phi = overlap.basis_similarity(first[:, :r1], seconds[some])
        total += np.tensordot(weights[some], phi, 1)
    return total / counts.sum()


def _same_space(name: str, *bases: np.ndarray) -> None:
    """Raises ValueError if directions (n, r) are in spaces of different dimensions n."""
    sizes = list(dict.fromkeys(map(len, bases)))
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: directions in spaces of {sizes[0]} and {sizes[1]} dimensions; only models of "
            "one width can be compared"
        )


def pairwise(
    updates: Mapping[Hashable, Updates],
) -> dict[tuple[Hashable, Hashable], dict[str, dict[str, np.ndarray]]]:
    """{(member, another): `similarity` of the two} for every two members, of the matrices that both
    have in one shape; {} for two without any. One stack of matrices is in memory at a time."""
    shapes = {member: shapes_of(by_path) for member, by_path in updates.items()}
    sizes = {path: shape for of_member in shapes.values() for path, shape in of_member.items()}
    found = {pair: {} for pair in itertools.combinations(updates, 2)}
    for stack in stacks(sizes):
        of_stack = {
            member: bases({path: updates[member][path] for path in stack if path in shapes[member]})
            for member in shapes
        }
        for pair, phi in found.items():
            first, second = (shapes[member] for member in pair)
            both = [path for path in stack if path in first and path in second]
            same = [path for path in both if first[path][:2] == second[path][:2]]
            sides = [{path: of_stack[member][path] for path in same} for member in pair]
            phi |= similarity([tuple(sides)])
    return {
        pair: {path: phi[path] for path in shapes[pair[0]] if path in phi}
        for pair, phi in found.items()
    }


def angles(pairs: Sequence[tuple[Bases, Bases]], k: int | None = None) -> pd.DataFrame:
    """Principal angles between the updates of pairs of `bases`, in degrees, one row each.

    Columns: pair (its number), path, layer, target, kind, index (from 1, ascending angles),
    degrees (0: a common direction, 90: none). Paths and kinds as in `similarity`, but for each pair
    separately.

    Args:
      k: how many leading directions of each side to compare; by default all.
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
    """phi(i, j) of every matrix with that many directions: path, layer, target, value. phi: from
    `similarity` or `against_base`."""
    reach = {
        path: kinds[kind][i - 1, j - 1]
        for path, kinds in phi.items()
        if kind in kinds and kinds[kind].shape[0] >= i and kinds[kind].shape[1] >= j
    }
    rows = [(path, *layer_and_target(path), value) for path, value in reach.items()]
    return pd.DataFrame(rows, columns=["path", "layer", "target", "value"])


def _over_pairs(pairs, compare) -> dict[tuple[str, str, int], np.ndarray]:
    """compare(u1, u2) for every (path, kind, pair) that both sides have, in that order."""
    both, shapes = {}, {}
    paths = dict.fromkeys(path for u, v in pairs for path in u if path in v)
    for path in paths:
        for kind in KINDS:
            for n, (u, v) in enumerate(pairs):
                if kind in u.get(path, ()) and kind in v.get(path, ()):
                    first, second = u[path][kind], v[path][kind]
                    _same_space(f"{path}, {kind}", first, second)
                    both[path, kind, n] = first, second
                    shapes[path, kind, n] = (*first.shape, second.shape[1])
    compared = {}
    for keys in stacks(shapes):
        first, second = (np.stack([both[key][side] for key in keys]) for side in (0, 1))
        compared |= dict(zip(keys, compare(first, second), strict=True))
    return {key: compared[key] for key in both}
