"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scale
(Kalajdzievski 2023, arXiv:2312.03732).

    y = x w + s dropout(x) a b        a (in, r), b (r, out), s = alpha / r  (section 4.1)

s is alpha / sqrt(r) with scaling="rslora" and alpha itself with scaling="fixed". One of the two
factors starts at zero, so that an adapted model is its base at step 0. The paper draws A from a
Gaussian without giving its width; its released code, PEFT and this file's default use
`kaiming_uniform(sqrt 5)`, which is U(-1/sqrt(in), 1/sqrt(in)).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lorax import methods, ops, tree
from lorax.errors import nearest

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
    targets: tuple[str, ...] = ("q", "v"),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    full: tuple[str, ...] = (),
    dtype: str = "float32",
) -> "methods.Method":
    """LoRA with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    rank: r >= 1, at most min(in, out) of every target. alpha, scaling: give the scale s.
    init: "kaiming" or "gaussian", the start of `a`. targets: see `lorax.methods.resolve`.
    layers: indices of the layers to adapt, None for all. dropout: rate in [0, 1) on the input of a.
    full: parameters trained as they are beside the update (`lorax.methods.resolve_full`), such as a
    classifier's head; stored as path/w. dtype: of a, b and these.
    Raises ValueError for a value out of range.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    full = (full,) if isinstance(full, str) else tuple(full)
    if rank < 1:
        raise ValueError(f"method.rank: {rank} given, must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout: {dropout} given, must be in [0, 1)")
    dtypes = ("float32", "bfloat16")
    for field, value, known in (
        ("scaling", scaling, SCALINGS), ("init", init, INITS), ("dtype", dtype, dtypes)
    ):  # fmt: skip
        if value not in known:
            hint = nearest(value, known)
            raise ValueError(f"method.{field}: {value!r} is not one of {', '.join(known)}{hint}")
    scale = SCALINGS[scaling](alpha, rank)

    def own_targets(params, sites):
        """{path: (Site, active layers)} of what this method adapts, ranks checked."""
        sites = sites or ops.sites_from_shapes(params)
        chosen = methods.resolve(targets, sites)
        shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
        for path, site in chosen.items():
            _, n_in, n_out = site.matrix_shape(shapes[path])
            if rank > min(n_in, n_out):
                raise ValueError(
                    f"method.rank: {rank} given, but {path} is {n_in} x {n_out}: "
                    f"at most {min(n_in, n_out)}"
                )
        twice = [path for path in methods.resolve_full(full, params) if path in chosen]
        if twice:
            raise ValueError(f"method.full: {', '.join(twice)} are in method.targets as well")
        active = methods.active_layers(layers, chosen, shapes)
        return {path: (site, active[path]) for path, site in chosen.items()}

    def start(key, params, sites=None, targets=None, pad=None):
        own = own_targets(params, sites)
        flat = tree.flatten(params)
        pad_to = pad or rank
        trainable, constants = {}, {}
        for path, site in (targets or {path: site for path, (site, _) in own.items()}).items():
            axes, n_in, n_out = site.matrix_shape(flat[path].shape)
            a = np.zeros((*axes, n_in, pad_to), np.float32)
            b = np.zeros((*axes, pad_to, n_out), np.float32)
            if path in own:
                # Not a slice of one draw for all ranks: ranks of one seed would share the first
                # columns of `a`, and a similarity between their subspaces would start above chance.
                own_key = jax.random.fold_in(methods.key_for(key, path), rank)
                keys = jax.random.split(own_key, max(1, math.prod(axes)))
                for layer, layer_key in zip(np.ndindex(*axes), keys, strict=True):
                    if own[path][1][layer]:
                        if site.kind == "embed":  # as loralib and PEFT: the rows start at zero
                            b[layer][:rank] = jax.random.normal(layer_key, (rank, n_out))
                        else:
                            a[layer][:, :rank] = INITS[init](layer_key, n_in, rank)
            trainable[path] = {"a": jnp.asarray(a, dtype), "b": jnp.asarray(b, dtype)}
            constants[path] = {
                "s": jnp.full(axes, scale, jnp.float32),
                "dropout": jnp.full(axes, dropout, jnp.float32),
            }
        for path in methods.resolve_full(full, params):
            trainable[path] = {"w": flat[path].astype(dtype)}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        flat, total = tree.flatten(params), 0
        for path, (site, active) in own_targets(params, sites).items():
            _, n_in, n_out = site.matrix_shape(flat[path].shape)
            total += int(active.sum()) * rank * (n_in + n_out)
        return total + sum(flat[path].size for path in methods.resolve_full(full, params))

    hp = dict(rank=rank, alpha=alpha, scaling=scaling, init=init, targets=targets)
    hp |= dict(layers=layers, dropout=dropout, full=full, dtype=dtype)
    return methods.Method("lora", hp | {"scale": scale}, start, bind, delta, count)


def bind(trainable, constants, params, key=None):
    """`params` with a `LowRank` leaf at every adapted path; dropout where a key is given."""
    flat = tree.flatten(params)
    for path, factors in adapters(trainable, constants).items():
        if "w" in factors:
            flat[path] = factors["w"].astype(flat[path].dtype)
            continue
        how = None
        if key is not None:
            keys = jax.random.split(methods.key_for(key, path), factors["s"].shape)
            how = ops.Dropout(factors["dropout"], keys)
        flat[path] = ops.LowRank(flat[path], factors["a"], factors["b"], factors["s"], how)
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: s a b in the kernel's shape, or how far a parameter trained in full has moved}."""
    sites = sites or ops.sites_from_shapes(params)
    flat, found = tree.flatten(params), {}
    for path, factors in adapters(trainable, constants).items():
        f = {name: x.astype(jnp.float32) for name, x in factors.items()}
        if "w" in f:
            found[path] = f["w"] - flat[path].astype(jnp.float32)
        else:
            update = f["s"][..., None, None] * jnp.matmul(f["a"], f["b"])
            found[path] = sites[path].from_matrix(update, flat[path].shape)
    return found


def adapters(trainable, constants) -> dict[str, dict]:
    """{path: {"a", "b", "s", "dropout"} or {"w"}} of the two trees."""
    found: dict[str, dict] = {}
    for flat in (tree.flatten(trainable), tree.flatten(constants)):
        for path, leaf in flat.items():
            parent, name = path.rsplit("/", 1)
            found.setdefault(parent, {})[name] = leaf
    return found
