"""FourierFT: an update with few frequencies (Gao et al. 2024, arXiv:2405.03003).

    dw = c Re IFFT2(S)        S (in, out), zero but for n trained real numbers at fixed places

The places are the same for all matrices of a shape and, as in PEFT, the first n of a random
permutation by torch's generator (`lorax.permutations`), so PEFT's files, which don't hold them,
can be read and written. A sum of n cosines has rank up to 2 n: an update of full rank
from fewer numbers than any LoRA has.

With `std` 0 all numbers start at zero, and the model as its base. PEFT's default is `std` 1: a run
then starts away from the base, and its evaluation at step 0 is the loss there. PEFT's array is
fourierft_spectrum, n_frequency is `frequencies`, scaling `spectral_scale` and random_loc_seed
`places_seed`. dw of one layer is made in each step, in float32, and again in the backward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lorax import leaves, ops, permutations, tree
from lorax.methods.arrays import joined, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices, only_linear, words_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Spectral(leaves.Added):
    """A frozen weight plus a sum of waves: dense(leaf) = w + s Re IFFT2(S), S zero but for
    S[rows[i], columns[i]] = values[i].

    w: a kernel or another operator leaf. values: (n,), rows, columns: (n,) int32, s: () float32,
    each with the layer axes first.
    """

    w: object
    values: jax.Array
    rows: jax.Array
    columns: jax.Array
    s: jax.Array

    def linear(self, x):
        n_in, n_out = ops.frozen(self.w).shape
        spectrum = self.values, self.rows, self.columns, self.s

        @jax.checkpoint  # what is kept of the layer is x, not dw
        def updated(x, spectrum):
            return x @ waves(*spectrum, n_in, n_out).astype(x.dtype)

        return ops.linear(x, self.w) + updated(x, spectrum)

    def delta(self, w, site):
        axes, n_in, n_out = site.matrix_shape(w.shape)
        make = ops.over_layers(lambda *layer: waves(*layer, n_in, n_out), len(axes))
        dw = make(self.values, self.rows, self.columns, self.s)
        return site.from_matrix(dw.astype(w.dtype), w.shape)


def waves(values, rows, columns, s, n_in: int, n_out: int):
    """s Re IFFT2(S) (in, out), at least in float32."""
    dtype = np.promote_types(values.dtype, np.float32)
    spectrum = jnp.zeros((n_in, n_out), dtype).at[rows, columns].add(values.astype(dtype))
    return s.astype(dtype) * jnp.fft.ifft2(spectrum).real


def fourierft(
    frequencies: int = 1000,
    spectral_scale: float = 150.0,
    places_seed: int = 777,
    std: float = 0.0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """FourierFT with the given hyperparameters; see `lorax.methods.Method`.

    frequencies: n, from 1 to in times out of every target. spectral_scale: c. places_seed: of the
    places of the n numbers. std: standard deviation of their first values. targets, layers: see
    `lorax.methods.lora.lora`. Trainable: values (layers..., n).
    Raises ValueError for a value out of range, and for targets that are not linear layers.
    """
    hp = dict(frequencies=frequencies, spectral_scale=spectral_scale, places_seed=places_seed)
    hp |= dict(std=std, targets=words_of(targets), layers=layers)
    if frequencies < 1:
        raise ValueError(f"method.frequencies: {frequencies} given, must be at least 1")
    if not 0 <= places_seed < 2**32:
        raise ValueError(f"method.places_seed: {places_seed} given, must be from 0 to 2^32 - 1")
    if std < 0:
        raise ValueError(f"method.std: {std} given, must be at least 0")

    def adapts(params, sites=None):
        adapted = only_linear(adapted_matrices(params, sites, hp["targets"], layers))
        for m in matrices(params, adapted):
            size = m.n_in * m.n_out
            if frequencies > size:
                raise ValueError(
                    f"method.frequencies: {frequencies} given, but {m.path} is {m.n_in} x "
                    f"{m.n_out}: at most {size}"
                )
            if size >= permutations.TOO_MANY:
                raise ValueError(
                    f"method.targets: {m.path} has {size} entries; fourierft takes matrices of "
                    f"fewer than {permutations.TOO_MANY}"
                )
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        width, trainable, constants = pad or frequencies, {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, frequencies):
            draw = lambda key, index: {"values": std * jax.random.normal(key, (frequencies,))}
            trainable[m.path] = m.fill({"values": (width,)}, draw)
            at = np.zeros((2, width), np.int32)  # padding stays at one place, and is masked
            if m.active.any():
                at[:, :frequencies] = permutations.entries(
                    m.n_in, m.n_out, frequencies, places_seed
                )
            rows, columns = (jnp.asarray(np.broadcast_to(x, (*m.axes, width))) for x in at)
            counts = jnp.asarray(np.where(m.active, frequencies, 0), jnp.int32)
            constants[m.path] = {"rows": rows, "columns": columns, "n": counts}
            constants[m.path]["s"] = m.full(spectral_scale)
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * frequencies for m in adapted)

    return Method("fourierft", hp, init, bind, delta, count, adapts=adapts, width=frequencies)


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Spectral` leaf at every adapted path."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        values = x["values"]
        index = jnp.arange(values.shape[-1], dtype=jnp.int32).reshape(
            (1,) * (values.ndim - 1) + (-1,)
        )
        values = jnp.where(index < x["n"][..., None], values, 0)
        flat[path] = Spectral(flat[path], values, x["rows"], x["columns"], x["s"])
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: c Re IFFT2(S) in the kernel's shape, float32}."""
    return updates(bind, trainable, constants, params, sites)
