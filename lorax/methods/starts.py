"""Initialisations of LoRA, for `lora(init=...)`: drawn, or from the base's weight or from data.

A start makes the initial factors a (in, r), b (r, out) of a matrix w (in, out). `DRAWN` has those
that read neither w nor data:

- kaiming: a ~ U(-1/sqrt(in), 1/sqrt(in)), which is torch's `kaiming_uniform_(sqrt 5)`, and b = 0.
  LoRA's paper (arXiv:2106.09685) draws A from a Gaussian without giving its width; its released
  code and PEFT have this. Hayou et al. 2024, arXiv:2406.08447, call it Init[A].
- gaussian: a of standard deviation 1 / r, and b = 0, as PEFT's `init_lora_weights="gaussian"`.
- orthonormal: a with orthonormal columns, uniform over all such, and b = 0, the frozen factor of
  Zhu et al. 2024, arXiv:2402.16842.
- init-b (Init[B] of arXiv:2406.08447): a = 0, and b ~ U(-1/sqrt(r), 1/sqrt(r)), the same rule for
  a matrix that reads r numbers.
- both (Li et al. 2025, arXiv:2505.23194, Init[AB]): a and b, each from kaiming's U(-1/sqrt(in),
  1/sqrt(in)). Their s a b is noise, which is subtracted as below. both-kept leaves it in the
  weights, as the paper finds harmless; step 0 is then a disturbed base.
- orthogonal (datta0.github.io/posts/rethink-lora-init, as in PEFT): of the rows of an orthogonal
  matrix (r, r), a = n1 q_odd / 10 and b = q_even^T n2 / 10 with Gaussian n1 (in, r / 2) and n2
  (r / 2, out). Both are random, of rank r / 2, and a b = 0 up to rounding, of which bfloat16 has
  more. r must be even.

Of an embedding, kaiming, gaussian and orthonormal start a at zero and draw b, as loralib and PEFT
do.

Other starts have a product s a b that is subtracted from w in the papers. Here all members of a
sweep share the base, which never changes: the initial factors are stored as constants a0, b0 and
subtracted in the product, x w + s (x a b - x a0 b0). So an adapted model equals its base at step 0,
up to rounding. The update dW = s (a b - a0 b0) then has a rank of up to 2 r. w = u diag(sigma) v^T
throughout:

- pissa (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3): the r largest singular values,
  a = u sqrt(sigma / s), b = sqrt(sigma / s) v^T. pissa-fast: the same by randomised SVD.
- milora (Wang et al. 2024, arXiv:2406.09044): pissa with the r smallest singular values. Directions
  in which w is singular start at zero in both factors and so are never trained.
- olora (Büyükakyüz 2024, arXiv:2406.01775): w^T = q r; b = the first columns of q, a = the first
  rows of r, both transposed. As in PEFT, s is not divided out.
- eva (Paischer et al. 2024, arXiv:2410.07170): a = the r principal directions of the layer's
  inputs, b = 0, so nothing is subtracted. The inputs are centred, as in PEFT's incremental PCA.
- corda (Yang et al. 2024, arXiv:2406.05223): the r largest singular values of c w, c = E[x x^T];
  a = c^-1 u sqrt(sigma / s), b = sqrt(sigma / s) v^T (instruction-previewed). corda-kpm: the r
  smallest (knowledge-preserved). c is damped, and x scaled, as in the authors' code and PEFT.
- lora-ga (Wang et al. 2024, arXiv:2407.05000, algorithm 1) from the gradient g = u diag(sigma) v^T:
  a = u_1..r, b = diag(sigma) v^T_r+1..2r out^(1/4) / 4 as in PEFT 0.21. lora-ga-paper, as in the
  paper and its code: no sigma, and a is also multiplied by out^(1/4) / 4 (gamma = 16).

PEFT's EVA and LoRA-GA use a randomised SVD; here all SVDs are exact except that of pissa-fast.

Two starts are not to be the base, and nothing is subtracted:

- lora-one (Zhang et al. 2025, arXiv:2502.01235) is a step of full gradient descent: from the
  gradient g = u diag(sigma) v^T, a b = -(best rank-r part of g) sqrt(out) / (gamma sigma_1), half
  in each factor, with gamma = 128. This is the authors' code, whose README leaves out the division
  by sigma_1; s is not divided out, so the step grows with s. They then train with preconditioned
  AdamW, which is `train.optimizer="riemannian"` with `train.damping` 1e-6.
- loftq (Li et al. 2023, arXiv:2310.08659, algorithm 1 with one iteration) on a quantised base q:
  s a b = the best rank-r approximation of w - q. Step 0 is closer to w than q is. More iterations
  would need a different base for every rank; see the function `loftq`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather

GAMMA = 16  # LoRA-GA's default of `stable_gamma`
GAMMA_ONE = 128  # LoRA-One's
RHO = 2.0  # EVA: no matrix gets more than this times the mean rank
DAMP = 0.01  # CorDA: share of the mean of c's diagonal; doubled until c can be inverted


# -------------------------------------------------------------------------------------------- drawn


def kaiming(key, n_in: int, n_out: int, rank: int):
    """Init[A]: a as by `torch.nn.init.kaiming_uniform_(a=sqrt 5)`; b stays at zero."""
    return {"a": uniform(key, n_in, (n_in, rank))}


def gaussian(key, n_in: int, n_out: int, rank: int):
    """PEFT's "gaussian": a with standard deviation 1 / r; b stays at zero."""
    return {"a": jax.random.normal(key, (n_in, rank), jnp.float32) / rank}


def orthonormal(key, n_in: int, n_out: int, rank: int):
    """a with orthonormal columns, drawn uniformly; b stays at zero."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (n_in, rank)))
    return {"a": q * jnp.sign(jnp.diag(r))[None]}  # without the signs q is not uniform


def init_b(key, n_in: int, n_out: int, rank: int):
    """Init[B]: b as by `kaiming_uniform_`, whose input is of size r; a stays at zero."""
    return {"b": uniform(key, rank, (rank, n_out))}


def both(key, n_in: int, n_out: int, rank: int):
    """Init[AB]: a as by `kaiming` with the same key, and b of the same width."""
    b = uniform(jax.random.fold_in(key, 1), n_in, (rank, n_out))
    return kaiming(key, n_in, n_out, rank) | {"b": b}


def orthogonal(key, n_in: int, n_out: int, rank: int):
    """PEFT's "orthogonal": both factors random with a b = 0. Raises ValueError for an odd rank."""
    if rank % 2:
        raise ValueError(f"method.rank: {rank} given, must be even with init 'orthogonal'")
    square, before, after = (
        jax.random.normal(k, shape)
        for k, shape in zip(
            jax.random.split(key, 3),
            ((rank, rank), (n_in, rank // 2), (rank // 2, n_out)),
            strict=True,
        )
    )
    q, _ = jnp.linalg.qr(square)
    return {"a": before @ q[0::2] / 10, "b": q[1::2].T @ after / 10}


def uniform(key, fan_in: int, shape: tuple[int, ...]):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


#: {value of `method.init`: function (key, in, out, rank) -> {"a": (in, rank), "b": (rank, out)},
#: float32}; a factor that it leaves out is zero.
DRAWN: dict[str, Callable] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthonormal": orthonormal,
    "init-b": init_b,
    "both": both,
    "both-kept": both,
    "orthogonal": orthogonal,
}
#: Those that draw a alone; of an embedding b alone, see `drawn`.
OF_A = ("kaiming", "gaussian", "orthonormal")


def drawn(init: str, kind: str, key, n_in: int, n_out: int, rank: int) -> dict:
    """{"a": (in, rank), "b": (rank, out)} by a start of `DRAWN`; a factor that it leaves out is
    zero. kind: of the matrix's `Site`. Of an embedding, those of `OF_A` draw b instead of a, as
    loralib and PEFT do."""
    if kind == "embed" and init in OF_A:
        return {"b": jax.random.normal(key, (rank, n_out))}
    return DRAWN[init](key, n_in, n_out, rank)


# --------------------------------------------------------------------- from the weight or from data


def pissa(key, w, rank: int, scale: float, evidence=None):
    """PiSSA: (a, b) with s a b the best rank-r approximation of w."""
    return _halves(*jnp.linalg.svd(w, full_matrices=False), rank, scale)


def pissa_fast(key, w, rank: int, scale: float, evidence=None):
    """PiSSA by a randomised SVD, which `key` draws."""
    return _halves(*randomised_svd(key, w, rank), rank, scale)


def milora(key, w, rank: int, scale: float, evidence=None):
    """MiLoRA: (a, b) with s a b the r terms of w with the smallest singular values."""
    u, sigma, vt = jnp.linalg.svd(w, full_matrices=False)
    first = len(sigma) - rank
    return _halves(u[:, first:], sigma[first:], vt[first:], rank, scale)


def olora(key, w, rank: int, scale: float, evidence=None):
    """OLoRA: the first rows and columns of a QR decomposition of w^T."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


def eva(key, w, rank: int, scale: float, evidence=None):
    """EVA: the principal directions of the inputs with these "moments", and b = 0."""
    _, directions = principal(evidence["moments"])
    return directions[:, :rank], jnp.zeros((rank, w.shape[1]), w.dtype)


def corda(key, w, rank: int, scale: float, evidence=None, part=slice(None)):
    """CorDA: the first r terms of c w, divided by c, the damped "covariance" of the inputs.

    part: of the singular values, to take the r terms from. Raises ValueError if no damping makes c
    invertible.
    """
    c, damp = evidence["covariance"].astype(w.dtype), DAMP
    identity = jnp.eye(len(c), dtype=w.dtype)
    while True:
        damped = c + damp * jnp.mean(jnp.diag(c)) * identity
        inverse = jnp.linalg.inv(damped)
        if jnp.linalg.norm(damped @ inverse - identity) < 0.05:
            break
        if damp > 1e6:  # NaN, or no input at all
            raise ValueError("method.init: 'corda': the inputs' covariance can't be inverted")
        damp *= 2
    u, sigma, vt = jnp.linalg.svd(damped @ w, full_matrices=False)
    a, b = _halves(u[:, part], sigma[part], vt[part], rank, scale)
    return jax.scipy.linalg.solve(damped, a, assume_a="pos"), b  # closer than inverse @ a


def corda_kpm(key, w, rank: int, scale: float, evidence=None):
    """CorDA with the last r terms of c w, those that matter least to the inputs."""
    return corda(key, w, rank, scale, evidence, part=slice(min(w.shape) - rank, None))


def lora_ga(key, w, rank: int, scale: float, evidence=None):
    """LoRA-GA as in PEFT. Raises ValueError for a rank above min(in, out) / 2."""
    u, sigma, vt = _gradient_svd(w, rank, evidence)
    stable = w.shape[1] ** 0.25 / GAMMA**0.5
    return u[:, :rank], stable * sigma[rank : 2 * rank, None] * vt[rank : 2 * rank]


def lora_ga_paper(key, w, rank: int, scale: float, evidence=None):
    """LoRA-GA as in the paper: without singular values in b, and with a scaled as well."""
    u, _, vt = _gradient_svd(w, rank, evidence)
    stable = w.shape[1] ** 0.25 / GAMMA**0.5
    return stable * u[:, :rank], stable * vt[rank : 2 * rank]


def lora_one(key, w, rank: int, scale: float, evidence=None):
    """LoRA-One: a b is a step against the best rank-r approximation of the gradient."""
    u, sigma, vt = jnp.linalg.svd(evidence["gradient"].astype(w.dtype), full_matrices=False)
    part = sigma / jnp.maximum(sigma[0], jnp.finfo(w.dtype).tiny)
    a, b = _halves(u, part * w.shape[1] ** 0.5 / GAMMA_ONE, vt, rank, 1.0)
    return -a, b


def loftq_once(key, w, rank: int, scale: float, evidence):
    """LoftQ with one iteration: s a b is the best rank-r approximation of the "residual"."""
    return pissa(key, evidence["residual"], rank, scale)


#: {value of `method.init`: function (key, w (in, out) float32, rank, s > 0, evidence of the matrix)
#: -> (a (in, rank), b (rank, out)) float32}. evidence: {kind: array}, see `NEEDS`.
STARTS: dict[str, Callable] = {
    "pissa": pissa,
    "pissa-fast": pissa_fast,
    "milora": milora,
    "olora": olora,
    "eva": eva,
    "corda": corda,
    "corda-kpm": corda_kpm,
    "lora-ga": lora_ga,
    "lora-ga-paper": lora_ga_paper,
    "lora-one": lora_one,
    "loftq": loftq_once,
}
#: {start that reads more than w: the kind of evidence that it needs}, a statistic of
#: `lorax.methods.sensitivity.evidence`, or "residual", (layers..., in, out) float32, the
#: quantisation error.
NEEDS = {
    "eva": "moments",
    "corda": "covariance",
    "corda-kpm": "covariance",
    "lora-ga": "gradient",
    "lora-ga-paper": "gradient",
    "lora-one": "gradient",
    "loftq": "residual",
}


# ---------------------------------------------------------------------------------------- quantised


def loftq(w, rank: int, scale: float, quantise: Callable, iterations: int = 1):
    """LoftQ (arXiv:2310.08659, algorithm 1): (a, b, q) with q + s a b close to w (in, out).

    quantise: (in, out) -> (in, out), quantised and dequantised. Alternates `iterations` times:
    q = quantise(w - s a b), then s a b = the best rank-r approximation of w - q. The adapter
    starts at a, b without subtraction and the base's weight has to be q, so step 0 is not exactly
    the base. After one iteration q = quantise(w), the same for every rank. PEFT does not divide
    a b by s, which is right only for s = 1; here any s is right.
    """
    a = b = None
    for _ in range(iterations):
        q = quantise(w if a is None else w - scale * (a @ b))
        a, b = pissa(None, w - q, rank, scale)
    return a, b, q


# -------------------------------------------------------------------------------- ranks by evidence


def allot(worth: Mapping, costs: Mapping, budget: int, most: int) -> dict:
    """{matrix: its rank, possibly 0}: takes the most valuable directions within a budget.

    worth: {matrix: the value of each further direction, non-increasing}. costs: {matrix: the cost
    of a direction}. No matrix gets more than `most`; ties go to the first in order; directions that
    no longer fit are skipped.
    """
    matrices = [m for m, values in worth.items() for _ in range(min(most, len(values)))]
    worths = np.concatenate([np.asarray(values)[:most] for values in worth.values()])
    ranks = dict.fromkeys(worth, 0)
    for i in np.argsort(-worths, kind="stable"):
        if costs[matrices[i]] <= budget:
            ranks[matrices[i]] += 1
            budget -= costs[matrices[i]]
    return ranks


def redistribute(spectra: Mapping, rank: int, rho: float = RHO) -> dict:
    """{matrix: its rank, possibly 0}: `rank` per matrix on average, more where it explains more.

    spectra: {matrix: the value of each further direction, non-increasing}. The rank * len(spectra)
    most valuable directions are taken, at most round(rho * rank) per matrix. With `explained` this
    is EVA's redistribution (arXiv:2410.07170, equation 4), where s stays alpha / rank as with
    PEFT's `adjust_scaling_factors`; with `sensitivity.spectra` it uses the gradient. Raises
    ValueError for rank or rho below 1.
    """
    if rank < 1 or rho < 1:
        raise ValueError(f"rank, rho: {rank}, {rho} given, must be at least 1")
    return allot(spectra, dict.fromkeys(spectra, 1), rank * len(spectra), round(rho * rank))


def by_path(ranks: Mapping[tuple, int]) -> dict:
    """{(path, layer index): rank} as `lora(ranks=...)` takes it: {path: rank, or nested lists of
    ranks over the layer axes}. `ranks` has every layer of a path; paths of rank 0 are left out."""
    layers: dict[str, dict] = {}
    for (path, index), rank in ranks.items():
        layers.setdefault(path, {})[index] = rank
    nested = {}
    for path, of_layer in layers.items():
        array = np.zeros(np.max([*of_layer], axis=0, initial=-1).astype(int) + 1, int)
        for index, rank in of_layer.items():
            array[index] = rank
        if array.any():
            nested[path] = array.tolist()
    return nested


def principal(moments):
    """(shares of the variance, non-increasing (in,), directions as columns (in, in)) of inputs with
    these `moments` (`sensitivity.evidence`). The inputs are centred, as in PEFT."""
    n = moments[-1, -1]
    mean = moments[:-1, -1] / n
    variances, directions = jnp.linalg.eigh(moments[:-1, :-1] / n - jnp.outer(mean, mean))
    variances = jnp.maximum(variances[::-1], 0)
    return variances / jnp.sum(variances), directions[:, ::-1]


def explained(evidence: Mapping[str, Mapping]) -> dict:
    """{(path, layer index): shares of the variance} of evidence with "moments"."""
    shares = {}
    for path, kinds in evidence.items():
        moments = kinds["moments"]
        for index in np.ndindex(*moments.shape[:-2]):
            shares[path, index] = np.asarray(principal(gather.layer(moments, index))[0])
    return shares


# ------------------------------------------------------------------------------------------ algebra


def randomised_svd(key, w, rank: int, more: int = 10, powers: int = 8):
    """(u, sigma, v^T) of the largest singular values of w (in, out), at least `rank` of them.

    Halko et al. 2009, arXiv:0909.4061, algorithms 4.4 and 5.1: `more` columns beyond the rank,
    `powers` iterations, orthonormalised in between. PEFT's `pissa_niter_k` has no extra columns.
    """
    orthonormal = lambda y: jnp.linalg.qr(y)[0]
    columns = min(rank + more, *w.shape)
    y = orthonormal(w @ jax.random.normal(key, (w.shape[1], columns), w.dtype))
    for _ in range(powers):
        y = orthonormal(w @ orthonormal(w.T @ y))
    u, sigma, vt = jnp.linalg.svd(y.T @ w, full_matrices=False)
    return y @ u, sigma, vt


def _halves(u, sigma, vt, rank: int, scale: float):
    """(a, b) with s a b = the first `rank` terms of u diag(sigma) v^T, sqrt(sigma / s) in each."""
    root = jnp.sqrt(sigma[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def _gradient_svd(w, rank: int, evidence):
    if 2 * rank > min(w.shape):
        raise ValueError(
            f"method.rank: {rank} given, but LoRA-GA reads 2 rank singular vectors of a gradient "
            f"that is {w.shape[0]} x {w.shape[1]}: at most {min(w.shape) // 2}"
        )
    return jnp.linalg.svd(evidence["gradient"].astype(w.dtype), full_matrices=False)
