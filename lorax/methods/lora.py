"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and what differs from it by a line.

    y = x w + s dropout(x) a b        a (in, r), b (r, out), s = alpha / r  (section 4.1)

- rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): s = alpha / sqrt(r).
- DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): the columns of w + s a b are brought to
  trained lengths m (out,). Their present lengths n are constants to the gradient (section 4.3), and
  come from ||w||^2 + 2 s <a^T w, b> + s^2 <a^T a b, b>: no a b is made. The bias is not scaled.
  With dropout PEFT gives (m / n - 1) x w the dropped-out x as well, at the price of a second
  product; here, as in LoRA, dropout is on the input of `a` alone.
- LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): a stays as drawn.
- LoRA+ (Hayou et al. 2024, arXiv:2402.12354): b learns `ratio` times as fast as a.

One of the two factors starts at zero, so that an adapted model is its base at step 0. The paper
draws A from a Gaussian without giving its width; its released code, PEFT and this file's default
use `kaiming_uniform(sqrt 5)`, which is U(-1/sqrt(in), 1/sqrt(in)). Starts that read the base or
data (`lorax.methods.starts`) begin with a0 b0 in the adapter and take it off the base: the leaf
computes x w + s (x a b - x a0 b0), the base itself stays as it is.
"""

import inspect
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import leaves, methods, ops, tree
from lorax.errors import nearest
from lorax.methods.starts import KEPT, NEEDS, STARTS
from lorax.methods.targets import Default, words_of

SCALINGS = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "fixed": lambda alpha, rank: alpha,
}


def _kaiming(key, n_in, rank):
    """`torch.nn.init.kaiming_uniform_(a=sqrt 5)` of the paper's (r, in) matrix, transposed."""
    bound = 1 / math.sqrt(n_in)
    return jax.random.uniform(key, (n_in, rank), jnp.float32, -bound, bound)


def _gaussian(key, n_in, rank):
    """PEFT's `init_lora_weights="gaussian"`: standard deviation 1 / r."""
    return jax.random.normal(key, (n_in, rank), jnp.float32) / rank


INITS = {"kaiming": _kaiming, "gaussian": _gaussian}


def lora(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    init: str = "kaiming",
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    ranks: Mapping | None = None,
) -> "methods.Method":
    """LoRA with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    rank: r >= 1, at most min(in, out) of every target. alpha, scaling: give the scale s.
    init: of `a`, "kaiming" or "gaussian", or one of `lorax.methods.starts.STARTS` of a and b; those
    that read data need `evidence`. targets: see `lorax.methods.resolve`. layers: indices of the
    layers to adapt, None for all. dropout: rate in [0, 1) on the input of a.
    ranks: {path: rank, or nested lists of ranks over the layer axes}, 0 where a matrix is not
    adapted, in place of `rank`, which then only gives s (as PEFT scales after EVA has redistributed
    ranks); a target that it does not name is not adapted. `hp["widest"]` is the largest, to pad to.
    Raises ValueError for a value out of range.
    """
    targets = words_of(targets)
    if rank < 1:
        raise ValueError(f"method.rank: {rank} given, must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout: {dropout} given, must be in [0, 1)")
    known_inits = {**INITS, **STARTS}
    for field, value, known in (("scaling", scaling, SCALINGS), ("init", init, known_inits)):
        if value not in known:
            hint = nearest(value, known)
            raise ValueError(f"method.{field}: {value!r} is not one of {', '.join(known)}{hint}")
    scale = SCALINGS[scaling](alpha, rank)
    if init in STARTS and scale <= 0:
        raise ValueError(f"method.alpha: {alpha} given, must be positive with init {init!r}")
    widest = max((int(np.max(r)) for r in ranks.values()), default=0) if ranks else rank
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, init=init, targets=targets)
    hp |= dict(layers=layers, dropout=dropout, ranks=ranks, scale=scale, widest=widest)

    def start(key, params, sites=None, targets=None, pad=None, evidence=None):
        own = _matrices(hp, params, sites)
        flat, trainable, constants = tree.flatten(params), {}, {}
        for path, site in (targets or {path: site for path, (site, _) in own.items()}).items():
            axes, n_in, n_out = site.matrix_shape(flat[path].shape)
            r = own[path][1] if path in own else np.zeros(axes, int)
            factors = _factors(hp, site, flat[path], r, path, (evidence or {}).get(path, {}))
            # Not a slice of one draw for all ranks: ranks of one seed would share the first
            # columns of `a`, and a similarity between their subspaces would start above chance.
            own_key = jax.random.fold_in(methods.key_for(key, path), rank)
            shapes = {"a": (n_in, pad or widest), "b": (pad or widest, n_out)}
            trainable[path] = methods.fill(own_key, axes, r > 0, shapes, factors)
            constants[path] = {
                "s": jnp.full(axes, scale, jnp.float32),
                "dropout": jnp.full(axes, dropout, jnp.float32),
            }
            if init in STARTS and init not in KEPT:
                a, b = trainable[path]["a"], trainable[path]["b"]
                off = jnp.any(b != 0, axis=(-2, -1), keepdims=True)  # else there is nothing to take
                constants[path] |= {"a0": jnp.where(off, a, 0), "b0": b}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        flat, total = tree.flatten(params), 0
        for path, (site, r) in _matrices(hp, params, sites).items():
            _, n_in, n_out = site.matrix_shape(flat[path].shape)
            total += int(r.sum()) * (n_in + n_out)
        return total

    return methods.Method(
        "lora", hp, start, bind, delta, count, factors,
        adapts=lambda params, sites=None: methods.adapted_matrices(params, sites, targets, layers),
        width=widest, needs=NEEDS.get(init),
    )  # fmt: skip


def _matrices(hp: dict, params, sites) -> dict:
    """{path: (Site, rank of each layer, 0 where none is adapted)} of the targets."""
    nominal = hp["rank"] if hp["ranks"] is None else None
    own = methods.adapted_matrices(params, sites, hp["targets"], hp["layers"], nominal)
    if hp["ranks"] is None:
        return {path: (site, hp["rank"] * on) for path, (site, on) in own.items()}
    flat, found = tree.flatten(params), {}
    unknown = [path for path in hp["ranks"] if path not in own]
    if unknown:
        raise ValueError(f"method.ranks: {', '.join(unknown)} are not among method.targets")
    for path, (site, on) in own.items():
        r = np.asarray(hp["ranks"].get(path, 0))
        most = min(site.matrix_shape(flat[path].shape)[1:])
        if r.shape not in ((), on.shape) or r.dtype.kind != "i" or r.min() < 0 or r.max() > most:
            raise ValueError(
                f"method.ranks: {path}: {r.tolist()} given, should be integers from 0 to {most}, "
                f"one or {on.shape} of them"
            )
        found[path] = site, r * on
    return found


def _factors(hp: dict, site, leaf, ranks, path: str, evidence) -> Callable:
    """The function of a layer's key and index that `methods.fill` asks for its a and b."""
    start = STARTS.get(hp["init"])
    if start is None:

        def draw(key, index):
            _, n_in, n_out = site.matrix_shape(leaf.shape)
            rank = int(ranks[index])
            if site.kind == "embed":  # as loralib and PEFT: the rows start at zero
                return {"b": jax.random.normal(key, (rank, n_out))}
            return {"a": INITS[hp["init"]](key, n_in, rank)}

        return draw
    kind = NEEDS.get(hp["init"])
    if kind not in (None, *evidence) and ranks.any():
        raise ValueError(
            f"method.init: {hp['init']!r} reads data: pass evidence with {kind!r} of {path}"
            + (
                ", what quantising took from it"
                if kind == "residual"
                else f", lorax.methods.sensitivity.evidence(..., statistics=({kind!r},))"
            )
        )
    w = site.to_matrix(ops.dense(leaf, site)).astype(jnp.float32) if ranks.any() else None

    def draw(key, index):
        own = {name: value[index] for name, value in evidence.items()}
        a, b = start(key, w[index], int(ranks[index]), hp["scale"], own)
        return {"a": a, "b": b}

    return draw


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `LowRank` leaf at every adapted path; dropout where a key is given."""
    flat = tree.flatten(params)
    for path, own in methods.joined(trainable, constants).items():
        how = None
        if key is not None:
            keys = jax.random.split(methods.key_for(key, path), own["s"].shape)
            how = leaves.Dropout(own["dropout"], keys)
        flat[path] = leaves.LowRank(flat[path], *_update(own), how)
    return tree.unflatten(flat)


def _update(own):
    """(a, b, s) with s a b the update; twice as wide where a start is taken off the base."""
    if "a0" not in own:
        return own["a"], own["b"], own["s"]
    a = jnp.concatenate([own["a"], own["a0"].astype(own["a"].dtype)], axis=-1)
    b = jnp.concatenate([own["b"], -own["b0"].astype(own["b"].dtype)], axis=-2)
    return a, b, own["s"]


def factors(trainable, constants, params, sites=None):
    """{path: (a, b, s, m)} of the update s a b; m is None."""
    own = methods.joined(trainable, constants)
    return {path: (*_update(f), None) for path, f in own.items()}


def delta(trainable, constants, params, sites=None):
    """{path: s a b in the kernel's shape}."""
    return products(factors(trainable, constants, params), params, sites)


def products(factors: dict, params, sites=None) -> dict:
    """{path: s a b in the kernel's shape, float32} of {path: (a, b, s, ...)}."""
    sites = sites or ops.sites_from_shapes(params)
    flat, found = tree.flatten(params), {}
    for path, (a, b, s, *_) in factors.items():
        a, b, s = (x.astype(jnp.float32) for x in (a, b, s))
        update = s[..., None, None] * jnp.matmul(a, b)
        found[path] = sites[path].from_matrix(update, flat[path].shape)
    return found


# ---------------------------------------------------------------------------------------- variants


def _variant(without: tuple[str, ...] = (), **more):
    """Give a variant as signature the hyperparameters of `lora`, those in `without` left out, and
    its own, {name: default}."""

    def give(variant):
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [inspect.Parameter(name, keyword, default=value) for name, value in more.items()]
        shared = [
            p.replace(kind=keyword)
            for name, p in inspect.signature(lora).parameters.items()
            if name not in (*more, *without)
        ]
        variant.__signature__ = inspect.Signature([*shared, *own])
        return variant

    return give


@_variant(without=("scaling",))
def rslora(**hp) -> "methods.Method":
    """rsLoRA: LoRA with s = alpha / sqrt(r), whose learning does not slow down with the rank."""
    return lora(**hp, scaling="rslora")


@_variant()
def dora(**hp) -> "methods.Method":
    """DoRA: LoRA whose columns have trained lengths m, (layers..., out); see the module's head."""
    method = lora(**hp)

    def init(key, params, sites=None, *args, **kwargs):
        sites = sites or ops.sites_from_shapes(params)
        state = method.init(key, params, sites, *args, **kwargs)
        flat = tree.flatten(params)
        ranks = _matrices(method.hp, params, sites)
        lengths, squares = {}, {}
        for path, own in methods.joined(*state).items():
            squares[f"{path}/squares"] = ops.column_squares(flat[path], sites[path])
            lengths[f"{path}/m"] = jnp.sqrt(squares[f"{path}/squares"])
            on = ranks[path][1] > 0 if path in ranks else np.zeros(own["s"].shape, bool)
            squares[f"{path}/on"] = jnp.asarray(on, jnp.float32)
        more = lambda tree_, leaves: tree.unflatten(tree.flatten(tree_) | leaves)
        return methods.State(more(state.trainable, lengths), more(state.constants, squares))

    def bind_columns(trainable, constants, params, key=None, sites=None):
        sites = sites or ops.sites_from_shapes(params)
        flat = tree.flatten(bind(trainable, constants, params, key))
        for path, own in methods.joined(trainable, constants).items():
            scaled = leaves.dora(flat[path], own["m"], sites[path], own["squares"])
            g = jnp.where(own["on"][..., None] > 0, scaled.g, 1)  # 1 where a sweep only pads
            flat[path] = leaves.Scaled(flat[path], g)
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        sites = sites or ops.sites_from_shapes(params)
        bound = tree.flatten(bind_columns(trainable, constants, params, sites=sites))
        flat = tree.flatten(params)
        wide = lambda leaf, path: ops.dense(leaf, sites[path]).astype(jnp.float32)
        return {p: wide(bound[p], p) - wide(flat[p], p) for p in methods.joined(trainable)}

    def count(params, sites=None):
        flat = tree.flatten(params)
        lengths = sum(
            int((ranks > 0).sum()) * site.matrix_shape(flat[path].shape)[2]
            for path, (site, ranks) in _matrices(method.hp, params, sites).items()
        )
        return method.count(params, sites) + lengths

    def factors_and_lengths(trainable, constants, params, sites=None):
        own = methods.joined(trainable, constants)
        return {path: (*_update(f), f["m"]) for path, f in own.items()}

    return method._replace(
        init=init, bind=bind_columns, delta=delta, count=count, factors=factors_and_lengths
    )


@_variant()
def lora_fa(**hp) -> "methods.Method":
    """LoRA-FA: LoRA that trains b alone."""
    method = lora(**hp)

    def init(*args, **kwargs):
        trainable, constants = (tree.flatten(t) for t in method.init(*args, **kwargs))
        fixed = {path: x for path, x in trainable.items() if path.endswith("/a")}
        moving = {path: x for path, x in trainable.items() if path not in fixed}
        return methods.State(tree.unflatten(moving), tree.unflatten(constants | fixed))

    def count(params, sites=None):
        flat = tree.flatten(params)
        return sum(
            int(ranks.sum()) * site.matrix_shape(flat[path].shape)[2]
            for path, (site, ranks) in _matrices(method.hp, params, sites).items()
        )

    return method._replace(init=init, count=count)


@_variant(ratio=16.0)
def lora_plus(ratio: float = 16.0, **hp) -> "methods.Method":
    """LoRA+: LoRA whose b has the learning rate `ratio` lr, weight decay included."""
    if ratio <= 0:
        raise ValueError(f"method.ratio: {ratio} given, must be positive")
    method = lora(**hp)

    def init(*args, **kwargs):
        trainable, constants = method.init(*args, **kwargs)
        flat = tree.flatten(constants)
        ratios = {
            path.removesuffix("s") + "ratio": jnp.full_like(s, ratio)
            for path, s in flat.items()
            if path.endswith("/s")
        }
        return methods.State(trainable, tree.unflatten(flat | ratios))

    def optimizer(inner, constants, train):
        ratios = {path: own["ratio"] for path, own in methods.joined(constants).items()}

        def faster(updates, params=None):
            flat = tree.flatten(updates)
            for path, ratio in ratios.items():
                flat[f"{path}/b"] = flat[f"{path}/b"] * ratio[..., None, None]
            return tree.unflatten(flat)

        return optax.chain(inner, optax.stateless(faster))

    return method._replace(init=init, optimizer=optimizer, hp=method.hp | {"ratio": ratio})
