"""VeRA: one random pair of factors for all matrices, scaled by trained vectors (Kopiczko et al.
2023, arXiv:2310.11454, section 3.1).

    y = x w + ((dropout(x) a) * d) b * v       a (in, r), b (r, out) frozen; d (r,), v (out,)

a and b are drawn once, as large as the largest input and output of all targets, and each matrix
takes their first rows and columns. As in PEFT they are U(-sqrt(6 / n), sqrt(6 / n)) with n the
number of rows, d starts at `d_initial` and v, the paper's b, at zero; there is no alpha / r.
PEFT's arrays: d vera_lambda_d, v vera_lambda_b, a vera_A and b vera_B transposed.

Departures: each rank has a pair of its own, so that no two ranks share a subspace; the numbers are
JAX's and not those of PEFT's generator, so an export has to bring them along. The gradient goes
through b alone, as d's place does not matter: (x a) (d b v) keeps a free of one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lorax import methods, ops, tree
from lorax.methods import lora
from lorax.methods.targets import Default

SHARED = "vera"  # a and b lie at vera/a and vera/b of the constants, once for all targets


def vera(
    rank: int = 256,
    d_initial: float = 0.1,
    projection_seed: int = 0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> "methods.Method":
    """VeRA; targets, layers and dropout as `lorax.methods.lora.lora`, which raises for them.

    rank: of the shared pair, which may exceed min(in, out). d_initial: what all of d starts at.
    projection_seed: of a and b, which are the same for every `seed` of a run.
    Trainable: d (layers..., r), v (layers..., out).
    """
    checked = lora.lora(rank, targets=targets, layers=layers, dropout=dropout).hp
    hp = {name: checked[name] for name in ("rank", "targets", "layers", "dropout")}
    hp |= {"d_initial": d_initial, "projection_seed": projection_seed}

    def chosen(params, sites=None):
        return methods.adapted_matrices(params, sites, hp["targets"], layers)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        own = chosen(params, sites)
        flat, trainable, constants, width = tree.flatten(params), {}, {}, pad or rank
        of = lambda sites: {p: s.matrix_shape(flat[p].shape) for p, s in sites.items()}
        mine = of({path: site for path, (site, _) in own.items()})
        every = of(targets) if targets else mine
        for path, (axes, _, n_out) in every.items():
            active = own[path][1] if path in own else None
            start = lambda key, index: {"d": jnp.full(rank, d_initial)}
            shapes = {"d": (width,), "v": (n_out,)}
            trainable[path] = methods.fill(key, axes, active, shapes, start)
            full = lambda value, axes=axes: jnp.full(axes, value, jnp.float32)
            constants[path] = {"s": full(1), "dropout": full(dropout)}

        def draw(key, index):
            uniform = lambda name, *shape: (
                jax.random.uniform(methods.key_for(key, name), shape, jnp.float32, -1, 1)
                * math.sqrt(6 / shape[0])
            )
            _, ins, outs = zip(*mine.values(), strict=True)
            return {"a": uniform("a", max(ins), rank), "b": uniform("b", rank, max(outs))}

        _, ins, outs = zip(*every.values(), strict=True)
        shapes = {"a": (max(ins), width), "b": (width, max(outs))}
        shared = jax.random.fold_in(jax.random.key(projection_seed), rank)
        constants[SHARED] = methods.fill(shared, (), np.array(True), shapes, draw)
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        flat, total = tree.flatten(params), 0
        for path, (site, active) in chosen(params, sites).items():
            total += int(active.sum()) * (rank + site.matrix_shape(flat[path].shape)[2])
        return total

    more = dict(adapts=chosen, width=rank)
    return methods.Method("vera", hp, init, bind, delta, count, factors, **more)


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `LowRank` leaf at every adapted path; dropout where a key is given."""
    return lora.bind(_as_lora(trainable, constants, params, sites), {}, params, key)


def delta(trainable, constants, params, sites=None):
    """{path: a d b v in the kernel's shape}."""
    return lora.delta(_as_lora(trainable, constants, params, sites), {}, params, sites)


def factors(trainable, constants, params, sites=None):
    """{path: (a, d b v, 1, None)}."""
    return lora.factors(_as_lora(trainable, constants, params, sites), {}, params, sites)


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update."""
    sites = sites or ops.sites_from_shapes(params)
    flat, found = tree.flatten(params), methods.joined(trainable, constants)
    shared = found.pop(SHARED)
    for path, own in found.items():
        d, v = own.pop("d"), own.pop("v")
        axes, n_in, n_out = sites[path].matrix_shape(ops.frozen(flat[path]).shape)
        own["a"] = jnp.broadcast_to(shared["a"][:n_in], (*axes, n_in, d.shape[-1]))
        b = jnp.broadcast_to(shared["b"][:, :n_out].astype(d.dtype), (*d.shape, n_out))
        own["b"] = d[..., :, None] * b * v[..., None, :]
    return tree.unflatten(found)
