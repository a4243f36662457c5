"""Training in a random subspace: how many dimensions does a task need?

    theta = theta0 + P z            z (d,) trained from zero, P (D, d) random and frozen

is the direct intrinsic dimension (DID) of Li et al. 2018 (arXiv:1804.08838), and

    theta_i = theta0_i + lambda_i (P z)_i       one scale per layer or tensor i, starting at one

the structure-aware one (SAID) of Aghajanyan et al. 2020 (arXiv:2012.13255, section 3.1), whose m
scales count towards d: z has d - m entries. theta0 are parameters of the base, or the factors of a
LoRA. P is a function of a key, so only the key is stored; its columns have unit norm:

    dense       N(0, 1), each column divided by its norm
    sparse      each entry nonzero with probability 1 / sqrt(D) and then +1 or -1 (Li et al. 2006,
                "Very sparse random projections"), each column divided by its norm
    fastfood    the first D of the L = 2^k >= max(D, d) rows of H G Pi H B / sqrt(D sum g^2), with H
                the Walsh-Hadamard matrix, B random signs, Pi a permutation, G = diag(g), g from
                N(0, 1) (Le et al. 2013, arXiv:1408.3060); O(D log D) time, O(D) memory

With `granularity="tensor"` every tensor (in a stack, every layer's) has its own P with the same z,
as in the SAID authors' code; each P is scaled by sqrt(D_i / D), so that the joint columns have unit
norm again.

Departures. The columns for a smaller d are the first columns for a larger one. B z has d nonzero
entries, so H B z repeats after 2^ceil(log2 d) entries and only these are computed. Pi permutes
entries only within blocks of 2^14: every block gets the same uniform permutation, rotated by a
random offset (for L <= 2^14 there is one block, and Pi is uniform). Two properties of the authors'
code are not kept: tensors with L < d saw only the first L entries of z, and the gradient was not
P^T.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import ops, tree
from lorax.methods.arrays import key_for
from lorax.methods.contract import Method, State
from lorax.methods.full import full as full_fine_tuning
from lorax.methods.hadamard import at_least, hadamard
from lorax.methods.lora import lora
from lorax.methods.targets import Default, stack_depths, words_of

OWN = "subspace"  # path of z, the scales and the key in the trees
BLOCK = 1 << 14  # entries in a block of Pi
PROJECTIONS = ("fastfood", "sparse", "dense")
GRANULARITIES = ("global", "tensor")
SCALES = ("layer", "tensor")


def subspace(
    dim: int = 100,
    projection: str = "fastfood",
    granularity: str = "global",
    parameters: tuple[str, ...] = ("all",),
    layers: tuple[int, ...] | None = None,
    full: tuple[str, ...] = (),
) -> Method:
    """DID: the parameters that the words name move in a random subspace of dimension dim.

    projection: fastfood, sparse or dense. granularity: one P for all ("global") or one per
    "tensor". parameters, layers: see `lorax.methods.full.full`, which raises for them. full: words
    for additional parameters, which move in the subspace too.
    Raises ValueError for an unknown word and for a dim outside 1 to D.
    """
    inner, hp = _parameters(parameters, layers, full)
    return _within("subspace", inner, False, dim, projection, granularity, None, hp)


def said(
    dim: int = 100,
    projection: str = "fastfood",
    granularity: str = "global",
    scales: str = "layer",
    parameters: tuple[str, ...] = ("all",),
    layers: tuple[int, ...] | None = None,
    full: tuple[str, ...] = (),
) -> Method:
    """SAID: `subspace` with a trained scale per layer or tensor; dim includes the scales.

    scales: "layer", one per layer of a stack and per module outside of stacks; or "tensor".
    Raises ValueError as `subspace`, and if dim does not exceed the number of scales.
    """
    inner, hp = _parameters(parameters, layers, full)
    return _within("said", inner, False, dim, projection, granularity, scales, hp)


def lora_subspace(
    dim: int = 100,
    projection: str = "fastfood",
    granularity: str = "global",
    rank: int = 8,
    alpha: float = 16.0,
    scaling: str = "lora",
    init: str = "kaiming",
    targets: tuple[str, ...] = Default(("q", "v")),
) -> Method:
    """The factors of a LoRA move in a random subspace of dimension dim around their initial values.

    rank, alpha, scaling, init, targets: see `lorax.methods.lora.lora`, which raises for them.
    Raises ValueError as `subspace`; D is LoRA's number of parameters.
    """
    inner = lora(rank, alpha, scaling=scaling, init=init, targets=targets)
    if inner.hp["init"] not in ("kaiming", "gaussian"):
        raise ValueError(f"method.init: {init!r} given, lora-subspace has kaiming and gaussian")
    return _within("lora-subspace", inner, True, dim, projection, granularity, None, inner.hp)


def _parameters(parameters, layers, full) -> tuple[Method, dict]:
    """(full fine-tuning of what the words of both name, the hyperparameters)."""
    hp = dict(parameters=words_of(parameters), layers=layers, full=words_of(full))
    return full_fine_tuning((*hp["parameters"], *hp["full"]), layers), hp


# -------------------------------------------------------------------------------------- the method


def _within(name, inner, stored, dim, projection, granularity, scales, hp) -> Method:
    """The method whose trainable tree is theta0 + P z, where theta0 is the initial tree of `inner`.
    hp: further hyperparameters; the other arguments are as for `Space`."""
    space = Space(inner, stored, dim, projection, granularity, scales)
    space.check_words()

    def bind(trainable, constants, params, key=None, sites=None):
        return inner.bind(*space.moved(trainable, constants, params, sites), params, key, sites)

    def delta(trainable, constants, params, sites=None):
        return inner.delta(*space.moved(trainable, constants, params, sites), params, sites)

    def factors(trainable, constants, params, sites=None):
        return inner.factors(*space.moved(trainable, constants, params, sites), params, sites)

    hp = dict(dim=dim, projection=projection, granularity=granularity) | hp
    hp |= {"scales": scales} if scales else {}
    functions = space.init, bind, delta, space.count, inner.factors and factors
    # dW follows from z and the key, and is a thousand times larger.
    options = dict(expand=space.expand, width=dim, stores_delta=False)
    return Method(name, hp, *functions, **options)


class Space(NamedTuple):
    """A random subspace of the trainable tree theta of a method.

    inner: the method. stored: True if theta0 is random and stored in the constants, False if it is
    read from the base. dim, projection, granularity: as for `subspace`. scales: as for `said`, None
    for none.
    """

    inner: Method
    stored: bool
    dim: int
    projection: str
    granularity: str
    scales: str | None

    def check_words(self) -> None:
        """Raises ValueError for an unknown word and a dimension below 1."""
        known = {"projection": PROJECTIONS, "granularity": GRANULARITIES}
        known |= {"scales": SCALES} if self.scales is not None else {}
        for field, words in known.items():
            if (value := getattr(self, field)) not in words:
                raise ValueError(f"method.{field}: {value!r} is not one of {', '.join(words)}")
        if self.dim < 1:
            raise ValueError(f"method.dim: {self.dim} given, must be at least 1")

    def check_size(self, size: int, n_scales: int) -> None:
        """Raises ValueError for a dimension above `size` or not above the number of scales."""
        if self.dim > size:
            raise ValueError(f"method.dim: {self.dim} given, there are {size:,} parameters to move")
        if self.dim <= n_scales:
            raise ValueError(
                f"method.dim: {self.dim} given, of which {n_scales} would be scales; must be larger"
            )

    def init(self, key, params, sites=None, targets=None, pad=None, evidence=None) -> State:
        theta, constants = self.inner.init(key, params, sites)
        parts = _parts(theta, params, sites, self.scales)
        n_scales = _scales(parts)
        self.check_size(_size(parts), n_scales)
        width = (pad or self.dim) - n_scales
        space = {"key": jax.random.key_data(key_for(key, OWN))}
        space |= {"active": (jnp.arange(width) < self.dim - n_scales).astype(jnp.float32)}
        space |= {"theta0": theta} if self.stored else {}
        trained = {"z": jnp.zeros(width, jnp.float32)}
        trained |= {"scale": jnp.ones(n_scales, jnp.float32)} if self.scales else {}
        return State({OWN: trained}, constants | {OWN: space})

    def theta0(self, constants, params, sites) -> dict:
        """The initial trainable tree of `inner`."""
        if self.stored:
            return constants[OWN]["theta0"]
        return self.inner.init(None, params, sites).trainable

    def expand(self, constants, params, sites=None) -> dict:
        """The constants plus the random numbers of P, which are drawn from the key."""
        parts = _parts(self.theta0(constants, params, sites), params, sites, self.scales)
        space = constants[OWN]
        key, d = jax.random.wrap_key_data(space["key"]), space["active"].shape[-1]
        drawn = draw(key, parts, self.projection, self.granularity, d)
        return constants | {OWN: space | {"drawn": drawn}}

    def moved(self, trainable, constants, params, sites) -> tuple[dict, dict]:
        """(theta0 + P z, the constants of the inner method)."""
        if "drawn" not in constants[OWN]:
            constants = self.expand(constants, params, sites)
        space, rest = constants[OWN], {k: v for k, v in constants.items() if k != OWN}
        theta = self.theta0(constants, params, sites)
        parts = _parts(theta, params, sites, self.scales)
        wide = np.promote_types(trainable[OWN]["z"].dtype, np.float32)
        z = trainable[OWN]["z"].astype(wide) * space["active"].astype(wide)
        real = lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x
        drawn = jax.tree.map(real, space["drawn"])
        steps = project(z, drawn, parts, self.projection, self.granularity)
        flat = tree.flatten(theta)
        for part, step in zip(parts, steps, strict=True):
            if self.scales:
                scale = trainable[OWN]["scale"].astype(wide)
                step = step * scale[np.array(part.scales), None]
            origin = flat[part.path].astype(wide)
            flat[part.path] = origin + step.reshape(origin.shape)
        return tree.unflatten(flat), rest

    def count(self, params, sites=None) -> int:
        n_scales = 0
        if self.scales:
            theta = jax.eval_shape(lambda p: self.inner.init(None, p, sites).trainable, params)
            n_scales = _scales(_parts(theta, params, sites, self.scales))
        self.check_size(self.inner.count(params, sites), n_scales)
        return self.dim


class Part(NamedTuple):
    """A leaf of theta: `count` tensors (the layers of a stack) of `size` entries, and the index of
    each one's scale."""

    path: str
    count: int
    size: int
    scales: tuple[int, ...]


def _parts(theta, params, sites, scales: str | None) -> list[Part]:
    stacks = stack_depths(params, sites or ops.sites_from_shapes(params))
    numbers: dict[tuple, int] = {}  # (module or tensor, layer) -> index of its scale
    parts = []
    for path, leaf in tree.flatten(theta).items():
        parameter = path.rpartition("/")[0]
        count = leaf.shape[0] if parameter in stacks else 1
        stack = parameter.partition("/")[0] if parameter in stacks else None
        module = stack or parameter.rpartition("/")[0]
        ids = [(path if scales == "tensor" else module, i) for i in range(count)]
        index = tuple(numbers.setdefault(i, len(numbers)) for i in ids) if scales else ()
        parts.append(Part(path, count, math.prod(leaf.shape) // count, index))
    return parts


def _size(parts: list[Part]) -> int:
    return sum(part.count * part.size for part in parts)


def _scales(parts: list[Part]) -> int:
    return 1 + max((i for part in parts for i in part.scales), default=-1)


# ---------------------------------------------------------------------------------- the projection


def draw(key, parts: list[Part], projection: str, granularity: str, d: int) -> list:
    """The random numbers of P, for `project`: one entry for all parts or one per part, with an axis
    for its tensors first. d: columns. The first columns do not depend on d."""
    if granularity == "global":
        return [jax.tree.map(lambda x: x[None], DRAW[projection](key, _size(parts), d))]
    drawn = []
    for part in parts:
        keys = jax.random.split(key_for(key, part.path), part.count)
        drawn.append(jax.vmap(lambda k, n=part.size: DRAW[projection](k, n, d))(keys))
    return drawn


def project(z, drawn: list, parts: list[Part], projection: str, granularity: str) -> list:
    """P z, cut into the parts: [(count, size)]. z: (d,) float32."""
    total = _size(parts)
    if granularity == "global":
        whole = APPLY[projection](z, jax.tree.map(lambda x: x[0], drawn[0]), total)
        ends = itertools.accumulate(part.count * part.size for part in parts[:-1])
        pieces = jnp.split(whole, list(ends))  # whose gradient is a concatenation
        return [x.reshape(p.count, p.size) for x, p in zip(pieces, parts, strict=True)]
    pieces = []
    for part, numbers in zip(parts, drawn, strict=True):
        each = jax.vmap(
            lambda tensor_numbers, n=part.size: APPLY[projection](z, tensor_numbers, n)
        )(numbers)
        pieces.append(each * math.sqrt(part.size / total))
    return pieces


def _draw_dense(key, n: int, d: int):
    columns = jax.random.normal(key, (d, n), jnp.float32)
    return columns / jnp.linalg.norm(columns, axis=1, keepdims=True)


def _apply_dense(z, columns, n: int):
    return z @ columns


def _draw_sparse(key, n: int, d: int):
    """Positions and values (d, most) of each column's nonzeros. Gaps between successes of Bernoulli
    trials are geometric, so no (n, d) array has to be drawn."""
    density = 1 / math.sqrt(n)
    mean, deviation = n * density, math.sqrt(n * density * (1 - density))
    most = min(n, math.ceil(mean + 6 * deviation + 6))
    gap_key, sign_key = jax.random.split(key)
    gaps = jax.random.geometric(gap_key, density, (d, most), jnp.int32)
    positions = jnp.cumsum(gaps, axis=1) - 1
    inside = positions < n
    counts = jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1).astype(jnp.float32)
    signs = jax.random.rademacher(sign_key, (d, most), jnp.float32)
    return positions, jnp.where(inside, signs, 0) / jnp.sqrt(counts)


def _apply_sparse(z, drawn, n: int):
    positions, values = drawn
    return jnp.zeros(n, z.dtype).at[positions].add(z[:, None] * values, mode="drop")


def _draw_fastfood(key, n: int, d: int):
    """Signs of B (d,), a block's permutation and every block's offset for Pi, g (L,)."""
    rows = at_least(max(n, d))
    block = min(rows, BLOCK)
    b, pi, turn, g = jax.random.split(key, 4)
    return {
        "signs": jax.random.rademacher(b, (d,), jnp.float32),
        "order": jax.random.permutation(pi, block),
        "offsets": jax.random.randint(turn, (rows // block,), 0, block),
        "g": jax.random.normal(g, (rows,), jnp.float32),
    }


def _apply_fastfood(z, drawn, n: int):
    g, order, offsets = drawn["g"], drawn["order"], drawn["offsets"]
    period, block = at_least(len(z)), len(order)
    repeated = hadamard(jnp.pad(z * drawn["signs"], (0, period - len(z))))  # H B z, its first part
    if period < block:
        repeated = jnp.tile(repeated, block // period)
    blocks = repeated.reshape(-1, block)[:, order]
    doubled = jnp.concatenate([blocks, blocks], axis=1)  # a rotated block is a slice of this
    which = jnp.arange(len(offsets)) % len(blocks)
    cut = lambda i, at: jax.lax.dynamic_slice(doubled, (i, at), (1, block))[0]
    permuted = jax.vmap(cut)(which, offsets).reshape(-1)
    rows = hadamard(g * permuted)[:n]
    return rows / jnp.sqrt(n * jnp.sum(g * g))


DRAW = {"dense": _draw_dense, "sparse": _draw_sparse, "fastfood": _draw_fastfood}
APPLY = {"dense": _apply_dense, "sparse": _apply_sparse, "fastfood": _apply_fastfood}
