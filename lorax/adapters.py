"""Adapters on a base model: bound to it, merged into it, many of them in one batch.

An `Adapter` is what a file holds (see `lorax.interop`): factors layer by layer, by path. Here they
become leaves of a base's parameters, stacked as the base stacks its layers and padded with zeros to
the largest rank of the stack, which changes nothing in what they compute.

Where a model reads out with its embedding, an adapter from PEFT may update one of the two uses
alone, or each by itself: such an embedding becomes a `leaves.Untied` leaf.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import leaves, methods, ops, tree
from lorax.errors import nearest
from lorax.interop.hf import check_finite
from lorax.interop.peft import Adapter, Factors
from lorax.interop.places import Places
from lorax.methods import lora
from lorax.models.load import Base, layer_names, parameter_layers, sources


def bind(base: Base, adapter: Adapter) -> dict:
    """The base's parameters with the adapter in them, for `lorax.apply`.

    Adapted matrices become `LowRank` leaves (DoRA: `Scaled` ones around them), parameters that were
    trained in full are replaced, in the dtype of the base's own.

    Raises ValueError that names path and shapes for a layer that the base does not have or factors
    that do not fit it.
    """
    own, head = _uses(base, adapter)
    flat = _replaced(base, own.weights)
    for path, stack in _stacks(base, own.factors).items():
        flat[path] = leaves.LowRank(flat[path], *map(jnp.asarray, (stack.a, stack.b, stack.s)))
        if stack.has_m.any():
            g = _gain(flat[path], jnp.asarray(stack.m), jnp.asarray(stack.has_m), base.sites[path])
            flat[path] = leaves.Scaled(flat[path], g)
    if head is not None:
        flat[head.path] = leaves.Untied(flat[head.path], _read_out(base, head))
    return tree.unflatten(flat)


def check(base: Base, adapter: Adapter) -> None:
    """Raises ValueError, as `bind` does, for an adapter that does not fit. A skeleton will do for
    base: no weight is looked at."""
    own, head = _uses(base, adapter)
    _by_path(base, own.factors)
    _placed(base, own.weights)
    if head is not None and head.factors is not None:
        _by_path(base, {head.path.removesuffix("/embedding"): head.factors})


def check_task(base: Base, task_type: str | None, where: str = "") -> None:
    """Raises ValueError, which begins with `where`, for a task type of PEFT's whose head the base
    does not have. None, and features without a head, are for every base."""
    known = ["FEATURE_EXTRACTION"]
    if hasattr(base.module, "empty_cache"):
        known.append("CAUSAL_LM")
    elif getattr(base.config, "head", "classification") == "classification":
        known.append("SEQ_CLS")
    if task_type is not None and task_type not in known:
        raise ValueError(
            f"{where}task_type {task_type!r}: {base.name} is no model with such a head; adapters "
            f"for it say {' or '.join(known[::-1])}, or null"
        )


@functools.partial(jax.jit, static_argnums=3)
def _gain(leaf, m, has_m, site):
    """DoRA's scales of a stack's columns, 1 in a layer without lengths."""
    return jnp.where(has_m[..., None], leaves.dora(leaf, m, site).g, 1)


def mixed(base: Base, adapters: Sequence[Adapter | None], rows) -> dict:
    """Parameters for one forward pass in which row i of the batch has adapter rows[i], and a None
    among the adapters is the bare base.

    rows: (B,) integers below len(adapters), with values (not traced): B is the batch size of the
    calls that these parameters are for. Raises ValueError for an adapter that does not fit, or that
    is more than low-rank factors (DoRA, biases, a head): those are not a row's own.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows: (B,) integers are needed, not {rows.dtype} of shape {rows.shape}")
    if rows.size and not 0 <= rows.min() <= rows.max() < len(adapters):
        raise ValueError(f"rows: {rows.min()} to {rows.max()} given for {len(adapters)} adapters")
    stacks = []
    for i, adapter in enumerate(adapters):
        own, head = _uses(base, adapter or Adapter({}, {}, {}))
        stacks.append(_stacks(base, own.factors))
        if own.weights or head is not None or any(s.has_m.any() for s in stacks[-1].values()):
            raise ValueError(
                f"adapters[{i}]: only low-rank factors can differ from row to row, and it has "
                "DoRA magnitudes or weights of its own"
            )
    flat = tree.flatten(base.params)
    for path in dict.fromkeys(path for own in stacks for path in own):
        layers, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        rank = max(own[path].a.shape[-1] for own in stacks if path in own)
        a = np.zeros((*layers, len(stacks), n_in, rank), np.float32)
        b = np.zeros((*layers, len(stacks), rank, n_out), np.float32)
        s = np.zeros((*layers, len(stacks)), np.float32)
        for i, own in enumerate(stacks):
            if path in own:
                r = own[path].a.shape[-1]
                a[..., i, :, :r], b[..., i, :r, :] = own[path].a, own[path].b
                s[..., i] = own[path].s
        every_layer = np.broadcast_to(rows.astype(np.int32), (*layers, len(rows)))
        flat[path] = leaves.Mixed(flat[path], *map(jnp.asarray, (a, b, s, every_layer)))
    return tree.unflatten(flat)


# ----------------------------------------------------------------------------------------- merging


class Merged(NamedTuple):
    """params: parameters with the adapter in them, plain where it changes them. kept: {path: leaf}
    of the base's that it replaced. error: {layer: largest |merged - exact| over largest |exact|},
    of rounding alone."""

    params: dict
    kept: dict
    error: dict[str, float]


def merge(base: Base, adapter: Adapter, dtypes: Mapping[str, np.dtype] | None = None) -> Merged:
    """The adapter merged: w + s a b, or DoRA's columns of it at length m.

    The sum is made in float64 and rounded once, to the dtype of the base's weight, or that which
    `dtypes` has for its path. A weight in codes is decoded first. Raises ValueError as `bind` does,
    for an adapter that gives a tied head another weight than the embedding, and for a layer whose
    weights come out as NaN, or too large for their dtype.
    """
    own, head = _uses(base, adapter)
    if head is not None:
        raise ValueError(
            f"{head.path}: the model reads out with its embedding, and the adapter updates the "
            "two differently: they can't be one weight"
        )
    flat, error = _replaced(base, own.weights), {}
    changed = {path for path, leaf in tree.flatten(base.params).items() if flat[path] is not leaf}
    for path, layers in _by_path(base, own.factors).items():
        site, changed = base.sites[path], changed | {path}
        leaf = ops.dense(flat[path], site)
        exactly = np.asarray(site.to_matrix(leaf))
        matrices = exactly.astype((dtypes or {}).get(path, leaf.dtype))
        for name, index, (a, b, s, m) in layers:
            exact = exactly[index].astype(np.float64)
            exact += s * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
            if m is not None:
                norms = np.linalg.norm(exact, axis=0)
                exact *= np.where(norms > 0, m / np.where(norms > 0, norms, 1), 1)
            matrices[index] = _rounded(exact, matrices.dtype)
            check_finite(name, exact, matrices[index])
            off = np.abs(matrices[index].astype(np.float64) - exact).max(initial=0)
            error[name] = float(off / (np.abs(exact).max(initial=0) or 1))
        flat[path] = site.from_matrix(jnp.asarray(matrices), leaf.shape)
    kept = {path: leaf for path, leaf in tree.flatten(base.params).items() if path in changed}
    return Merged(tree.unflatten(flat), kept, error)


def _rounded(exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 rounded once. To bfloat16 a cast goes by way of float32, which rounds twice: there
    the last bit of what is cut off is made odd, so that no tie comes of it."""
    with np.errstate(over="ignore"):  # whoever calls looks for infinities
        if dtype != jnp.bfloat16:
            return exact.astype(dtype)
        near = exact.astype(np.float32)
        below = np.where(abs(near) > abs(exact), np.nextafter(near, np.float32(0)), near)
        odd = below.view(np.uint32) | (below != exact)
        return odd.view(np.float32).astype(dtype)


def unmerge(merged: Merged) -> dict:
    """The base's parameters again, bit for bit: those that were kept, not a subtraction."""
    return tree.unflatten(tree.flatten(merged.params) | merged.kept)


# --------------------------------------------------------------------------- to and from training


def state(base: Base, adapter: Adapter) -> methods.State:
    """The trees of `lorax.methods.lora` that start where the adapter is, without dropout.

    Its weights, if it has any, are not in them. Raises ValueError for DoRA, and as `bind`.
    """
    trainable, constants = {}, {}
    for path, stack in _stacks(base, adapter.factors).items():
        if stack.has_m.any():
            raise ValueError(f"{path}: has DoRA magnitudes, which LoRA does not train")
        trainable[path] = {"a": jnp.asarray(stack.a), "b": jnp.asarray(stack.b)}
        constants[path] = {"s": jnp.asarray(stack.s), "dropout": jnp.zeros(stack.s.shape)}
    return methods.State(tree.unflatten(trainable), tree.unflatten(constants))


def from_state(base: Base, state: methods.State) -> Adapter:
    """Inverse of `state`: padding is cut off, a layer whose factors are both zero left out."""
    factors = {}
    shapes = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    for path, found in lora.factors(*state, base.params).items():
        a, b, s = (np.asarray(x, np.float32) for x in found[:3])
        for name, index in layer_names(path, base.sites[path], shapes[path]).items():
            used = np.flatnonzero(a[index].any(axis=0) | b[index].any(axis=1))
            if used.size:
                rank = used[-1] + 1
                factors[name] = Factors(a[index][:, :rank], b[index][:rank], float(s[index]))
    return Adapter(factors, {}, {})


def exported(method, state: methods.State, base: Base) -> Adapter:
    """The low-rank update and the weights of one member, layer by layer, padding cut off.

    A layer that the member does not adapt (both factors zero) is left out.
    """
    factors, weights = {}, {}
    shapes = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    for path, own in method.factors(*state, base.params, base.sites).items():
        a, b, s, m = (None if x is None else np.asarray(x, np.float32) for x in own)
        for name, index in layer_names(path, base.sites[path], shapes[path]).items():
            used = a[index].any(axis=0) | b[index].any(axis=1)
            if used.any():
                scale = method.hp.get("scale", s[index])  # as given, where s is it in float32
                lengths = None if m is None else m[index]
                factors[name] = Factors(a[index][:, used], b[index][used], float(scale), lengths)
    if any(factor.m is not None for factor in factors.values()):
        factors |= _lengths_beside(factors, base)
    for path, own in methods.joined(state.trainable).items():
        if "w" in own:
            weights |= parameter_layers(path, np.asarray(own["w"], np.float32), base)
    return Adapter(factors, weights, {})


def _lengths_beside(factors: dict[str, Factors], base: Base) -> dict[str, Factors]:
    """Factors of no rank with the base's own lengths, for what is not adapted but lies in one
    tensor with what is (GPT-2's k beside q and v): DoRA's file has the lengths of whole modules."""
    where, flat, found = sources(base), tree.flatten(base.params), {}
    at = {}  # (Hugging Face's name, index in the stack) -> the names of its parts
    for path, site in base.sites.items():
        for name, index in layer_names(path, site, flat[path].shape).items():
            at.setdefault((where[path].name, index), {})[name] = path
    for (_, index), parts in at.items():
        adapted = [name for name in parts if name in factors]
        for name, path in parts.items() if adapted else ():
            if name not in factors:
                site = base.sites[path]
                _, n_in, n_out = site.matrix_shape(flat[path].shape)
                a, b = np.zeros((n_in, 0), np.float32), np.zeros((0, n_out), np.float32)
                lengths = np.asarray(jnp.sqrt(ops.column_squares(flat[path], site))[index])
                found[name] = Factors(a, b, factors[adapted[0]].s, lengths)
    return found


# ------------------------------------------------------------------------------------ where it is


class _Stack(NamedTuple):
    """The factors of a base's parameter, float32: a (layers..., in, r), b (layers..., r, out),
    s (layers...), m (layers..., out) where has_m (layers...) bool."""

    a: np.ndarray
    b: np.ndarray
    s: np.ndarray
    m: np.ndarray
    has_m: np.ndarray


def _stacks(base: Base, factors: Mapping[str, Factors]) -> dict[str, _Stack]:
    """{parameter path: its layers' factors}; layers without any have zeros."""
    flat, stacks = tree.flatten(base.params), {}
    for path, layers in _by_path(base, factors).items():
        axes, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        rank = max(factor.a.shape[1] for _, _, factor in layers)
        zeros = lambda *shape, axes=axes, dtype=np.float32: np.zeros((*axes, *shape), dtype)
        stack = _Stack(
            zeros(n_in, rank), zeros(rank, n_out), zeros(), zeros(n_out), zeros(dtype=bool)
        )
        for _, index, (a, b, s, m) in layers:
            r = a.shape[1]
            stack.a[index][:, :r], stack.b[index][:r], stack.s[index] = a, b, s
            if m is not None:
                stack.m[index], stack.has_m[index] = m, True
        stacks[path] = stack
    return stacks


def _by_path(base: Base, factors: Mapping[str, Factors]) -> dict[str, list]:
    """{parameter path: [(layer, its index in the stack, factors)]}, shapes checked."""
    flat = tree.flatten(base.params)
    where = {
        name: (path, index)
        for path, site in base.sites.items()
        for name, index in layer_names(path, site, flat[path].shape).items()
    }
    found: dict[str, list] = {}
    for name, factor in factors.items():
        if name not in where:
            raise ValueError(f"{name}: {_none(base, 'layer', name, where)}")
        path, index = where[name]
        _, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        a, b, _, m = factor
        r = np.shape(a)[-1]
        if (
            np.shape(a) != (n_in, r)
            or np.shape(b) != (r, n_out)
            or np.shape(m) not in ((), (n_out,))
        ):
            lengths = "" if m is None else f", m {np.shape(m)}"
            raise ValueError(
                f"{name}: a {np.shape(a)}, b {np.shape(b)}{lengths} do not fit the base's "
                f"{n_in} x {n_out} matrix"
            )
        found.setdefault(path, []).append((name, index, factor))
    return found


def _replaced(base: Base, weights: Mapping[str, np.ndarray]) -> dict:
    """{path: leaf} of the base with `weights`, named by layer, in place of its own."""
    flat = tree.flatten(base.params)
    for path, i, value in _placed(base, weights):
        leaf = ops.dense(flat[path], base.sites.get(path))
        value = jnp.asarray(value).astype(leaf.dtype)
        flat[path] = value if i is None else leaf.at[i].set(value)
    return flat


def _placed(base: Base, weights: Mapping[str, np.ndarray]) -> list[tuple]:
    """[(parameter path, its layer or None, value)] of `weights`, shapes checked."""
    flat = tree.flatten(base.params)
    where: dict[str, tuple[str, int | None]] = {}
    for path, source in sources(base).items() if weights else ():
        first, _, rest = path.partition("/")
        stacked = "{}" in source.name
        for i in range(flat[path].shape[0]) if stacked else [None]:
            where[f"{first}/{i}/{rest}" if stacked else path] = path, i
    found = []
    for name, value in weights.items():
        if name not in where:
            raise ValueError(f"{name}: {_none(base, 'parameter', name, where)}")
        path, i = where[name]
        shape = flat[path].shape if i is None else flat[path].shape[1:]
        if np.shape(value) != shape:
            raise ValueError(f"{name}: {np.shape(value)} given, the base's has {shape}")
        found.append((path, i, value))
    return found


def _none(base: Base, kind: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that the base does not have."""
    return f"{base.name} has no such {kind}{nearest(name, known)}"


# --------------------------------------------------------------------------------------- tied heads


class _Head(NamedTuple):
    """What a tied model reads out with where it is not its embedding: path: of the embedding.
    weight: (V, features) in its place, or None. factors: of an update of it, or None."""

    path: str
    weight: np.ndarray | None
    factors: Factors | None


def _uses(base: Base, adapter: Adapter) -> tuple[Adapter, _Head | None]:
    """(the adapter without a tied head's own, that head where it is not the embedding).

    Raises ValueError for a task that the base has no head for.
    """
    check_task(base, adapter.config.get("task_type"))
    embedding = "" if getattr(base.config, "head", "") == "none" else Places(sources(base)).tied
    path = f"{embedding}/embedding"
    head, w_head = adapter.factors.get("lm_head"), adapter.weights.get("lm_head/kernel")
    own = head is not None or w_head is not None
    touched = embedding in adapter.factors or path in adapter.weights
    apart = touched and not adapter.config.get("ensure_weight_tying", True)
    if not embedding or not (own or apart):
        return adapter, None
    without = lambda named, name: {key: value for key, value in named.items() if key != name}
    weights = without(adapter.weights, "lm_head/kernel")
    rest = Adapter(without(adapter.factors, "lm_head"), weights, adapter.config)
    shape = tree.flatten(base.params)[path].shape
    if w_head is not None and w_head.T.shape != shape:
        raise ValueError(f"lm_head/kernel: {w_head.shape} given, the base's {shape[::-1]}")
    if head is not None and head.m is not None:
        raise ValueError("lm_head: DoRA of a head that is the embedding is not supported")
    twin = None if head is None else Factors(head.b.T, head.a.T, head.s)
    return rest, _Head(path, None if w_head is None else w_head.T, twin)


def _read_out(base: Base, head: _Head):
    """The leaf that a tied model with a head of its own reads out with."""
    leaf = tree.flatten(base.params)[head.path]
    if head.weight is not None:
        leaf = jnp.asarray(head.weight).astype(leaf.dtype)
    if head.factors is not None:
        own = {head.path.removesuffix("/embedding"): head.factors}
        twin = _stacks(base, own)[head.path]
        leaf = leaves.LowRank(leaf, *map(jnp.asarray, (twin.a, twin.b, twin.s)))
    return leaf
