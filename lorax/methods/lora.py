"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and close variants.

    y = x w + s dropout(x) a b        a (in, r), b (r, out), s = alpha / r  (section 4.1)

- rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): s = alpha / sqrt(r).
- DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): the columns of w + s a b are rescaled to
  trained lengths m (out,). Their current lengths n are constants for the gradient (section 4.3),
  computed from ||w||^2 + 2 s <a^T w, b> + s^2 <a^T a b, b> without a b. The bias is not scaled.
  With dropout, PEFT also uses the dropped-out x in (m / n - 1) x w, at the cost of a second
  product; here, as in LoRA, dropout is only on the input of `a`.
- LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): a keeps its initial values.
- frozen-b (Zhu et al. 2024, arXiv:2402.16842): b keeps its random values and a is trained,
  from zero: the transpose of LoRA-FA.
- LoRA+ (Hayou et al. 2024, arXiv:2402.12354): b learns `ratio` times as fast as a.

Where a start (`lorax.methods.starts`) has a product a0 b0 that is to be subtracted from the base,
the leaf computes x w + s (x a b - x a0 b0), and the base itself is unchanged.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import gather, leaves, ops, tree
from lorax.catalogue import TAKEN_OFF
from lorax.errors import nearest
from lorax.methods.arrays import Matrix, joined, key_for, matrices
from lorax.methods.contract import Method, State
from lorax.methods.starts import DRAWN, NEEDS, OF_A, STARTS, drawn
from lorax.methods.targets import Default, adapted_matrices, words_of

SCALINGS = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "fixed": lambda alpha, rank: alpha,
}


def lora(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    init: str = "kaiming",
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    ranks: Mapping | None = None,
) -> Method:
    """LoRA with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    rank: r >= 1, at most min(in, out) of every target. alpha, scaling: set the scale s.
    init: how a and b start, one of `lorax.methods.starts.DRAWN` or `STARTS`; those that read data
    need `evidence`. targets: see `lorax.methods.resolve`. layers: indices of
    the layers to adapt, None for all. dropout: rate in [0, 1) on the input of a.
    ranks: {path: rank, or nested lists of ranks over the layer axes}, 0 for matrices that are not
    adapted. It replaces `rank`, which then only sets s (as in PEFT after EVA has redistributed
    ranks); a target that it does not name is not adapted. `hp["widest"]` is the largest rank.
    Raises ValueError for a value out of range.
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, init=init, targets=words_of(targets))
    hp |= dict(layers=layers, dropout=dropout, ranks=ranks)
    hp |= dict(scale=_scale(hp), widest=rank)
    if ranks:
        hp["widest"] = max((int(np.max(r)) for r in ranks.values()), default=0)

    def start(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, r, trainable, constants = tree.flatten(params), pad or hp["widest"], {}, {}
        for m in matrices(params, _ranks(hp, params, sites), targets, key, rank):
            draw = _drawing(hp, m, flat[m.path], (evidence or {}).get(m.path, {}))
            trainable[m.path] = m.fill({"a": (m.n_in, r), "b": (r, m.n_out)}, draw)
            constants[m.path] = {"s": m.full(hp["scale"]), "dropout": m.full(dropout)}
            if init in TAKEN_OFF:
                a, b = trainable[m.path]["a"], trainable[m.path]["b"]
                taken = jnp.any(b != 0, axis=(-2, -1), keepdims=True)  # if not, a b is already zero
                constants[m.path] |= {"a0": jnp.where(taken, a, 0), "b0": b}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, _ranks(hp, params, sites))
        return sum(int(m.active.sum()) * (m.n_in + m.n_out) for m in adapted)

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers)

    return Method(
        "lora", hp, start, bind, delta, count, factors,
        adapts=adapts, width=hp["widest"], needs=NEEDS.get(init),
    )  # fmt: skip


def _scale(hp: dict) -> float:
    """The scale s. Raises ValueError for a hyperparameter out of range."""
    if hp["rank"] < 1:
        raise ValueError(f"method.rank: {hp['rank']} given, must be at least 1")
    if not 0 <= hp["dropout"] < 1:
        raise ValueError(f"method.dropout: {hp['dropout']} given, must be in [0, 1)")
    for field, known in (("scaling", SCALINGS), ("init", {**DRAWN, **STARTS})):
        if hp[field] not in known:
            raise ValueError(
                f"method.{field}: {hp[field]!r} is not one of {', '.join(known)}"
                f"{nearest(hp[field], known)}"
            )
    scale = SCALINGS[hp["scaling"]](hp["alpha"], hp["rank"])
    if hp["init"] in STARTS and scale <= 0:
        raise ValueError(
            f"method.alpha: {hp['alpha']} given, must be positive with init {hp['init']!r}"
        )
    return scale


def checked(**hp) -> dict:
    """Hyperparameters that another method shares with `lora`, checked as there, and the scale s if
    alpha is one of them. Raises ValueError for a value out of range."""
    own = lora(**hp).hp
    return {name: own[name] for name in (*hp, *(("scale",) if "alpha" in hp else ()))}


def _ranks(hp: dict, params, sites) -> dict:
    """{path: (Site, rank of each layer, 0 if it isn't adapted)} of the targets."""
    nominal = hp["rank"] if hp["ranks"] is None else None
    adapted = adapted_matrices(params, sites, hp["targets"], hp["layers"], nominal)
    if hp["ranks"] is None:
        return {path: (site, hp["rank"] * active) for path, (site, active) in adapted.items()}
    unknown = [path for path in hp["ranks"] if path not in adapted]
    if unknown:
        raise ValueError(f"method.ranks: {', '.join(unknown)} are not among method.targets")
    ranks = {}
    for m in matrices(params, adapted):
        r, most = np.asarray(hp["ranks"].get(m.path, 0)), min(m.n_in, m.n_out)
        if r.shape not in ((), m.axes) or r.dtype.kind != "i" or r.min() < 0 or r.max() > most:
            raise ValueError(
                f"method.ranks: {m.path}: {r.tolist()} given, should be integers from 0 to {most}, "
                f"one or {m.axes} of them"
            )
        ranks[m.path] = m.site, r * m.active
    return ranks


def _drawing(hp: dict, m: Matrix, leaf, evidence: Mapping) -> Callable:
    """The function (key, index) that draws a layer's a and b, for `Matrix.fill`.

    m: with each layer's rank as `active`. leaf: its kernel in the base. evidence: {kind: array over
    its layers} for initialisations that read data.
    """
    start = STARTS.get(hp["init"])
    if start is None:

        def draw(key, index):
            rank = int(m.active[index])
            return drawn(hp["init"], m.site.kind, key, m.n_in, m.n_out, rank)

        return draw
    kind = NEEDS.get(hp["init"])
    if kind not in (None, *evidence) and m.active.any():
        raise ValueError(
            f"method.init: {hp['init']!r} reads data: pass evidence with {kind!r} of {m.path}"
            + (
                ", its quantisation error"
                if kind == "residual"
                else f", lorax.methods.sensitivity.evidence(..., statistics=({kind!r},))"
            )
        )

    def draw(key, index):
        w = gather.matrix(leaf, m.site, index).astype(jnp.float32)
        seen = {name: gather.layer(value, index) for name, value in evidence.items()}
        a, b = start(key, w, int(m.active[index]), hp["scale"], seen)
        return {"a": a, "b": b}

    return draw


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `LowRank` leaf at every adapted path; dropout if a key is given."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        flat[path] = leaves.LowRank(flat[path], *_update(x), dropout_of(path, x, key))
    return tree.unflatten(flat)


def dropout_of(path: str, x: Mapping, key) -> leaves.Dropout | None:
    """Dropout at the rates x["dropout"] of a matrix's layers; None without a key."""
    if key is None:
        return None
    return leaves.Dropout(x["dropout"], jax.random.split(key_for(key, path), x["dropout"].shape))


def _update(x: Mapping) -> tuple:
    """(a, b, s) with s a b the update; twice as wide if a0 b0 is subtracted from the base."""
    if "a0" not in x:
        return x["a"], x["b"], x["s"]
    a = jnp.concatenate([x["a"], x["a0"].astype(x["a"].dtype)], axis=-1)
    b = jnp.concatenate([x["b"], -x["b0"].astype(x["b"].dtype)], axis=-2)
    return a, b, x["s"]


def factors(trainable, constants, params, sites=None):
    """{path: (a, b, s, m)} of the update s a b; m is None."""
    return {path: (*_update(x), None) for path, x in joined(trainable, constants).items()}


def delta(trainable, constants, params, sites=None):
    """{path: s a b in the kernel's shape}."""
    return products(factors(trainable, constants, params), params, sites)


def through(as_lora: Callable) -> tuple[Callable, Callable, Callable]:
    """(bind, delta, factors) of a method whose update is that of a LoRA.

    as_lora(trainable, constants, params, sites) -> the tree of that LoRA: a, b, s and dropout.
    """

    def bind_lora(trainable, constants, params, key=None, sites=None):
        return bind(as_lora(trainable, constants, params, sites), {}, params, key)

    def delta_of_lora(trainable, constants, params, sites=None):
        return delta(as_lora(trainable, constants, params, sites), {}, params, sites)

    def factors_of_lora(trainable, constants, params, sites=None):
        return factors(as_lora(trainable, constants, params, sites), {}, params)

    return bind_lora, delta_of_lora, factors_of_lora


def products(factors: dict, params, sites=None) -> dict:
    """{path: s a b in the kernel's shape, float32} of {path: (a, b, s, ...)}."""
    sites = sites or ops.sites_from_shapes(params)
    flat, updates = tree.flatten(params), {}
    for path, (a, b, s, *_) in factors.items():
        a, b, s = (x.astype(jnp.float32) for x in (a, b, s))
        dw = s[..., None, None] * jnp.matmul(a, b)
        updates[path] = sites[path].from_matrix(dw, flat[path].shape)
    return updates


# ---------------------------------------------------------------------------------------- variants


def rslora(**hp) -> Method:
    """rsLoRA: LoRA with s = alpha / sqrt(r), so that learning does not slow down with the rank.

    hp: the hyperparameters of `lora` except `scaling`.
    """
    return lora(**hp, scaling="rslora")


def dora(**hp) -> Method:
    """DoRA: LoRA whose columns have trained lengths m, (layers..., out); see the module's head.

    hp: the hyperparameters of `lora`.
    """
    method = lora(**hp)

    def init(key, params, sites=None, *args, **kwargs):
        sites = sites or ops.sites_from_shapes(params)
        state = method.init(key, params, sites, *args, **kwargs)
        flat, ranks = tree.flatten(params), _ranks(method.hp, params, sites)
        lengths, constants = {}, {}
        for path, x in joined(*state).items():
            squares = gather.by_layer(ops.column_squares, flat[path], sites[path])
            on = ranks[path][1] > 0 if path in ranks else np.zeros(x["s"].shape, bool)
            lengths[f"{path}/m"] = jnp.sqrt(squares)
            constants |= {f"{path}/squares": squares, f"{path}/on": jnp.asarray(on, jnp.float32)}
        return State(_with(state.trainable, lengths), _with(state.constants, constants))

    def bind_columns(trainable, constants, params, key=None, sites=None):
        sites = sites or ops.sites_from_shapes(params)
        flat = tree.flatten(bind(trainable, constants, params, key))
        for path, x in joined(trainable, constants).items():
            # "on" is 0 for the padding of a sweep.
            flat[path] = leaves.dora(flat[path], x["m"], sites[path], x["squares"], x["on"])
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        sites = sites or ops.sites_from_shapes(params)
        bound = tree.flatten(bind_columns(trainable, constants, params, sites=sites))
        flat = tree.flatten(params)
        updates = {}
        for path in joined(trainable):
            w, adapted = (ops.wide(leaves_[path], sites[path]) for leaves_ in (flat, bound))
            updates[path] = (adapted - w).astype(jnp.float32)
        return updates

    def count(params, sites=None):
        adapted = matrices(params, _ranks(method.hp, params, sites))
        lengths = sum(int((m.active > 0).sum()) * m.n_out for m in adapted)
        return method.count(params, sites) + lengths

    def factors_and_lengths(trainable, constants, params, sites=None):
        return {path: (*_update(x), x["m"]) for path, x in joined(trainable, constants).items()}

    return method._replace(
        init=init, bind=bind_columns, delta=delta, count=count, factors=factors_and_lengths
    )


def lora_fa(**hp) -> Method:
    """LoRA-FA: LoRA that trains only b. hp: the hyperparameters of `lora`.

    Raises ValueError for an `init` that starts a at zero, which would never change, and the
    method's `adapts` and `init` do for one that starts an embedding's a at zero.
    """
    method = lora(**hp)
    if method.hp["init"] == "init-b":
        raise ValueError(
            "method.init: 'init-b' given, but it starts a at zero, and lora-fa trains only b"
        )

    def adapts(params, sites=None):
        adapted = method.adapts(params, sites)
        for path, (site, _) in adapted.items():
            if site.kind == "embed" and method.hp["init"] in OF_A:
                raise ValueError(
                    f"method.targets: {path} is an embedding, whose a init {method.hp['init']!r} "
                    "starts at zero, and lora-fa trains only b; 'both' starts it with numbers"
                )
        return adapted

    def init(key, params, sites=None, *args, **kwargs):
        adapts(params, sites)
        return _freezing("a", method.init(key, params, sites, *args, **kwargs))

    def count(params, sites=None):
        adapted = matrices(params, _ranks(method.hp, params, sites))
        return sum(int(m.active.sum()) * m.n_out for m in adapted)

    return method._replace(init=init, count=count, adapts=adapts)


def frozen_b(**hp) -> Method:
    """LoRA that trains only a. hp: the hyperparameters of `lora`.

    kaiming, gaussian and orthonormal draw b as they draw a of the transposed matrix, and a starts
    at zero. Raises ValueError for an `init` that starts b at zero, which would never change.
    """
    method = lora(**hp)
    if method.hp["init"] == "eva":
        raise ValueError(
            "method.init: 'eva' given, but it starts b at zero, and frozen-b trains only a"
        )

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        state = _freezing("b", method.init(key, params, sites, targets, pad, evidence))
        if method.hp["init"] not in OF_A:
            return state
        start, b = DRAWN[method.hp["init"]], {}
        ranks, width = _ranks(method.hp, params, sites), pad or method.hp["widest"]
        for m in matrices(params, ranks, targets, key, method.hp["rank"]):

            def draw(key, index, m=m):
                return {"b": start(key, m.n_out, m.n_in, int(m.active[index]))["a"].T}

            b[f"{m.path}/b"] = m.fill({"b": (width, m.n_out)}, draw)["b"]
        return State(jax.tree.map(jnp.zeros_like, state.trainable), _with(state.constants, b))

    def count(params, sites=None):
        adapted = matrices(params, _ranks(method.hp, params, sites))
        return sum(int(m.active.sum()) * m.n_in for m in adapted)

    return method._replace(init=init, count=count)


def _freezing(name: str, state: State) -> State:
    """The state with the factors of that name among the constants."""
    flat = tree.flatten(state.trainable)
    frozen = {path: x for path, x in flat.items() if path.endswith(f"/{name}")}
    moving = {path: x for path, x in flat.items() if path not in frozen}
    return State(tree.unflatten(moving), _with(state.constants, frozen))


def lora_plus(ratio: float = 16.0, **hp) -> Method:
    """LoRA+: LoRA whose b has the learning rate `ratio` lr, also for weight decay.

    hp: the hyperparameters of `lora`.
    """
    if ratio <= 0:
        raise ValueError(f"method.ratio: {ratio} given, must be positive")
    method = lora(**hp)

    def init(*args, **kwargs):
        trainable, constants = method.init(*args, **kwargs)
        scales = {path: x["s"] for path, x in joined(constants).items()}
        ratios = {f"{path}/ratio": jnp.full_like(s, ratio) for path, s in scales.items()}
        return State(trainable, _with(constants, ratios))

    def optimizer(inner, constants, train):
        ratios = {path: x["ratio"] for path, x in joined(constants).items()}

        def faster(updates, params=None):
            flat = tree.flatten(updates)
            for path, ratio in ratios.items():
                flat[f"{path}/b"] = flat[f"{path}/b"] * ratio[..., None, None]
            return tree.unflatten(flat)

        return optax.chain(inner, optax.stateless(faster))

    return method._replace(init=init, optimizer=optimizer, hp=method.hp | {"ratio": ratio})


def _with(tree_: dict, added: Mapping) -> dict:
    """The tree with the leaves {path: leaf} of `added` as well."""
    return tree.unflatten(tree.flatten(tree_) | added)
