"""High-rank updates from few parameters: LoHa (Hadamard products) and LoKr (Kronecker products).

LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2; LyCORIS, Yeh et al. 2023,
arXiv:2309.14859):

    y = x w + s dropout(x) ((a1 b1) * (a2 b2))      a (in, r), b (r, out), s = alpha / r

The entrywise product of two matrices of rank r has rank up to r^2. Its thin factors are the
Khatri-Rao products (in, r^2) of a1 with a2 and (r^2, out) of b1 with b2: it is computed and
exported as a LoRA of rank r^2. PEFT computes the dense update in every forward pass, which is
cheaper only if r^2 (in + out) > in out. a2 starts at zero, as in PEFT (hada_w2_b); FedPara trains
from scratch and draws all four at random. PEFT's arrays are ours transposed: a1 hada_w1_b,
b1 hada_w1_a, a2 hada_w2_b, b2 hada_w2_a.

LoKr (LyCORIS, arXiv:2309.14859):

    y = x w + s dropout(x) kron(w1, w2)     w1 (m, l), w2 (n, k), in = m n, out = l k, s = alpha / r

w2 is a product a2 b2 of rank r if that is smaller, r < max(n, k) / 2; w1 = a1 b1 if
r < max(m, l) / 2 and `decompose_both` is set. s = alpha / r even if neither is a product, as in
LyCORIS and PEFT. w1 (or b1) starts at zero, as in PEFT; in LyCORIS w2 does. PEFT's arrays are ours
transposed: w1 lokr_w1, a1 lokr_w1_b, b1 lokr_w1_a, and likewise for 2. w2 is m l times smaller than
the kernel and is computed in full; kron(w1, w2) never is.

Dropout is on the input, as in LoRA, not PEFT's `rank_dropout` or `module_dropout`.
"""

import math

import jax
import jax.numpy as jnp

from lorax import leaves, tree
from lorax.factorization import factorization
from lorax.methods import lora
from lorax.methods.arrays import joined, key_for, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices


def loha(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """LoHa, with the hyperparameters of `lorax.methods.lora.lora`; raises as that does.

    Trainable: a1, a2 (layers..., in, r), b1, b2 (layers..., r, out). Padding is zero in all four
    and stays so, as the gradient of each is a product with another.
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, targets=targets, layers=layers)
    hp = lora.checked(**hp, dropout=dropout)

    def arrays(n_in, n_out, pad=None):
        a, b = (n_in, pad or rank), (pad or rank, n_out)
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    bind, delta, factors = lora.through(_as_lora)
    shared = _from_arrays(arrays, ("a2",), hp, most=rank)
    return Method("loha", hp, bind=bind, delta=delta, factors=factors, **shared)


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA of rank r^2 with the same update."""
    thin = {}
    for path, x in joined(trainable, constants).items():
        a = jnp.einsum("...np,...nq->...npq", x["a1"], x["a2"])
        b = jnp.einsum("...pn,...qn->...pqn", x["b1"], x["b2"])
        thin[path] = {"a": a.reshape(*a.shape[:-2], -1), "s": x["s"], "dropout": x["dropout"]}
        thin[path]["b"] = b.reshape(*b.shape[:-3], -1, b.shape[-1])
    return tree.unflatten(thin)


def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    factor: int = -1,
    decompose_both: bool = False,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """LoKr, with the hyperparameters of `lorax.methods.lora.lora` and two of its own.

    rank: any; from max(n, k) / 2 on it only sets the scale. factor: see `factorization`.
    decompose_both: whether w1 may be a product as well.
    Trainable: for i = 1 and 2, w{i}, or a{i} and b{i}; or all three in a tree padded to a rank that
    needs w{i}, where on{i} () float32 says whether w{i} is used. Raises ValueError as LoRA, and for
    a factor out of range.
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, targets=targets, layers=layers)
    hp = lora.checked(**hp, dropout=dropout)
    hp |= {"factor": factor, "decompose_both": decompose_both}
    factorization(1, factor)

    def arrays(n_in, n_out, pad=None):
        shapes, ranks = {}, pad or rank
        sizes = zip(factorization(n_in, factor), factorization(n_out, factor), strict=True)
        for i, (rows, columns) in zip((1, 2), sizes, strict=True):
            # The largest rank below max(rows, columns) / 2, up to which a product is used.
            limit = -(-max(rows, columns) // 2) - 1 if i == 2 or decompose_both else 0
            if ranks > limit:
                shapes[f"w{i}"] = (rows, columns)
            if limit and (pad or ranks <= limit):
                width = min(ranks, limit)
                shapes |= {f"a{i}": (rows, width), f"b{i}": (width, columns)}
        return shapes

    shared = _from_arrays(arrays, ("w1", "b1"), hp)
    return Method("lokr", hp, bind=_bind_kronecker, delta=_delta_kronecker, **shared)


def _bind_kronecker(trainable, constants, params, key=None, sites=None):
    """`params` with a `Kronecker` leaf at every adapted path; dropout if a key is given."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        dropout = lora.dropout_of(path, x, key)
        flat[path] = leaves.Kronecker(flat[path], _factor(x, 1), _factor(x, 2), x["s"], dropout)
    return tree.unflatten(flat)


def _delta_kronecker(trainable, constants, params, sites=None):
    """{path: s kron(w1, w2) in the kernel's shape, float32}."""
    return updates(_bind_kronecker, trainable, constants, params, sites)


def _factor(x, i: int):
    """w1 or w2 of a target's arrays."""
    total = x[f"a{i}"] @ x[f"b{i}"] if f"a{i}" in x else 0
    if f"w{i}" in x:
        total += x[f"on{i}"].astype(x[f"w{i}"].dtype)[..., None, None] * x[f"w{i}"]
    return total


# ------------------------------------------------------------------------------------------- both


def _from_arrays(arrays, zero, hp, most=None) -> dict:
    """{init, count, adapts, width} of a method whose trainable arrays of a target are `arrays`.

    arrays(in, out, pad=None) -> {name: shape}, without layer axes. zero: names that start at zero;
    the others start as PEFT's `kaiming_uniform_(a=sqrt 5)`, U(-1/sqrt(rows), 1/sqrt(rows)).
    most: a rank that min(in, out) must not be below.
    """

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], hp["layers"], most)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, hp["rank"]):
            drawn, padded = arrays(m.n_in, m.n_out), arrays(m.n_in, m.n_out, pad)

            def draw(key, index, drawn=drawn):
                uniform = lambda name, shape: (
                    jax.random.uniform(key_for(key, name), shape, jnp.float32, -1, 1)
                    / math.sqrt(shape[0])
                )
                return {name: uniform(name, drawn[name]) for name in drawn if name not in zero}

            trainable[m.path] = m.fill(padded, draw)
            constants[m.path] = {"s": m.full(hp["scale"]), "dropout": m.full(hp["dropout"])}
            for name in (name for name in padded if name.startswith("w")):
                constants[m.path][name.replace("w", "on")] = m.full(name in drawn)
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        size = lambda m: sum(map(math.prod, arrays(m.n_in, m.n_out).values()))
        return sum(int(m.active.sum()) * size(m) for m in matrices(params, adapts(params, sites)))

    return dict(init=init, count=count, adapts=adapts, width=hp["rank"])
