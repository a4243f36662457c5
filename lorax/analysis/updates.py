"""What a run has learned, as tables: the updates of its members, taken apart.

Updates are {member: {path: Factors}}, and {member: {path: dW (in, out)}} of methods whose update
has no factors. A "member" is any name: members of several runs, or adapters from elsewhere, go
together as long as they call their layers by the same paths. kernels are the frozen (in, out)
weights by path. Matrices of one shape go through the array functions together, over layers and
members; `base_svds` decomposes each kernel once for all that asks for it. Small matrices want one
thread of the linear algebra (`threadpoolctl`): more of them only wait for each other.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import intruder, spectrum, subspace
from lorax.analysis.amplification import Amplification, amplification
from lorax.analysis.runs import Run
from lorax.interop.peft import Factors

KINDS = ("A", "B", "dW in", "dW out")  # whose directions a subspace similarity compares
EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # thresholds of an intruder's cosine
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXACT = 512  # a dense update with more rows and columns is not decomposed as a whole
LEADING = 64  # directions of a dense update that are looked at
TOGETHER = 2**22  # numbers in a stack of matrices: 32 MB in float64

Updates = Mapping[str, Factors] | Mapping[str, np.ndarray]  # of one member, by path
Bases = dict[str, dict[str, np.ndarray]]  # orthonormal columns, by path and kind
SVDs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # u, sigma, vt by path, thin


def adapters(
    run: Run, members: Iterable[int]
) -> tuple[dict[int, dict[str, Factors]], dict[int, str]]:
    """The factors of those members that have any, and for the others the reason."""
    found, missing = {}, {}
    for member in members:
        try:
            found[member] = run.adapter(member)
        except (FileNotFoundError, ValueError) as error:
            missing[member] = str(error)
    return found, missing


def deltas(run: Run, members: Iterable[int]) -> dict[int, dict[str, np.ndarray]]:
    """The dense updates of those members that have left one, for those without factors."""
    found = {}
    for member in members:
        try:
            found[member] = run.delta(member)
        except FileNotFoundError:
            continue
    return found


def sensitivity(run: Run) -> pd.DataFrame | None:
    """A row a member and matrix: what evidence said before training, and the rank it chose (member,
    path, layer, target, energy, share, score, rank). None where it chose nothing."""
    file = run.directory / "analysis" / "sensitivity.csv"
    if not file.exists():
        return None
    table = pd.read_csv(file)
    table[["layer", "target"]] = [place(path) for path in table["path"]]
    return table


def place(path: str) -> tuple[int, str]:
    """Layer and target of a path: "h/3/attn/q" -> (3, "q"), and of another library's module
    "encoder.layer.3.attention.query" -> (3, "query"); -1 for what is in no layer."""
    parts = re.split(r"[/.]", path)
    return next((int(part) for part in parts if part.isdecimal()), -1), parts[-1]


# ----------------------------------------------------------------------------------------- spectra


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
    every = _all(found, dense)
    values = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        update = _stacked([every[key] for key in keys])
        if isinstance(update, tuple):
            sigma = spectrum.factor_svd(*update)[1]
        else:
            sigma = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        values |= dict(zip(keys, sigma, strict=True))
    sigmas, ranks = [], []
    for key in every:
        row, shape, sigma = _key(*key), shape_of(every[key]), values[key]
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
        layer, target = place(path)
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


# --------------------------------------------------------------------------------------- directions


def bases(updates: Updates, k: int = LEADING) -> Bases:
    """Orthonormal directions by path and kind: of A, of B, and dW's own, input and output side. Of
    dense updates those of dW, the leading k of them (`leading` has their errors)."""
    found: Bases = {}
    factors = {path: update for path, update in updates.items() if isinstance(update, Factors)}
    for paths in stacks({path: shape_of(update) for path, update in factors.items()}):
        a, b, _ = _stacked([factors[path] for path in paths])
        inputs, outputs = subspace.update_directions(a, b)
        own = subspace.directions(a), subspace.directions(np.swapaxes(b, -1, -2))
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
        layer, target = place(path)
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
        for (path, kind, _), phi in _over_pairs([pair], subspace.basis_similarity).items():
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
    first = lambda u, v: np.degrees(subspace.principal_angles(u[..., :k], v[..., :k]))
    rows = []
    for (path, kind, pair), degrees in _over_pairs(pairs, first).items():
        layer, target = place(path)
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
    rows = [(path, *place(path), value) for path, value in reach.items()]
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


# ------------------------------------------------------------------------------------ with the base


def against_base(
    found: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray],
    members: Iterable[Hashable],
    k: int = LEADING,
    svds: SVDs | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """LoRA's figure 8: phi(i, j) between dW's i leading directions and W's j, mean over members.

    Returns {path: {"in": phi (r, min(in, out)), "out": phi, "in chance": ..., "out chance": ...}},
    of the paths that all members have; chance is the mean of a uniformly random subspace instead of
    dW's, max(i, j) / n with n the dimension of the space.

    Args:
      found: factors, or dense updates with their leading k directions.
      members: which of them; of the smallest r where they differ.
      svds: of `base_svds`, where it is at hand.
    """
    of = {member: found[member] for member in members}
    every = _all(of, None, kernels)
    svds = base_svds(kernels, (path for _, path in every)) if svds is None else svds
    pairs = []
    for updates in of.values():
        sides = {path: (svds[path][0], svds[path][2].T) for path in updates}
        own = {path: dict(zip(KINDS[2:], side, strict=True)) for path, side in sides.items()}
        pairs.append((bases(updates, k), own))
    result = {}
    for path, kinds in similarity(pairs).items():
        result[path] = {}
        for kind, phi in kinds.items():
            i, j = np.arange(1, phi.shape[0] + 1)[:, None], np.arange(1, phi.shape[1] + 1)
            side = kind.removeprefix("dW ")
            n = kernels[path].shape[0 if side == "in" else 1]
            result[path][side] = phi
            result[path][f"{side} chance"] = subspace.expected_similarity(i, j, n)
    return result


def amplifications(
    found: Mapping[Hashable, Mapping[str, Factors]],
    kernels: Mapping[str, np.ndarray],
    svds: SVDs | None = None,
) -> pd.DataFrame:
    """Table 7 for every member and matrix, with the adapter's own rank: member, path, layer,
    target, rank, delta_norm, w_in_delta, w_in_w, w_in_random, factor.

    Args:
      kernels: the frozen (in, out) kernels by path. KeyError names a path that is missing.
      svds: of `base_svds`, where it is at hand.
    """
    every = _all(found, None, kernels)
    sigma = {path: svd[1] for path, svd in (svds or {}).items()}
    for path in dict.fromkeys(path for _, path in every):
        if path not in sigma:
            sigma[path] = np.linalg.svd(np.asarray(kernels[path], np.float64), compute_uv=False)
    values = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        *shape, rank = shape_of(every[keys[0]])
        got = amplification(
            np.stack([kernels[path] for _, path in keys]),
            _stacked([every[key] for key in keys]),
            min(rank, *shape),
            w_sigma=np.stack([sigma[path] for _, path in keys]),
        )
        values |= dict(zip(keys, zip(*got, strict=True), strict=True))
    rows = []
    for key, update in every.items():
        *shape, rank = shape_of(update)
        rows.append(
            {**_key(*key), "rank": min(rank, *shape)}
            | dict(zip(Amplification._fields, map(float, values[key]), strict=True))
        )
    return pd.DataFrame(rows)


def intruder_table(
    found: Mapping[Hashable, Mapping[str, Factors]],
    dense: Mapping[Hashable, Mapping[str, np.ndarray]] | None,
    kernels: Mapping[str, np.ndarray],
    k: Sequence[int] = (1, 10),
    epsilon: Sequence[float] = EPSILONS,
    *,
    side: str = "out",
    draws: int = 2,
    rng: int | np.random.Generator = 0,
    svds: SVDs | None = None,
) -> pd.DataFrame:
    """Intruder dimensions (`intruder`) of every member and matrix, for every k and epsilon.

    Columns: member, path, layer, target, k, epsilon, intruders (a count of the k), control (the
    mean count of `norm_matched` random updates). A matrix with fewer than k directions has no row
    for that k. All counts come from one decomposition of W + dW, and one of each control's.

    Args:
      draws: how many controls; 0 for none (NaN).
      svds: of `base_svds`, where it is at hand.
    """
    rng = np.random.default_rng(rng)
    every = _all(found, dense, kernels)
    svds = base_svds(kernels, (path for _, path in every)) if svds is None else svds
    epsilon = np.asarray(epsilon, np.float64)
    counts = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        update, w, w_svd = _with_base(every, kernels, svds, keys)
        ks = np.array([n for n in k if n <= min(w.shape[1:])], int)
        if not len(ks):
            continue
        own = _counts(w, update, ks, epsilon, side, w_svd)  # (matrices, k's, epsilons)
        sigma = spectrum.update_svd(update)[1] if draws else None
        random = [
            _counts(w, intruder.norm_matched(rng, update, sigma), ks, epsilon, side, w_svd)
            for _ in range(draws)
        ]
        control = np.mean(random, axis=0) if draws else np.full(own.shape, np.nan)
        for n, key in enumerate(keys):
            counts[key] = ks, own[n], control[n]
    rows = []
    for key in (key for key in every if key in counts):
        ks, own, control = counts[key]
        for (i, j), count in np.ndenumerate(own):
            row = {**_key(*key), "k": ks[i], "epsilon": epsilon[j]}
            rows.append({**row, "intruders": count, "control": control[i, j]})
    return pd.DataFrame(rows)


def _counts(w, update, ks, epsilon, side, w_svd) -> np.ndarray:
    """(..., k's, epsilons): intruders among the first k, for every k from the one mask."""
    mask = intruder.intruders(w, update, ks.max(), epsilon, side=side, w_svd=w_svd).mask
    return np.swapaxes(np.cumsum(mask, -1)[..., ks - 1], -1, -2)


class Interventions(NamedTuple):
    """What scaling the top intruder of every matrix by lambda makes of the updates.

    Evaluate both with the model: what `changed` does and `shrunk` does not is the intruder's.
    """

    table: pd.DataFrame  # member, path, layer, target, lam, index (from 0; -1: no intruder, nothing
    # changes), before = ||dW||_F, norm (after), scale = norm / before
    changed: dict[float, dict[Hashable, dict]]  # {lambda: {member: {path: update}}}
    shrunk: dict[float, dict[Hashable, dict]]  # the control: scale * dW, of the same norm


def interventions(
    found: Mapping[Hashable, Mapping[str, Factors]],
    dense: Mapping[Hashable, Mapping[str, np.ndarray]] | None,
    kernels: Mapping[str, np.ndarray],
    lam: Sequence[float] = LAMBDAS,
    k: int = 10,
    epsilon: float = 0.5,
    *,
    side: str = "out",
    svds: SVDs | None = None,
) -> Interventions:
    """Shuttleworth et al.'s intervention (`intruder.intervene`) on every matrix, for every lambda.

    Updates keep their form: factors get one more column (and s = 1), dense ones stay dense. Each
    matrix has min(k, in, out) leading vectors looked through.

    Args:
      lam: 0 removes the intruder, 1 changes nothing, above 1 strengthens it.
      svds: of `base_svds`, where it is at hand.
    """
    every = _all(found, dense, kernels)
    svds = base_svds(kernels, (path for _, path in every)) if svds is None else svds
    lam = [float(x) for x in lam]
    done = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        update, w, w_svd = _with_base(every, kernels, svds, keys)
        most = min(k, *w.shape[1:])
        top = intruder.intruders(w, update, most, epsilon, side=side, w_svd=w_svd)
        swept = intruder.intervene(w, update, np.array(lam)[:, None], most, epsilon, found=top)
        if isinstance(update, tuple):
            before = np.linalg.norm(spectrum.factor_svd(*update)[1], axis=-1)
        else:
            before = np.linalg.norm(update, axis=(-2, -1))
        for n, key in enumerate(keys):
            done[key] = swept.index[n], before[n], *(x[:, n] for x in swept[1:])
    rows = []
    changed: dict[float, dict] = {x: {} for x in lam}
    shrunk: dict[float, dict] = {x: {} for x in lam}
    for (member, path), update in every.items():
        index, before, a, b, norm, scale = done[member, path]
        for n, x in enumerate(lam):
            row = {**_key(member, path), "lam": x, "index": int(index), "before": float(before)}
            rows.append({**row, "norm": float(norm[n]), "scale": float(scale[n])})
            changed[x].setdefault(member, {})[path] = _plus(update, a[n], b[n])
            shrunk[x].setdefault(member, {})[path] = _times(update, float(scale[n]))
    return Interventions(pd.DataFrame(rows), changed, shrunk)


def _plus(update, a: np.ndarray, b: np.ndarray):
    """dW + a @ b in the form of dW."""
    if isinstance(update, np.ndarray):
        return (update + a @ b).astype(update.dtype)
    wider = np.concatenate([update.s * update.a, a], axis=1).astype(np.float32)
    return update._replace(a=wider, b=np.concatenate([update.b, b]).astype(np.float32), s=1.0)


def _times(update, scale: float):
    if isinstance(update, np.ndarray):
        return (scale * update).astype(update.dtype)
    return update._replace(s=scale * update.s)


# ----------------------------------------------------------------------------------------- helpers


def _key(member: Hashable, path: str) -> dict:
    layer, target = place(path)
    return {"member": member, "path": path, "layer": layer, "target": target}


def stacks(shapes: Mapping[Hashable, tuple[int, ...]]) -> Iterator[list]:
    """Keys of one shape together, as many as make a stack of `TOGETHER` numbers.

    shapes: what has to be alike; its two largest numbers say how large a matrix is.
    """
    alike: dict[tuple[int, ...], list] = {}
    for key, shape in shapes.items():
        alike.setdefault(tuple(shape), []).append(key)
    for shape, keys in alike.items():
        most = max(1, TOGETHER // max(1, math.prod(sorted(shape)[-2:])))
        yield from (keys[n : n + most] for n in range(0, len(keys), most))


def shape_of(update: Factors | np.ndarray) -> tuple[int, ...]:
    """(in, out, r) of factors, (in, out) of a dense update."""
    if isinstance(update, Factors):
        return (update.a.shape[0], update.b.shape[1], update.a.shape[1])
    return update.shape


def _stacked(updates: Sequence):
    """Updates of one shape as what the array functions take: (a, b, s), or (..., in, out)."""
    if isinstance(updates[0], Factors):
        return tuple(np.stack([update[n] for update in updates]) for n in range(3))
    return np.stack(updates)


def _all(found: Mapping, dense: Mapping | None, kernels: Mapping | None = None) -> dict:
    """{(member, path): update}. KeyError or ValueError where the kernels do not fit them."""
    members = {**found, **(dense or {})}
    every = {
        (m, path): update for m, updates in members.items() for path, update in updates.items()
    }
    for (_, path), update in every.items() if kernels is not None else ():
        if path not in kernels:
            raise KeyError(f"{path}: adapted, but not among the base's kernels")
        shape = shape_of(update)[:2]
        if shape != kernels[path].shape:
            raise ValueError(f"{path}: an update of {shape}, but a kernel of {kernels[path].shape}")
    return every


def _with_base(every: dict, kernels: Mapping, svds: SVDs, keys: list) -> tuple:
    """Stacks of the updates of one shape, their kernels and the kernels' SVDs."""
    w = np.stack([np.asarray(kernels[path], np.float64) for _, path in keys])
    w_svd = tuple(np.stack([svds[path][n] for _, path in keys]) for n in range(3))
    return _stacked([every[key] for key in keys]), w, w_svd
