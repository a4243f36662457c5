"""Updates of high rank from few numbers: LoHa and LoKr, products of Hadamard and of Kronecker.

LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2; LyCORIS, Yeh et al. 2023,
arXiv:2309.14859):

    y = x w + s dropout(x) ((a1 b1) * (a2 b2))      a (in, r), b (r, out), s = alpha / r

The entrywise product of two matrices of rank r has rank up to r^2. Its thin factors are the
row-wise Khatri-Rao products (in, r^2) of a1 with a2 and (r^2, out) of b1 with b2: it is computed
and exported as a LoRA of rank r^2. PEFT makes the dense update in every forward pass, which is the
better way only where r^2 (in + out) > in out. a2 starts at zero, as in PEFT (hada_w2_b); FedPara
trains from scratch and starts all four at random. PEFT's arrays are ours transposed: a1 hada_w1_b,
b1 hada_w1_a, a2 hada_w2_b, b2 hada_w2_a.

LoKr (LyCORIS, arXiv:2309.14859):

    y = x w + s dropout(x) kron(w1, w2)     w1 (m, l), w2 (n, k), in = m n, out = l k, s = alpha / r

w2 is a product a2 b2 of rank r where that is the smaller, r < max(n, k) / 2, and w1 = a1 b1 where
r < max(m, l) / 2 and it is asked for. s = alpha / r even where neither is a product, as in LyCORIS
and PEFT. w1 (or b1) starts at zero, as in PEFT; in LyCORIS it is w2. PEFT's arrays are ours
transposed: w1 lokr_w1, a1 lokr_w1_b, b1 lokr_w1_a, and so for 2. w2 is m l times smaller than the
kernel and is multiplied out; kron(w1, w2) never is.

Dropout is on the input, as LoRA's, and not PEFT's `rank_dropout` or `module_dropout`.
"""

import math

import jax
import jax.numpy as jnp

from lorax import leaves, methods, ops, tree
from lorax.methods import lora
from lorax.methods.targets import Default


def loha(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> "methods.Method":
    """LoHa, with the hyperparameters of `lorax.methods.lora.lora`; raises as that does.

    Trainable: a1, a2 (layers..., in, r), b1, b2 (layers..., r, out). Padding is zero in all four
    and stays so, as the gradient of each is a product with another.
    """
    hp = _checked(rank, alpha, scaling, targets, layers, dropout)

    def arrays(n_in, n_out, pad=None):
        a, b = (n_in, pad or rank), (pad or rank, n_out)
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    def bind(trainable, constants, params, key=None, sites=None):
        return lora.bind(_as_lora(trainable, constants), {}, params, key)

    def delta(trainable, constants, params, sites=None):
        return lora.delta(_as_lora(trainable, constants), {}, params, sites)

    def factors(trainable, constants, params, sites=None):
        return lora.factors(_as_lora(trainable, constants), {}, params, sites)

    init, more = _from_arrays(arrays, ("a2",), hp, most=rank)
    return methods.Method("loha", hp, init, bind, delta, factors=factors, **more)


def _as_lora(trainable, constants) -> dict:
    """The LoRA of rank r^2 with the same update."""
    found = {}
    for path, own in methods.joined(trainable, constants).items():
        a = jnp.einsum("...np,...nq->...npq", own["a1"], own["a2"])
        b = jnp.einsum("...pn,...qn->...pqn", own["b1"], own["b2"])
        found[path] = {"a": a.reshape(*a.shape[:-2], -1), "s": own["s"], "dropout": own["dropout"]}
        found[path]["b"] = b.reshape(*b.shape[:-3], -1, b.shape[-1])
    return tree.unflatten(found)


def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    factor: int = -1,
    decompose_both: bool = False,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> "methods.Method":
    """LoKr, with the hyperparameters of `lorax.methods.lora.lora` and two of its own.

    rank: any; from max(n, k) / 2 on it says nothing but the scale. factor: see `factorization`.
    decompose_both: whether w1 may be a product as well.
    Trainable: of i = 1 and 2 w{i}, or a{i} and b{i}; all three in a tree that is padded to a rank
    with w{i}, where on{i} () float32 says whether w{i} counts. Raises ValueError as LoRA, and for
    a factor out of range.
    """
    hp = _checked(rank, alpha, scaling, targets, layers, dropout)
    hp |= {"factor": factor, "decompose_both": decompose_both}
    factorization(1, factor)

    def arrays(n_in, n_out, pad=None):
        found, ranks = {}, pad or rank
        sizes = zip(factorization(n_in, factor), factorization(n_out, factor), strict=True)
        for i, (rows, columns) in zip((1, 2), sizes, strict=True):
            # The largest rank below max(rows, columns) / 2, up to which there is a product.
            limit = -(-max(rows, columns) // 2) - 1 if i == 2 or decompose_both else 0
            if ranks > limit:
                found[f"w{i}"] = (rows, columns)
            if limit and (pad or ranks <= limit):
                width = min(ranks, limit)
                found |= {f"a{i}": (rows, width), f"b{i}": (width, columns)}
        return found

    init, more = _from_arrays(arrays, ("w1", "b1"), hp)
    return methods.Method("lokr", hp, init, _bind_kronecker, _delta_kronecker, **more)


def _bind_kronecker(trainable, constants, params, key=None, sites=None):
    """`params` with a `Kronecker` leaf at every adapted path; dropout where a key is given."""
    flat = tree.flatten(params)
    for path, own in methods.joined(trainable, constants).items():
        how = None
        if key is not None:
            keys = jax.random.split(methods.key_for(key, path), own["s"].shape)
            how = leaves.Dropout(own["dropout"], keys)
        flat[path] = leaves.Kronecker(flat[path], _factor(own, 1), _factor(own, 2), own["s"], how)
    return tree.unflatten(flat)


def _delta_kronecker(trainable, constants, params, sites=None):
    """{path: s kron(w1, w2) in the kernel's shape, float32}."""
    sites = sites or ops.sites_from_shapes(params)
    flat, found = tree.flatten(params), {}
    for path, own in methods.joined(trainable, constants).items():
        w1, w2, s = (x.astype(jnp.float32) for x in (_factor(own, 1), _factor(own, 2), own["s"]))
        update = s[..., None, None] * leaves.kron(w1, w2)
        found[path] = sites[path].from_matrix(update, flat[path].shape)
    return found


def _factor(own, i: int):
    """w1 or w2 of a target's arrays."""
    total = own[f"a{i}"] @ own[f"b{i}"] if f"a{i}" in own else 0
    if f"w{i}" in own:
        total += own[f"on{i}"].astype(own[f"w{i}"].dtype)[..., None, None] * own[f"w{i}"]
    return total


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size: m is `factor` where that divides it, otherwise the largest divisor
    up to `factor` and the square root; -1: up to the square root. As PEFT's function of this name.

    Raises ValueError for a factor that is neither positive nor -1.
    """
    if factor < 1 and factor != -1:
        raise ValueError(f"method.factor: {factor} given, must be at least 1, or -1 for the root")
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max(d for d in range(1, most + 1) if size % d == 0)
    return m, size // m


# ------------------------------------------------------------------------------------------- both


def _checked(*values) -> dict:
    """The hyperparameters that both have in common with LoRA, checked there, and the scale."""
    names = ("rank", "alpha", "scaling", "targets", "layers", "dropout")
    hp = lora.lora(**dict(zip(names, values, strict=True))).hp
    return {name: hp[name] for name in (*names, "scale")}


def _from_arrays(arrays, zero, hp, most=None):
    """(init, {count, adapts, width}) of a method whose trainables of a target are `arrays`.

    arrays(in, out, pad=None) -> {name: shape}, layer axes not counted. zero: those that start at
    zero; the others start as PEFT's `kaiming_uniform_(a=sqrt 5)`, U(-1/sqrt(rows), 1/sqrt(rows)).
    most: the rank that min(in, out) must not be below.
    """
    chosen = lambda params, sites=None: methods.adapted_matrices(
        params, sites, hp["targets"], hp["layers"], most
    )

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        own = chosen(params, sites)
        flat, trainable, constants = tree.flatten(params), {}, {}
        for path, site in (targets or {path: site for path, (site, _) in own.items()}).items():
            axes, n_in, n_out = site.matrix_shape(flat[path].shape)
            active = own[path][1] if path in own else None
            mine, shapes = arrays(n_in, n_out), arrays(n_in, n_out, pad)

            def draw(key, index, mine=mine):
                uniform = lambda name, shape: (
                    jax.random.uniform(methods.key_for(key, name), shape, jnp.float32, -1, 1)
                    / math.sqrt(shape[0])
                )
                return {name: uniform(name, mine[name]) for name in mine if name not in zero}

            own_key = jax.random.fold_in(methods.key_for(key, path), hp["rank"])
            trainable[path] = methods.fill(own_key, axes, active, shapes, draw)
            full = lambda value, axes=axes: jnp.full(axes, value, jnp.float32)
            constants[path] = {"s": full(hp["scale"]), "dropout": full(hp["dropout"])}
            for name in (name for name in shapes if name.startswith("w")):
                constants[path][name.replace("w", "on")] = full(name in mine)
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        flat, total = tree.flatten(params), 0
        for path, (site, active) in chosen(params, sites).items():
            _, n_in, n_out = site.matrix_shape(flat[path].shape)
            sizes = map(math.prod, arrays(n_in, n_out).values())
            total += int(active.sum()) * sum(sizes)
        return total

    return init, dict(count=count, adapts=chosen, width=hp["rank"])
