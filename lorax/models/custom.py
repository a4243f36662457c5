"""A base model of your own: a Python function that returns a Linen or an NNX module.

    def tiny():
        return Tiny(vocab_size=1024, width=64, depth=2)

`load(tiny)`, `config.base = tiny` and `--config.base="FILE.py:tiny"` make a `Base` of it, with
random weights from seed 0 ("FILE.py:tiny@3": seed 3). A function that returns a `Model` can say
more: where its weights come from, which tokenizer it uses, what its layers are called.
"""

import dataclasses
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax import hosts, intercept, ops, outside, tree, vocabulary
from lorax.errors import nearest
from lorax.files import write_json
from lorax.interop import hf, tensors
from lorax.interop.tensors import check_weight, opened, stored
from lorax.models import room, streaming
from lorax.models.base import Base
from lorax.models.directories import find
from lorax.models.families import Traits
from lorax.models.layers import Cache, causal_context, empty_cache, put
from lorax.vocabulary import Vocabulary

#: model_type in the config.json that `save` writes for a user's module.
MODEL_TYPE = "lorax-function"
#: Words that `Model.targets` may define.
WORDS = ("q", "k", "v", "o", "up", "gate", "down", "embed", "head")


class Model(NamedTuple):
    """What a user's function returns; a bare module is `Model(module)`.

    module: Linen or NNX module, of tokens (B, T) int32 -> logits (B, T, V) or of arrays (B, ...)
        float32 -> scores (B, k). All variables of a Linen module are in the collection "params".
    inputs: an example input, integer tokens (B, T) or float arrays (B, ...); None: one token.
    vocabulary: directory with tokenizer.json (and config.json, for the ids that end a text), a
        shipped model's name, or a `Vocabulary`; None: the model can't read texts.
    weights: function without arguments that returns the tree of params, or {path: array} with
        paths like "blocks/mlp/up/kernel"; None: the module's initializers draw them from a seed, or
        the values that an NNX module has.
    positions: the longest input in tokens, None without a limit.
    targets: {canonical word: end of the module's path, or "re:" and a regex of parameter paths}:
        {"q": "query", "up": "re:.*/ffn/in/kernel"}. Layers called q, k, v, o, up, gate, down need
        no entry, and a layer's own name is always a target.
    cached: whether the module has `hidden`, `logits`, `empty_cache` and `head` like `gpt2.GPT2`:
        then training never holds all logits, and generation computes each token once. Not for
        NNX.
    """

    module: object
    inputs: object = None
    vocabulary: str | Path | Vocabulary | None = None
    weights: Callable[[], Mapping] | None = None
    positions: int | None = None
    targets: Mapping[str, str] = {}
    cached: bool = False


class Given(NamedTuple):
    """A user's base as requested. seed: of random weights; file: to read the weights from, instead
    of the function's own reader, or None; drawn: whether the name begins with "random:"."""

    name: str
    function: Callable
    model: Model
    seed: int
    file: Path | None
    drawn: bool


def is_custom(name) -> bool:
    """Whether a base's name is that of a function: "FILE.py:function", with or without "@..."."""
    return outside.base_name(name) is not None


def save(directory: Path, base: Base) -> None:
    """Write the weights of a user's base: model.safetensors, with parameters named by their paths
    in the module and in their dtypes in `base`, and a config.json that names the function. `load`
    reads them as "FILE.py:function@directory"."""
    flat = tree.flatten(base.params)
    flat = {path: ops.dense(x, base.sites.get(path)) for path, x in flat.items()}
    for path, x in flat.items():
        check_weight(hosts.whole(x), path, directory / hf.SINGLE, x.dtype)
    tensors.write(directory / hf.SINGLE, flat)
    function = outside.base_name(base.name).function
    write_json(directory / "config.json", {"model_type": MODEL_TYPE, "function": function})


def load(name: str, dtype: str, param_dtype, run: Mapping, place: Callable | None = None) -> Base:
    """As `models.load`, for "FILE.py:function"."""
    request = _call(name, dtype, run, whole=True)
    base, init = _shapes(request, param_dtype, run)
    shardings = place(base.params, base.sites) if place else None
    room.check(name, base.params, shardings)
    params = _weights(request, base, init, param_dtype, shardings)
    base = base.replace(
        params=params,
        vocabulary=_vocabulary(request, base),
        hashed=functools.cache(lambda: _sha256(params)),
    )
    if base.causal:
        _check_causal(base, request)
    return base


def skeleton(name: str, dtype: str, param_dtype, run: Mapping) -> Base:
    """As `models.load.skeleton`, for "FILE.py:function": nothing is allocated."""
    request = _call(name, dtype, run, whole=False)
    base = _shapes(request, param_dtype, run)[0]
    return base.replace(vocabulary=_vocabulary(request, base))


# --------------------------------------------------------------------------------- the function


def _call(name: str, dtype: str, run: Mapping, whole: bool) -> Given:
    """Call the function with dtype and the fields of run, as far as it takes them. whole: False if
    shapes do for the weights of an NNX module."""
    place, (spelled, suffix, random) = f"base: {name}", outside.base_name(name)
    function = outside.resolve(spelled, "base")
    seed, file = 0, None
    if suffix is not None and suffix.isdecimal() and int(suffix) < 2**31:
        seed = int(suffix)
    elif suffix is not None:
        file = Path(suffix) / hf.SINGLE if Path(suffix).is_dir() else Path(suffix)
        if not file.is_file():
            raise FileNotFoundError(
                f"{place}: {suffix!r} given after @; expected a seed below 2**31, or a "
                f".safetensors file or a directory with {hf.SINGLE}"
            )
    takes = outside.takes(function)
    asked = {k: v for k, v in run.items() if k != "head"} | {"dtype": dtype}
    usual = {"dtype": "float32", "remat": "none", "unroll": 0}
    for field, value in asked.items():
        if field not in takes and value != usual.get(field):
            why = "the task's classes" if field == "labels" else f"{field}: {value!r} given"
            raise ValueError(f"{place}: {why}, but the function takes no argument {field!r}")
    asked = {k: v for k, v in asked.items() if k in takes}
    make = lambda: _model(outside.call(function, field=place, **asked, **_rngs(takes, seed)), place)
    model = None
    if not whole and "flax.nnx" in sys.modules:
        from lorax.models import nnx

        model = nnx.of_shapes(make)
    model = model or make()
    if outside.is_nnx(model.module) and seed and "rngs" not in takes:
        raise ValueError(f"{place}: @{seed} given, but the function takes no argument 'rngs'")
    return Given(name, function, model, seed, file, random)


def _model(returned, place: str) -> Model:
    """What a function returned, as a `Model`."""
    model = returned
    if isinstance(model, nn.Module) or outside.is_nnx(model):
        model = Model(model)
    elif isinstance(model, tuple) and not isinstance(model, Model) and len(model) == 2:
        model = Model(*model)
    if not isinstance(model, Model) or not (
        isinstance(model.module, nn.Module) or outside.is_nnx(model.module)
    ):
        raise ValueError(
            f"{place}: returns {type(model).__name__}, expected a flax.linen.Module, a "
            "flax.nnx.Module, a pair (module, example of its input) or a lorax.models.Model"
        )
    if model.cached and outside.is_nnx(model.module):
        raise ValueError(f"{place}: cached: True given, which is for Linen modules only")
    return model


def _rngs(takes, seed: int) -> dict:
    """The argument `rngs` of a function of an NNX module, if it takes one."""
    if "rngs" not in takes:
        return {}
    from flax import nnx

    return {"rngs": nnx.Rngs(seed)}


class Described(NamedTuple):
    """A module as lorax needs it. module: in Linen. init() -> its params; shapes: of these. sites,
    stacks: see `intercept.sites` and `_stacks`. packs: whether it takes segments. whole, notes: see
    `Traits`."""

    module: nn.Module
    init: Callable[[], dict]
    shapes: dict
    sites: dict[str, ops.Site]
    stacks: dict[str, tuple[int, int]]
    packs: bool
    whole: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _linen(request: Given, *inputs) -> Described:
    """A Linen module. inputs: shapes."""
    module = request.model.module
    zeros = lambda: [jnp.zeros(x.shape, x.dtype) for x in inputs]
    init = jax.jit(lambda: _only_params(module.init(jax.random.key(request.seed), *zeros())))
    shapes = jax.eval_shape(init)
    sites = intercept.sites(module, shapes, *inputs)
    packs = "segments" in outside.takes(type(module).__call__)
    return Described(module, init, shapes, sites, _stacks(module, shapes, *inputs), packs)


def _nnx(request: Given, *inputs) -> Described:
    """An NNX module. inputs: shapes."""
    from lorax.models import nnx

    given = request.model.module
    split = nnx.Split(given, *inputs)
    packs = "segments" in outside.takes(type(given).__call__)
    notes = [
        f"{kind} {', '.join(paths[:3])}{' ...' * (len(paths) > 3)}: frozen, in evaluation mode"
        for kind, paths in split.frozen.items()
    ]
    module, init, shapes = nnx.NNXModule(split), lambda: split.params, tree.shapes(split.params)
    about = split.sites, split.stacks, packs, split.whole, tuple(notes)
    return Described(module, init, shapes, *about)


def _shapes(request: Given, param_dtype, run: Mapping):
    """(`Base` whose params are shapes, init() -> its params in the module's own dtypes)."""
    model, place = request.model, f"base: {request.name}"
    example = _example(model, place)
    tokens = example.dtype == jnp.int32
    labels = run.get("labels")
    inputs = (example,) * (3 if labels else 1)  # an encoder's: tokens, segments, types
    with outside.blame(request.function, place):
        about = _nnx(request, *inputs) if outside.is_nnx(model.module) else _linen(request, *inputs)
        apply = lambda params, *inputs: about.module.apply({"params": params}, *inputs)
        out = jax.eval_shape(apply, about.shapes, *inputs)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), about.shapes)
    causal = bool(tokens) and not labels
    _check_output(place, out, example, causal)
    module = about.module
    if causal and not model.cached:
        module = Plain(module, about.packs)
    shapes = tree.flatten(about.shapes)
    source = lambda path: _source(
        path, about.sites.get(path), *about.stacks[path], shapes[path].shape
    )
    with outside.blame(request.function, place):
        sources = {path: source(path) for path in about.stacks}
    traits = Traits(
        causal=causal,
        input_shape=None if tokens else example.shape[1:],
        outputs=None if causal else out.shape[-1],
        positions=model.positions,
        head=model.module.head if causal and model.cached else (),
        packs=model.cached or module.packs if causal else False,
        sources=sources,
        whole=about.whole,
        notes=about.notes,
    )
    sites = _with_words(about.sites, model.targets, place)
    family = f"module {type(model.module).__name__}"
    base = Base(module, params, None, None, sites, family, request.name, traits=traits)
    return base, about.init


def _example(model: Model, place: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype, int32 or float32, of the example input."""
    if model.inputs is None:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)
    given = model.inputs if hasattr(model.inputs, "dtype") else np.asarray(model.inputs)
    shape, dtype = given.shape, given.dtype
    tokens = jnp.issubdtype(dtype, jnp.integer)
    if (tokens and len(shape) != 2) or (not tokens and len(shape) < 2):
        raise ValueError(
            f"{place}: inputs of shape {shape} {dtype} given, must be tokens (B, T) of integers or "
            "arrays (B, ...) of floats"
        )
    return jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)


def _only_params(variables: Mapping) -> dict:
    others = [name for name in variables if name != "params"]
    if others:
        raise ValueError(f"the module has a collection {others[0]!r}; only 'params' is supported")
    return variables.get("params", {})


def _check_output(place: str, out, inputs, causal: bool) -> None:
    right = "one array of floats"
    fits = isinstance(out, jax.ShapeDtypeStruct) and jnp.issubdtype(out.dtype, jnp.floating)
    if fits and causal:
        fits, right = out.ndim == 3 and out.shape[:2] == inputs.shape, "logits (B, T, V)"
    elif fits:
        fits, right = out.ndim == 2 and len(out) == len(inputs), "scores (B, k)"
    if not fits:
        returned = getattr(out, "shape", type(out).__name__)
        raise ValueError(
            f"{place}: the module returns {returned} for inputs {inputs.shape} {inputs.dtype}, "
            f"expected {right}"
        )


def _with_words(sites: Mapping, targets: Mapping[str, str], place: str) -> dict:
    """The sites, labelled with their canonical words."""
    sites = dict(sites)
    for word, meaning in targets.items():
        if word not in WORDS:
            raise ValueError(
                f"{place}: targets: {word!r} is not one of {', '.join(WORDS)}{nearest(word, WORDS)}"
            )
        regex = meaning.removeprefix("re:")
        if not meaning.startswith("re:"):
            regex = rf"(.*/)?{re.escape(meaning)}/(kernel|embedding)"
        hits = [path for path in sites if re.fullmatch(regex, path)]
        if not hits:
            raise ValueError(
                f"{place}: targets: {word!r}: {meaning!r} matches none of {', '.join(sites)}"
            )
        sites |= {path: sites[path]._replace(word=word) for path in hits}
    return sites


# --------------------------------------------------------------------------------------- weights


def _weights(request: Given, base: Base, init: Callable, param_dtype, shardings) -> dict:
    """The params, read or drawn, in param_dtype. shardings: as for `streaming.placed`."""
    in_order = lambda flat: tree.unflatten({p: flat[p] for p in tree.flatten(base.params)})
    rounded = lambda tree: jax.tree.map(lambda x: jnp.asarray(x).astype(param_dtype), tree)
    put = lambda params: params if shardings is None else hosts.place(params, shardings)
    if request.file is not None:
        read = lambda: _parameters(request.file, param_dtype)
        return streaming.placed(in_order(_checked(base, read, request)), shardings)
    if request.model.weights is not None and not request.drawn:
        flat = _checked(base, request.model.weights, request)
        for path, x in flat.items():
            check_weight(np.asarray(x), path, f"base: {request.name}: weights", param_dtype)
        return put(in_order(rounded(flat)))
    with outside.blame(request.function, f"base: {request.name}"):
        if outside.is_nnx(request.model.module):  # has its values
            return put(in_order(tree.flatten(rounded(init()))))
        return in_order(tree.flatten(rounded(streaming.drawn(init, shardings))))


def _parameters(file: Path, param_dtype) -> dict[str, hf.Parameter]:
    """{path: parameter} of a file that `save` has written. Raises as `opened`, and for a type other
    than float."""
    opened(file)
    return {
        path: hf.Parameter(hf.Source(path), {(): x.checked()}, x.shape, np.dtype(param_dtype))
        for path, x in stored(file).items()
    }


def _checked(base: Base, read: Callable, request: Given) -> dict:
    """{path: array or parameter} as read: exactly the module's, or ValueError."""
    place = f"base: {request.name}: weights"
    with outside.blame(request.function, place):
        arrays = read()
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{place}: {type(arrays).__name__} given, expected {{path: array}}")
    arrays = tree.flatten(arrays)
    if arrays and all(path.startswith("params/") for path in arrays):
        arrays = {path.removeprefix("params/"): x for path, x in arrays.items()}
    wanted = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    for path in (*wanted, *arrays):
        if path not in arrays:
            raise ValueError(f"{place}: {path!r} of the module is missing{nearest(path, arrays)}")
        if path not in wanted:
            raise ValueError(f"{place}: the module has no {path!r}{nearest(path, wanted)}")
        if np.shape(arrays[path]) != wanted[path]:
            raise ValueError(
                f"{place}: {path} has shape {np.shape(arrays[path])}, the module's is "
                f"{wanted[path]}"
            )
    return arrays


def _vocabulary(request: Given, base: Base) -> Vocabulary | None:
    """The model's vocabulary; a language model has embeddings for as many ids as it has logits."""
    wanted = request.model.vocabulary
    if wanted is None or isinstance(wanted, Vocabulary):
        return wanted
    directory = find(str(wanted), False)
    loaded = vocabulary.read(directory, _logits(base) if base.causal else None)
    if loaded is None:
        raise FileNotFoundError(
            f"base: {request.name}: vocabulary: no tokenizer.json in {directory}"
        )
    return loaded


def _logits(base: Base) -> int:
    example = jax.eval_shape(base.traits.examples)[0]
    out = jax.eval_shape(lambda p, x: base.module.apply({"params": p}, x), base.params, example)
    return out.shape[-1]


def _sha256(params: dict) -> str:
    """Hash of the weights' paths, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in tree.flatten(params).items():
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(hosts.whole(leaf)).tobytes())
    return digest.hexdigest()


def _check_causal(base: Base, request: Given) -> None:
    """Raises ValueError if a token changes the logits of earlier tokens."""
    length = min(8, base.positions or 8)
    first = jnp.zeros((1, length), jnp.int32)
    with outside.blame(request.function, f"base: {request.name}"):
        logits = lambda tokens: hosts.whole(base.module.apply({"params": base.params}, tokens))
        before, after = logits(first), logits(first.at[0, -1].set(1))
    scale = np.abs(before).max() + 1e-6
    if np.abs(before - after)[:, :-1].max(initial=0) > 1e-3 * scale:
        raise ValueError(
            f"base: {request.name}: the last token changes the logits of earlier tokens; a "
            "language model needs a causal mask"
        )


# ----------------------------------------------------------------------------- names of tensors


def _stacks(module: nn.Module, params: dict, *inputs) -> dict[str, tuple[int, int]]:
    """{parameter path: (number of leading layer axes, words of the path before the layer number)},
    from tracing one call: inside `nn.scan` a parameter has fewer axes."""
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    stacks = dict.fromkeys(shapes, (0, 0))

    def record(next_fun, args, kwargs, context):
        submodule = context.module
        inside = submodule.variables.get("params", {}) if submodule.scope is not None else {}
        for path, leaf in tree.flatten(dict(inside)).items():
            whole = "/".join((*submodule.path, path))
            fewer = len(shapes[whole]) - len(leaf.shape)
            if fewer > stacks[whole][0]:
                stacks[whole] = fewer, len(submodule.path)
        return next_fun(*args, **kwargs)

    def trace(params, *inputs):
        with nn.intercept_methods(record):
            return module.apply({"params": params}, *inputs)

    jax.eval_shape(trace, params, *inputs)
    return stacks


def _source(path: str, site, axes: int, depth: int, shape: tuple[int, ...]) -> hf.Source:
    """The tensor in a torch module with the same layer names: a stacked "blocks/mlp/up/kernel" is
    "blocks.{}.mlp.up.weight", and "block_3/mlp/up/kernel" is "block.3.mlp.up.weight"."""
    words = path.split("/")
    if axes > 1:
        raise ValueError(f"{path}: nn.scan or nn.vmap inside another is not supported")
    if axes:
        words.insert(depth, "{}")
    else:
        above = "/".join(words[:-2])
        words = (
            [*re.sub(r"_(\d+)(?=/|$)", r"/\1", above).split("/"), *words[-2:]] if above else words
        )
    layer = "/".join(words)
    order = None
    if site is not None and site.kind != "embed":  # torch has the outputs first
        *window, channels = site.ins if site.kind == "conv" else (*site.ins[1:], site.ins[0])
        theirs = (*site.outs, channels, *window)
        order = tuple(int(i) for i in np.argsort(theirs))
    last = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
    words[-1] = last.get(words[-1], words[-1])
    linear = site is not None and site.kind in ("linear", "other")
    window = None
    if site is not None and site.kind == "conv":
        window = tuple(shape[axes + i] for i in site.ins[:-1])
    return hf.Source(".".join(words), order, layer=layer, linear=linear, window=window)


class Plain(nn.Module):
    """Gives a user's causal module the methods of lorax's language models: its logits serve as the
    hidden states, and its cache is the text, which is computed again for every token."""

    model: nn.Module
    packs: bool
    head: ClassVar[tuple[str, ...]] = ()

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, tokens, segments=None):
        return self.hidden(tokens, segments)

    def hidden(self, tokens, segments=None, cache: Cache | None = None):
        """Logits (B, T, V) float32; with a cache, the pair (logits, cache with these tokens)."""
        if cache is None:
            extra = (segments,) if self.packs and segments is not None else ()
            return self.model(tokens, *extra).astype(jnp.float32)
        context = causal_context(tokens, segments, cache)
        text = put(cache.k[0], tokens[:, None, :, None], cache.length)
        real, columns = context.cache.real, context.positions
        flat = real.reshape(-1, real.shape[-1])  # a row for each text
        texts = jnp.repeat(text[:, 0, :, 0], len(flat) // len(text), axis=0)
        # Move what is not of the text behind it, where no causal model sees it.
        order = jnp.argsort(~flat, axis=1, stable=True)[:, : cache.room]
        logits = self.model(jnp.take_along_axis(texts, order, axis=1)).astype(jnp.float32)
        columns = columns.reshape(len(flat), -1)
        logits = jnp.take_along_axis(logits, columns[..., None], axis=1)
        logits = logits.reshape(*tokens.shape, -1)
        return logits, dataclasses.replace(context.cache, k=(text,), v=(text,))

    def logits(self, hidden):
        """The logits themselves: `hidden` returns them already."""
        return hidden

    @nn.nowrap
    def empty_cache(self, batch: int, room: int) -> Cache:
        """A cache of `room` columns with nothing in it."""
        return empty_cache(1, batch, room, 1, 1, jnp.int32)
