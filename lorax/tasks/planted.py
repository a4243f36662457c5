"""Planted tasks: regression onto a base changed by an update of known rank, so that estimates of
rank or of intrinsic dimension can be compared with the true value.

    teacher = base with w + dW* for every kernel w (in, out) of a linear layer
    dW* = u diag(sigma) v^T, of rank r*, |dW*|_F = strength |w|_F
    x = Q xi, xi ~ N(0, I_p), Q (n, p) orthonormal;  label = teacher(x) + noise

Rank. With isotropic inputs the excess loss of an update dW of one linear layer is |dW - dW*|_F^2
divided by the number of outputs, and its minimum at rank r is the energy of the singular values
after the r-th (Eckart & Young 1936): with a flat spectrum a share 1 - r / r*, and zero from r* on.

Dimension. Li et al. 2018 (arXiv:1804.08838, section 2) call d* the codimension of the set of
solutions: D = d_solution + d*. One linear layer with k outputs, on inputs that span p directions,
computes (Q^T w, bias): the loss depends on p k functionals of the kernel and k of the bias, all
with the same weight, and on nothing else. So d* = (p + 1) k where the bias is trained as well, as
in a random subspace of all parameters, and p k where it is not. (The paper's own example, 10 groups
of 100 parameters that must each add up to a given sum, is of this kind.)

Evaluation rows have no noise: their loss is the distance to the teacher.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import intercept, ops, tree
from lorax.errors import nearest
from lorax.models import Base
from lorax.tasks import kinds
from lorax.tasks.data import Data, arrays
from lorax.tasks.rows import check_n_train, count

#: singular values of a planted update of rank r, before it is scaled to its norm
SPECTRA = {
    "flat": lambda r: np.ones(r),
    "linear": lambda r: np.arange(r, 0, -1.0),
    "geometric": lambda r: 0.5 ** np.arange(r),
}
EVAL_ROWS = 1024


def load(config: Mapping[str, Any], base: Base) -> Data:
    """The task that `config` plants in `base`, a function of these two alone.

    config: `rank` (of every dW*, or a tuple with one for each kernel, 0 for none; None: full),
        `spectrum` (a key of `SPECTRA`), `strength` (|dW*|_F over |w|_F, > 0), `noise` (its standard
        deviation over that of teacher(x) - base(x), >= 0), `inputs` (the p that inputs span; None:
        all), `examples` (train rows), `n_train` (use only the first n of them), `seed` (of all
        random numbers: updates, inputs and noise have separate streams).
    base: any whose `input_shape` is set; only kernels of linear layers are changed.

    Rows: "inputs" (N, *input_shape), "label" (N, k), "weight" (N,), all float32. `Task.facts` has
    the truth: "planted" {layer: the r* singular values of its dW*}, "planted_dim" (d* of all
    parameters together; None for more than one layer, where the solutions are not a linear
    space).

    Raises ValueError that names the config field.
    """
    kernels = _kernels(base)
    ranks = _check(config, base, kernels)
    teacher, sigmas = _teacher(config, base, kernels, ranks)
    inputs, labels = _rows(config, base, teacher)
    n_train = check_n_train(config.get("n_train"), config["examples"])
    train = slice(EVAL_ROWS, EVAL_ROWS + n_train)  # the eval rows come first: they stay the same
    d = _dimension(base, inputs[train], labels.shape[1])
    facts = {
        "planted": sigmas,
        "planted_dim": d,
        "planted_rank": config["rank"],
        "spectrum": config["spectrum"],
        "noise": float(config["noise"]),
        "inputs": config["inputs"],
        "data_seed": config["seed"],
    }
    n = inputs.shape[1]
    p = n if config["inputs"] is None else config["inputs"]
    note = (
        f"an update of rank {', '.join(f'{r} in {name}' for name, r in ranks.items())} "
        f"({config['spectrum']} spectrum, {config['strength']:g} |w|) to be found; inputs span "
        f"{p} of {n} dimensions" + (f", so d* = {d}" if d else "") + f"; noise {config['noise']:g} "
        f"of what is planted; {count(n_train)} train rows, {count(EVAL_ROWS)} eval rows without "
        f"noise; seed {config['seed']}"
    )
    images = inputs.reshape(-1, *base.input_shape)
    data = arrays((images[train], labels[train]), (images[:EVAL_ROWS], labels[:EVAL_ROWS]))

    def build(*arguments, apart=False):
        task, words = data.build(*arguments, apart=apart), "; half of the eval rows are for test"
        return task._replace(note=note + words * apart, facts=facts)

    return data._replace(build=build)


def _stream(config, *words):
    """A random number generator for one kind of draw, which the others do not move."""
    return np.random.default_rng((config["seed"], *words))


def _teacher(config, base: Base, kernels: Mapping, ranks: Mapping) -> tuple[dict, dict]:
    """(parameters with the updates planted, {layer: singular values of its dW*})."""
    flat = tree.flatten(base.params)
    changed, sigmas = dict(flat), {}
    for path, site in _linear(base).items():
        matrix = np.array(site.to_matrix(ops.dense(flat[path], site)), np.float64)
        for name, index in base.layers_of(path).items():
            rng = _stream(config, 0, list(kernels).index(name))
            norm = config["strength"] * np.linalg.norm(matrix[index])
            sigma = singular_values(config["spectrum"], ranks[name], norm)
            matrix[index] += update(rng, kernels[name], sigma)
            sigmas[name] = [float(f"{x:.6g}") for x in sigma]
        # always float32: rounding to a smaller dtype would change the rank
        changed[path] = site.from_matrix(jnp.asarray(matrix, jnp.float32), flat[path].shape)
    return tree.unflatten(changed), sigmas


def _rows(config, base: Base, teacher: dict) -> tuple[np.ndarray, np.ndarray]:
    """(inputs (N, n), labels (N, k)), float32: the eval rows, which have no noise, come first."""
    n = int(np.prod(base.input_shape))
    p = n if config["inputs"] is None else config["inputs"]
    q = np.eye(n) if p == n else _orthonormal(_stream(config, 1), n, p)
    xi = _stream(config, 2).standard_normal((EVAL_ROWS + config["examples"], p))
    inputs = (xi @ q.T).astype(np.float32)
    images = inputs.reshape(-1, *base.input_shape)
    right = np.asarray(intercept.apply(base.module, teacher, images), np.float32)
    if right.ndim != 2:
        raise ValueError(
            f"base: {base.name} returns outputs of shape {right.shape}; task 'planted' needs (N, k)"
        )
    before = np.asarray(intercept.apply(base.module, base.params, images), np.float32)
    sigma = config["noise"] * float(np.std(right - before))
    noise = sigma * _stream(config, 3).standard_normal(right.shape)
    noise[:EVAL_ROWS] = 0
    return inputs, (right + noise).astype(np.float32)


def shapes(config, lead, seq_len, base):
    """Shapes of batches; see `Data`."""
    sizes = base.input_shape, (base.traits.outputs,)
    return kinds.array_shapes(lead, *(jax.ShapeDtypeStruct(size, np.float32) for size in sizes))


def singular_values(spectrum: str, rank: int, norm: float) -> np.ndarray:
    """(rank,) float64, descending, whose squares add up to norm^2."""
    sigma = SPECTRA[spectrum](rank)
    return norm * sigma / np.linalg.norm(sigma) if rank else np.zeros(0)


def update(rng: np.random.Generator, shape: tuple[int, int], sigma: np.ndarray) -> np.ndarray:
    """dW* (in, out) float64 = u diag(sigma) v^T, u and v random with orthonormal columns."""
    u, v = (_orthonormal(rng, size, len(sigma)) for size in shape)
    return (u * sigma) @ v.T


def _orthonormal(rng, n: int, r: int) -> np.ndarray:
    """(n, r) with orthonormal columns, uniformly distributed (up to signs of columns, which
    don't change their span)."""
    return np.linalg.qr(rng.standard_normal((n, r)))[0]


def _linear(base: Base) -> dict[str, ops.Site]:
    return {path: site for path, site in base.sites.items() if site.kind == "linear"}


def _kernels(base: Base) -> dict[str, tuple[int, int]]:
    """{layer: (in, out)} of the linear layers' kernels, in the order of their paths."""
    flat, sizes = tree.flatten(base.params), {}
    for path, site in _linear(base).items():
        size = site.matrix_shape(flat[path].shape)[1:]
        sizes |= dict.fromkeys(base.layers_of(path), size)
    return sizes


def _check(config, base: Base, kernels: dict[str, tuple[int, int]]) -> dict[str, int]:
    """{layer: planted rank}. Raises ValueError that names the field at fault."""

    def need(field, ok, right):
        if not ok:
            raise ValueError(f"task.{field}: {config[field]!r} given, {right}")

    whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
    if not kernels:
        raise ValueError(f"base: {base.name} has no linear layer to plant an update in")
    if base.input_shape is None:
        raise ValueError(
            f"base: {base.name} ({base.family}) reads no arrays; task 'planted' needs a base that "
            "does, such as random:mlp-64-64"
        )
    n = int(np.prod(base.input_shape))
    known = ", ".join(SPECTRA)
    hint = nearest(str(config["spectrum"]), SPECTRA)
    need("spectrum", config["spectrum"] in SPECTRA, f"must be one of {known}{hint}")
    need("strength", config["strength"] > 0, "must be positive")
    need("noise", config["noise"] >= 0, "must not be negative")
    need("examples", config["examples"] >= 1, "must be at least 1")
    need("seed", whole(config["seed"]) and config["seed"] >= 0, "must be an integer of at least 0")
    p = config["inputs"]
    need("inputs", p is None or 1 <= p <= n, f"must be 1 to {n}, the inputs of {base.name}")

    rank, sizes = config["rank"], "; ".join(f"{k} {i} x {o}" for k, (i, o) in kernels.items())
    if rank is None:
        return {name: min(size) for name, size in kernels.items()}
    several = isinstance(rank, tuple | list)
    need("rank", several or whole(rank), "must be an integer, a tuple of integers or None")
    ranks = tuple(rank) if several else (rank,) * len(kernels)
    if len(ranks) != len(kernels):
        need("rank", False, f"{base.name} has {len(kernels)} linear kernels: {sizes}")
    for r, size in zip(ranks, kernels.values(), strict=True):
        ok = whole(r) and (0 if several else 1) <= r <= min(size)
        need("rank", ok, f"must be {0 if several else 1} to min(in, out) of the kernels: {sizes}")
    need("rank", any(ranks), "at least one must be above 0: nothing is planted")
    return dict(zip(kernels, ranks, strict=True))


def _dimension(base: Base, inputs: np.ndarray, outputs: int) -> int | None:
    """d* of one linear layer and its bias: functionals per column of weights, times columns."""
    (path, site), *others = base.sites.items()
    if others or site.kind != "linear":
        return None
    bias = path.rsplit("/", 1)[0] + "/bias" in tree.flatten(base.params)
    seen = np.hstack([inputs, np.ones((len(inputs), int(bias)), np.float32)])
    return int(np.linalg.matrix_rank(seen)) * outputs
