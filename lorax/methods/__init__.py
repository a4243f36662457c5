"""Adaptation methods behind one contract, and how targets are named.

A method is three pure functions and a formula:

    init(key, params, ...) -> State(trainable, constants)  what is trained, what is only stored
    bind(trainable, constants, params, key) -> params      the model's parameters, with operators
    delta(trainable, constants, params) -> {path: dW}      the update
    count(params, ...) -> int                              trainable parameters, by the formula

`lorax.method("lora", rank=8)` gives the method with its hyperparameters filled in. To add one,
write a file beside `lora.py` with such a function and enter it in `METHODS`.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from lorax import ops, tree
from lorax.errors import nearest


class State(NamedTuple):
    """trainable: what the optimiser sees. constants: arrays that the method stores, untrained."""

    trainable: dict
    constants: dict


class Method(NamedTuple):
    """A method with its hyperparameters.

    name, hp: as given to `lorax.method`, defaults filled in.
    init(key, params, sites=None, targets=None, pad=None) -> State. targets: {path: Site} to have
        factors for (default: its own), pad: rank to pad to (default: its own); a sweep gives the
        union and the maximum, so that all its members have trees of one shape.
    bind(trainable, constants, params, key=None) -> params for `lorax.apply`. key: for dropout, in
        training.
    delta(trainable, constants, params, sites=None) -> {path: dW in the kernel's shape, float32}.
    count(params, sites=None) -> number of trainable parameters, padding not counted.
    """

    name: str
    hp: dict
    init: Callable
    bind: Callable
    delta: Callable
    count: Callable


from lorax.methods import lora  # noqa: E402  (its functions return the State and Method above)

#: name -> function of hyperparameters that returns the `Method`.
METHODS: dict[str, Callable[..., Method]] = {"lora": lora.lora}


def method(name: str, **hp) -> Method:
    """The method of that name, e.g. `method("lora", rank=8, alpha=8, targets=("q", "v"))`.

    Raises ValueError for an unknown name, an unknown hyperparameter or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(
            f"method.name: {name!r} is not one of {', '.join(METHODS)}{nearest(name, METHODS)}"
        )
    known = inspect.signature(METHODS[name]).parameters
    for field in hp:
        if field not in known:
            raise ValueError(
                f"method.{field}: {name} has no such hyperparameter, only {', '.join(known)}"
                f"{nearest(field, known)}"
            )
    return METHODS[name](**hp)


def merge(method: Method, state: State, params: dict, sites=None) -> dict:
    """Plain parameters with the update added, in float32 and rounded once to their own dtype."""
    sites = sites or ops.sites_from_shapes(params)
    flat = tree.flatten(method.bind(*state, params))
    return tree.unflatten({path: ops.dense(leaf, sites.get(path)) for path, leaf in flat.items()})


# ----------------------------------------------------------------------------------------- targets

#: Canonical words -> parameter paths (regex). Every model of `lorax.models` uses these names.
WORDS = {
    **{w: rf"(.*/)?{w}/kernel" for w in ("q", "k", "v", "o", "up", "gate", "down")},
    "embed": r"(.*/)?(wte|embed)/embedding",
    "head": r"(.*/)?lm_head/kernel",
}
#: Words for parameters that are trained as they are (`full`), beside those above.
FULL_WORDS = {"classifier": r"head/.*", "biases": r"(.*/)?bias", "norms": r"(.*/)?scale"}
GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("up", "gate", "down")}


def resolve(targets: tuple[str, ...], sites: Mapping[str, ops.Site]) -> dict[str, ops.Site]:
    """{path: Site} of what the words of `targets` mean among `sites`.

    A word is canonical (`WORDS`), a group ("attention", "mlp", "all-linear": every linear and
    convolution kernel but the heads), or "re:" and a regex that a whole path matches.
    Raises ValueError for a word that matches nothing and lists what there is.
    """
    if isinstance(targets, str):
        targets = (targets,)
    if not targets:
        raise ValueError(f"method.targets: empty; there is {_available(sites)}")
    chosen = set()
    for word in targets:
        if word == "all-linear":
            hits = [
                path
                for path, site in sites.items()
                if site.kind != "embed" and not re.fullmatch(rf"head/.*|{WORDS['head']}", path)
            ]
        else:
            try:
                patterns = [re.compile(p) for p in _patterns(word)]
            except re.error as error:
                raise ValueError(f"method.targets: {word!r} is no regex ({error})") from None
            hits = [path for path in sites if any(p.fullmatch(path) for p in patterns)]
        if not hits:
            known = [*WORDS, *GROUPS, "all-linear"]
            hint = "" if word in known else nearest(word, known)
            tied = " (a tied head is adapted through 'embed')" if word == "head" else ""
            raise ValueError(
                f"method.targets: {word!r} matches nothing{tied}; "
                f"there is {_available(sites)}{hint}"
            )
        chosen.update(hits)
    return {path: site for path, site in sites.items() if path in chosen}


def resolve_full(words: tuple[str, ...], params: dict) -> list[str]:
    """Paths of the parameters that the words name: those of `resolve`, "classifier", "biases",
    "norms", or "re:" and a regex. Raises ValueError for a word that matches nothing."""
    paths, chosen = list(tree.flatten(params)), set()
    known = FULL_WORDS | WORDS
    for word in words:
        try:
            patterns = [re.compile(p) for p in _patterns(word, known)]
        except re.error as error:
            raise ValueError(f"method.full: {word!r} is no regex ({error})") from None
        hits = [path for path in paths if any(p.fullmatch(path) for p in patterns)]
        if not hits:
            hint = "" if word in known else nearest(word, known)
            raise ValueError(
                f"method.full: {word!r} matches nothing; there is {', '.join(paths)}{hint}"
            )
        chosen.update(hits)
    return [path for path in paths if path in chosen]


def _patterns(word: str, known=WORDS) -> list[str]:
    if word.startswith("re:"):
        return [word.removeprefix("re:")]
    return [known[w] for w in GROUPS.get(word, (word,)) if w in known]


def _available(sites) -> str:
    words = [w for w, p in WORDS.items() if any(re.fullmatch(p, path) for path in sites)]
    return f"{', '.join(words)} and paths {', '.join(sites)}"


def active_layers(layers: tuple[int, ...] | None, targets: Mapping, shapes: Mapping) -> dict:
    """{path: boolean numpy array over the site's layer axes}: which layers a member adapts.

    layers: indices, negative ones from the end, or None for all. For a stacked weight they index
    its first axis; otherwise a weight's layer is the first number in its path ("h_3/attn/q").
    Raises ValueError for an index that no target has.
    """
    import numpy as np

    stacked = {path: shapes[path][: site.stack] for path, site in targets.items()}
    depth = max(
        [s[0] for s in stacked.values() if s]
        + [_layer(p) + 1 for p, s in stacked.items() if not s],
        default=0,
    )
    if layers is not None:
        bad = [i for i in layers if not -depth <= i < depth]
        if bad or not layers:
            raise ValueError(f"method.layers: {bad or '()'} given, the targets have {depth} layers")
        layers = {i % depth for i in layers}
    active = {}
    for path, axes in stacked.items():
        mask = np.ones(axes, bool)
        if layers is not None and axes:
            mask[[i for i in range(axes[0]) if i not in layers]] = False
        elif layers is not None:
            mask = np.asarray(_layer(path) in layers)
        active[path] = mask
    if not any(mask.any() for mask in active.values()):
        raise ValueError(f"method.layers: {sorted(layers)} leave nothing of {', '.join(targets)}")
    return active


def _layer(path: str) -> int:
    number = re.search(r"(?:^|[/_])(\d+)(?=/|$)", path)
    return int(number.group(1)) if number else -1


def key_for(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, the same whatever other paths there are."""
    import zlib

    return jax.random.fold_in(key, zlib.crc32(path.encode()))
