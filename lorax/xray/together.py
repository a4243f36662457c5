"""Several files: the directions and the sums of the updates that they have of the same matrices."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from lorax.interop.adapter import Factors, Updates, shapes_of
from lorax.interop.formats import flux, image_names
from lorax.interop.formats.names import hugging_face
from lorax.xray.measured import WORKERS

if TYPE_CHECKING:
    from lorax.analysis.measures import sums  # which loads scipy


class Pair(NamedTuple):
    """Two files' updates of one matrix.

    cosine: of the two dW. chance: its standard deviation for random directions.
    phi_in, phi_out: phi(r1, r2) of all input and output directions, 0 to 1, and chance_in and
    chance_out their means for random directions.
    """

    layer: str
    first: str
    second: str
    inner: float
    norms: tuple[float, float]
    cosine: float
    chance: float
    phi_in: float
    chance_in: float
    phi_out: float
    chance_out: float


class Added(NamedTuple):
    """The updates of one matrix in several files, added: `sums.Sum` of the files in `names`."""

    layer: str
    names: tuple[str, ...]
    total: "sums.Sum"


def same_matrix(layer: str) -> str:
    """What is equal for one matrix in files of different formats: the name that diffusers or
    Hugging Face have for it, if it is known, without dots, slashes and a format's prefix."""
    known = flux.known(layer) or image_names.diffusers(layer) or hugging_face(layer)
    flat = re.sub(r"[./]", "_", known.removeprefix("transformer."))
    prefix = r"^(lora_|lycoris_|base_model_model_|unet_|diffusion_model_)+"
    return re.sub(prefix, "", flat)


def common(files: Mapping[str, Updates]) -> list[dict[str, str]]:
    """{name of a file: its layer} of every matrix that at least two files have in one shape."""
    matrices: dict[tuple, dict[str, str]] = {}
    for name, updates in files.items():
        for layer, shape in shapes_of(updates).items():
            matrices.setdefault((same_matrix(layer), *shape[:2]), {})[name] = layer
    return [found for found in matrices.values() if len(found) > 1]


def compare(
    files: Mapping[str, Updates], matrices: Sequence[dict[str, str]]
) -> Iterator[tuple[list[Pair], Added]]:
    """The pairs and the sum of every matrix of `common`, in its order, on all cores."""
    read = lambda matrix: {name: files[name][layer] for name, layer in matrix.items()}
    one = lambda matrix: _compare(next(iter(matrix.values())), read(matrix))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(one, matrices)


def _compare(layer: str, updates: dict[str, Factors | np.ndarray]) -> tuple[list[Pair], Added]:
    from lorax.analysis.measures import sums  # slow to import

    names = tuple(updates)
    found = [sums.directions(_as_delta(update)) for update in updates.values()]
    total = sums.summed(found)
    pairs = [
        _pair(layer, (names[i], names[j]), (found[i], found[j]), total.inner[[i, i, j], [i, j, j]])
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    return pairs, Added(layer, names, total)


def _as_delta(update: Factors | np.ndarray):
    return tuple(update[:3]) if isinstance(update, Factors) else update


def _pair(layer, names, found, inner) -> Pair:
    from lorax.analysis.measures import overlap  # slow to import

    first, second = found
    n_in, n_out = len(first.u), first.vt.shape[1]
    norms = float(inner[0]) ** 0.5, float(inner[2]) ** 0.5
    product = norms[0] * norms[1]
    phi, chance = {}, {}
    for side, one, two, n in (
        ("in", first.u, second.u, n_in),
        ("out", first.vt.T, second.vt.T, n_out),
    ):
        some = one.shape[1] and two.shape[1]
        phi[side] = float(overlap.basis_similarity(one, two)[-1, -1]) if some else np.nan
        chance[side] = max(one.shape[1], two.shape[1]) / n if some else np.nan
    cosine = float(inner[1]) / product if product else np.nan
    sides = phi["in"], chance["in"], phi["out"], chance["out"]
    return Pair(layer, *names, float(inner[1]), norms, cosine, (n_in * n_out) ** -0.5, *sides)


class Whole(NamedTuple):
    """A pair of files over all their common matrices: of the cosine and its chance those of all
    matrices as one vector, of the others means over matrices."""

    first: str
    second: str
    matrices: int
    cosine: float
    chance: float
    phi_in: float
    chance_in: float
    phi_out: float
    chance_out: float


def whole(pairs: Sequence[Pair]) -> list[Whole]:
    """A row for every pair of files."""
    files: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        files.setdefault((pair.first, pair.second), []).append(pair)
    rows = []
    for names, parts in files.items():
        inner = sum(part.inner for part in parts)
        norms = np.array([part.norms for part in parts])
        lengths = np.prod(np.linalg.norm(norms, axis=0))
        spread = np.linalg.norm(np.prod(norms, axis=1) * [part.chance for part in parts])
        cosines = (inner / lengths, spread / lengths) if lengths else (np.nan, np.nan)
        kinds = ("phi_in", "chance_in", "phi_out", "chance_out")
        defined = [part for part in parts if not np.isnan(part.phi_in)]
        means = (np.mean([getattr(x, kind) for x in defined]) if defined else np.nan
                 for kind in kinds)  # fmt: skip
        rows.append(Whole(*names, len(parts), *map(float, (*cosines, *means))))
    return rows


class InSum(NamedTuple):
    """A file in the sum of all files, over the matrices that it has in common with others. kept,
    disturbed, by_chance: as `sums` has them, of all matrices as one."""

    name: str
    matrices: int
    kept: float
    disturbed: float
    by_chance: float


def in_sum(added: Sequence[Added]) -> list[InSum]:
    """A row for every file."""
    rows = []
    for name in dict.fromkeys(name for one in added for name in one.names):
        squares, numbers = [], []
        for one in (one for one in added if name in one.names):
            i, total = one.names.index(name), one.total
            squares.append(total.inner[i, i])
            numbers.append((total.kept[i], total.disturbed[i] ** 2, total.by_chance[i] ** 2))
        weights = np.array(squares)
        moves = weights > 0
        if not moves.any():
            rows.append(InSum(name, len(squares), np.nan, np.nan, np.nan))
            continue
        means = weights[moves] @ np.array(numbers)[moves] / weights.sum()
        rows.append(InSum(name, len(squares), means[0], means[1] ** 0.5, means[2] ** 0.5))
    return rows
