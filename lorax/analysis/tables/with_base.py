"""Updates compared with the base's kernels: directions, amplification, intruder dimensions."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from lorax.analysis.measures import intruders, overlap
from lorax.analysis.measures.amplification import Amplification, amplification
from lorax.analysis.tables.directions import (
    KINDS,
    LEADING,
    similarity,
    update_bases,
    update_svds,
)
from lorax.analysis.tables.matrices import (
    SVDs,
    Updates,
    by_matrix,
    identity,
    kernel_shape,
    shape_of,
    stacked,
    stacks,
    with_base,
)
from lorax.analysis.tables.singular_values import base_svds
from lorax.analysis.tables.statistics import singular_values
from lorax.interop.peft import Factors

EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # thresholds of an intruder's cosine


def against_base(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray],
    members: Iterable[Hashable],
    k: int = LEADING,
    svds: SVDs | None = None,
    delta_svds: Mapping[Hashable, SVDs] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """LoRA's figure 8: phi(i, j) between dW's i leading directions and W's j, mean over members.

    Returns {path: {"in": phi (r, min(in, out)), "out": phi, "in chance": ..., "out chance": ...}}
    for the paths that all members have. Chance is the mean for a uniformly random subspace instead
    of dW's: max(i, j) / n, with n the dimension of the space.

    Args:
      updates: {member: {path: Factors, or dW (in, out)}}.
      members: which members to use; if they differ in r, phi goes up to the smallest.
      k: how many leading directions of a dense update to use.
      svds, delta_svds: from `base_svds` and `update_svds`, if already computed.
    """
    chosen = {member: updates[member] for member in members}
    flat = by_matrix(chosen, kernels)
    svds = base_svds(kernels, (path for _, path in flat)) if svds is None else svds
    delta_svds = update_svds(chosen) if delta_svds is None else delta_svds
    pairs = []
    for member, of_member in chosen.items():
        sides = {path: (svds[path][0], svds[path][2].T) for path in of_member}
        of_w = {path: dict(zip(KINDS[2:], side, strict=True)) for path, side in sides.items()}
        pairs.append((update_bases(of_member, k, delta_svds[member]), of_w))
    result = {}
    for path, kinds in similarity(pairs).items():
        result[path] = {}
        for kind, phi in kinds.items():
            i, j = np.arange(1, phi.shape[0] + 1)[:, None], np.arange(1, phi.shape[1] + 1)
            side = kind.removeprefix("dW ")
            n = kernel_shape(kernels, path)[0 if side == "in" else 1]
            result[path][side] = phi
            result[path][f"{side} chance"] = overlap.expected_similarity(i, j, n)
    return result


def amplifications(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray],
    svds: SVDs | None = None,
    delta_svds: Mapping[Hashable, SVDs] | None = None,
) -> pd.DataFrame:
    """Table 7 for every update with factors, in as many directions as its rank.

    Columns: member, path, layer, target, rank, delta_norm, w_in_delta, w_in_w, w_in_random, factor,
    by_chance, over_chance. by_chance is the root mean square of ||U^T W V||_F over random U and V:
    rank ||W||_F / sqrt(in out). over_chance is w_in_delta / by_chance: unlike the factor, it does
    not grow with ||dW||.

    Args:
      kernels: the frozen (in, out) kernels by path. A KeyError names a missing path.
      svds, delta_svds: from `base_svds` and `update_svds`, if already computed.
    """
    factored = {
        member: {path: update for path, update in by_path.items() if isinstance(update, Factors)}
        for member, by_path in updates.items()
    }
    flat = by_matrix(factored, kernels)
    delta_svds = update_svds(factored) if delta_svds is None else delta_svds
    sigma = {path: svd[1] for path, svd in (svds or {}).items()}
    for path in dict.fromkeys(path for _, path in flat):
        if path not in sigma:
            sigma[path] = np.linalg.svd(np.asarray(kernels[path], np.float64), compute_uv=False)
    values = {}
    for keys in stacks({key: shape_of(update) for key, update in flat.items()}):
        *shape, rank = shape_of(flat[keys[0]])
        amplified = amplification(
            np.stack([kernels[path] for _, path in keys]),
            stacked([flat[key] for key in keys]),
            min(rank, *shape),
            w_sigma=np.stack([sigma[path] for _, path in keys]),
            delta_svd=[np.stack(x) for x in zip(*(delta_svds[m][p] for m, p in keys), strict=True)],
        )
        values |= dict(zip(keys, zip(*amplified, strict=True), strict=True))
    rows = []
    for key, update in flat.items():
        *shape, rank = shape_of(update)
        row = {**identity(*key), "rank": min(rank, *shape)}
        row |= dict(zip(Amplification._fields, map(float, values[key]), strict=True))
        row["by_chance"] = row["rank"] * np.linalg.norm(sigma[key[1]]) / np.sqrt(np.prod(shape))
        rows.append(row | {"over_chance": row["w_in_delta"] / (row["by_chance"] or np.nan)})
    return pd.DataFrame(rows)


def intruder_table(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray],
    k: Sequence[int] = (1, 10),
    epsilon: Sequence[float] = EPSILONS,
    *,
    side: str = "out",
    draws: int = 2,
    rng: int | np.random.Generator = 0,
    svds: SVDs | None = None,
    delta_svds: Mapping[Hashable, SVDs] | None = None,
) -> pd.DataFrame:
    """Intruder dimensions of every member and matrix, for every k and epsilon.

    Columns: member, path, layer, target, k, epsilon, intruders (how many of the k), control (the
    mean count for `norm_matched` random updates). A matrix with fewer than k directions has no row
    for that k. All counts come from one decomposition of W + dW and one for each control.

    Args:
      draws: how many controls; 0 for none (NaN).
      svds, delta_svds: from `base_svds` and `update_svds`, if already computed.
    """
    rng = np.random.default_rng(rng)
    flat = by_matrix(updates, kernels)
    svds = base_svds(kernels, (path for _, path in flat)) if svds is None else svds
    epsilon = np.asarray(epsilon, np.float64)
    counts = {}
    for keys in stacks({key: shape_of(update) for key, update in flat.items()}):
        update, w, w_svd = with_base(flat, kernels, svds, keys)
        ks = np.array([n for n in k if n <= min(w.shape[1:])], int)
        if not len(ks):
            continue
        counted = _counts(w, update, ks, epsilon, side, w_svd)  # (matrices, k's, epsilons)
        if draws:
            found = singular_values({key: flat[key] for key in keys}, delta_svds)
            sigma = np.stack([found[key] for key in keys])
        random = [
            _counts(w, intruders.norm_matched(rng, update, sigma), ks, epsilon, side, w_svd)
            for _ in range(draws)
        ]
        control = np.mean(random, axis=0) if draws else np.full(counted.shape, np.nan)
        for n, key in enumerate(keys):
            counts[key] = ks, counted[n], control[n]
    rows = []
    for key in (key for key in flat if key in counts):
        ks, counted, control = counts[key]
        for (i, j), count in np.ndenumerate(counted):
            row = {**identity(*key), "k": ks[i], "epsilon": epsilon[j]}
            rows.append({**row, "intruders": count, "control": control[i, j]})
    return pd.DataFrame(rows)


def _counts(w, update, ks, epsilon, side, w_svd) -> np.ndarray:
    """(..., k's, epsilons): intruders among the first k; one mask serves every k."""
    mask = intruders.intruders(w, update, ks.max(), epsilon, side=side, w_svd=w_svd).mask
    return np.swapaxes(np.cumsum(mask, -1)[..., ks - 1], -1, -2)
