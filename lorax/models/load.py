"""`load`: a shipped model, a Hugging Face directory or a Hub id -> `Base`."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from lorax import fields, hosts, intercept, outside, tree, vocabulary
from lorax.errors import nearest
from lorax.files import read_json
from lorax.interop import hf
from lorax.models import custom, decoder_families, room, streaming
from lorax.models.base import Base
from lorax.models.directories import find
from lorax.models.families import ALIASES, FAMILIES, WHOLE, traits
from lorax.models.shapes import architecture
from lorax.quant import bnb, nf4

#: Fields read from any family's config.json, and from its "quantization_config".
DESCRIBED = {
    "model_type": fields.TEXT,
    "_class_name": fields.TEXT,
    "architectures": fields.optional(fields.TEXTS),
    "quantization_config": fields.optional(fields.OBJECT),
}
CODED = {"load_in_4bit": fields.FLAG, "quant_method": fields.TEXT}

#: (params as shapes, sites) -> the tree of the params' shardings, such as `sharding.shardings`.
Place = Callable[[dict, Mapping], dict]


def load(
    name,
    dtype: str = "float32",
    param_dtype=jnp.float32,
    place: Place | None = None,
    quant: str | None = None,
    double_quant: bool = False,
    **run,
) -> Base:
    """Load a base model.

    name: a shipped model ("gpt2-nano"), a directory in Hugging Face's or diffusers' layout (that of
    a pipeline means its U-Net or transformer), or a Hub id. With "random:" in front, builds the
    architecture with random weights, initialised as its authors do, from seed 0, or from seed 3 for
    "random:mnist-fc@3"; this also works for the names that `shapes.architecture` knows. A function
    that returns a Linen module, or its name "FILE.py:function", is a model of your own
    (`models.custom`).
    dtype: of the computation. param_dtype: of the weights. place: (shapes of the params, sites) ->
    tree of shardings, to divide the weights over devices (`lorax.sharding`); the same numbers, and
    no process reads or holds more than its devices' parts. None: JAX's default device. quant,
    double_quant: as `kind` and `double` of `lorax.quantize`, which gives the same; kernels in files
    are quantised layer by layer as they are read, so that they are never in memory. run: further
    fields of the family's Config: how to run it (`remat`, `unroll`) or, for an encoder, its head
    (`head="classification"`, `labels=2`; initialised at random if the files have none); for a
    function, its arguments.

    Raises ValueError or FileNotFoundError that names what was given and what is expected,
    MemoryError if the weights do not fit into memory.
    """
    name = outside.spell(name, "base")
    coded = functools.partial(_coded, quant, double_quant)
    if custom.is_custom(name):
        base = custom.load(name, dtype, param_dtype, run, place)
        return base.replace(params=coded(base.sites, base.params))
    random = name.startswith("random:")
    base, directory, init = _build(name, not random, dtype, param_dtype, run)
    base = base.replace(vocabulary=_vocabulary(base, directory))
    if random:
        shardings = place(base.params, base.sites) if place else None
        room.check(name, base.params, shardings)
        params = streaming.drawn(init, shardings)
        params = jax.tree.map(lambda x: x.astype(param_dtype), params)
        return base.replace(params=coded(base.sites, params), hashed=lambda: "random")
    files = {file: _version(file) for file in hf.weight_files(directory)}
    params, fresh = _read(base, directory, param_dtype, init, place, coded)
    # One process reads the files a second time, for all.
    hashed = functools.cache(lambda: hosts.of_first(_sha256, files))
    return base.replace(params=params, hashed=hashed, fresh=fresh, directory=directory)


def _coded(quant: str | None, double_quant: bool, sites, params) -> dict:
    """The params with linear kernels in `quant`; as they are for None."""
    return nf4.quantize(params, quant, double_quant, sites=sites) if quant else params


def _read(
    base: Base, directory: Path, param_dtype, init, place: Place | None, coded: Callable
) -> tuple[dict, tuple[str, ...]]:
    """(params from the files, paths of a head that they lack and that `init` initialises)."""
    flat, fresh = _in_files(base, directory, param_dtype)
    described = tree.unflatten(tree.flatten(base.params) | tree.shapes(flat))
    shardings = place(described, base.sites) if place else None
    final = jax.eval_shape(lambda params: coded(base.sites, params), described)
    room.check(base.name, final, place and place(final, base.sites))
    at = tree.flatten(shardings) if place else {}
    coming = {path: streaming.coming(x, at.get(path)) for path, x in flat.items()}
    if fresh:
        drawn = streaming.drawn(lambda: init()["head"], shardings and shardings["head"])
        drawn = tree.flatten(drawn)
        coming |= {path: drawn[path.removeprefix("head/")].astype(param_dtype) for path in fresh}
    params = tree.unflatten({path: coming[path] for path in tree.flatten(base.params)})
    return streaming.arrived(coded(base.sites, params)), fresh


def _in_files(base: Base, directory: Path, param_dtype) -> tuple[dict, tuple[str, ...]]:
    """({path: the parameter in the files, not yet read}, paths of a head that they lack)."""
    shapes = {path: x.shape for path, x in tree.flatten(base.params).items()}
    head = tuple(path for path in shapes if path.startswith("head/"))
    flat = nf4.by_words(bnb.parameters(directory, base.sources, shapes), base.sites)
    _check_size(base, directory)
    rest = {path: source for path, source in base.sources.items() if path not in flat}
    flat |= hf.parameters(directory, rest, shapes, param_dtype, optional=head)
    return flat, tuple(path for path in head if path not in flat)


def unread(name, param_dtype=jnp.float32, place: Place | None = None, **run) -> Base:
    """`load` of a model in Hugging Face's files that reads no weights yet: the arrays of `params`
    are `streaming.Readable`s, of which `lorax.models.kernels` reads a layer when it is asked for.
    Of random weights, a user's own model and one whose head the files lack: `load` itself."""
    name = outside.spell(name, "base")
    if custom.is_custom(name) or name.startswith("random:"):
        return load(name, param_dtype=param_dtype, place=place, **run)
    base, directory, _ = _build(name, True, "float32", param_dtype, run)
    base = base.replace(vocabulary=_vocabulary(base, directory))
    flat, fresh = _in_files(base, directory, param_dtype)
    if fresh:
        return load(name, param_dtype=param_dtype, place=place, **run)
    params = tree.unflatten({path: flat[path] for path in tree.flatten(base.params)})
    return base.replace(params=params, directory=directory)


def skeleton(name, dtype: str = "float32", param_dtype=jnp.float32, **run) -> Base:
    """`load` without the weights: reads only config.json and the tokenizer, `params` is a tree of
    `jax.ShapeDtypeStruct`, and `fresh` is inferred from config.json. Arguments and errors as for
    `load`."""
    name = outside.spell(name, "base")
    if custom.is_custom(name):
        return custom.skeleton(name, dtype, param_dtype, run)
    base, directory, _ = _build(name, False, dtype, param_dtype, run)
    return base.replace(vocabulary=_vocabulary(base, directory))


def _vocabulary(base: Base, directory: Path | None) -> vocabulary.Vocabulary | None:
    rows = getattr(base.config, "vocab_size", None)
    return vocabulary.read(directory, rows) if directory else None


def _build(name: str, weights: bool, dtype, param_dtype, run: dict):
    """(`Base` whose params are shapes, its directory or None, init() -> float32 params)."""
    random, (bare, seed) = name.startswith("random:"), _seeded(name)
    shaped = architecture(bare) if random and not Path(bare).is_dir() else None
    if shaped:
        directory, raw = None, shaped
    elif not Path(bare).is_dir() and (architecture(bare) or {}).get("model_type") in WHOLE:
        raise FileNotFoundError(f"base: {name} has no weights to load; use random:{name}")
    else:
        directory = find(bare, weights)
        raw = read_json(directory / "config.json")
    family = family_of(name, raw)
    config = config_of(name, raw, dtype=dtype, **run)
    _, model = FAMILIES[family]
    module = model(config)
    # Traced, not computed: images may be large.
    model_traits = traits(family, config)
    init = lambda: module.init(jax.random.key(seed), *model_traits.examples())["params"]
    stored = lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype)
    params = jax.tree.map(stored, jax.eval_shape(init))
    sites = intercept.sites(module, params, *jax.eval_shape(model_traits.examples))
    in_files = "SequenceClassification" in str(raw.get("architectures"))
    has_head = not random and (in_files or getattr(config, "head", None) != "classification")
    head = tuple(p for p in tree.flatten(params) if p.startswith("head/"))
    fresh = () if has_head or family in WHOLE else head
    return Base(module, params, config, None, sites, family, name, fresh=fresh), directory, init


def family_of(name: str, raw: Mapping) -> str:
    """Hugging Face's model_type, or diffusers' _class_name, from the fields of a `config.json`; one
    of `FAMILIES`.

    Raises ValueError for any other, and for weights in a format that can't be read."""
    place = f"base: {name}"
    described = fields.read(raw, DESCRIBED, place)
    said = "_class_name" if "_class_name" in described else "model_type"
    family = ALIASES.get(described.get(said), described.get(said))
    if family == custom.MODEL_TYPE:
        raise ValueError(
            f"{place}: holds the weights of a user's module, whose code a file may not choose; "
            f"load them as FILE.py:function@{name}"
        )
    if family not in FAMILIES:
        known = f"{', '.join(FAMILIES)}{nearest(str(family), FAMILIES)}"
        raise ValueError(f"{place}: {said} {family!r} is not one of {known}{_in_the_way(raw)}")
    coded = described.get("quantization_config") or {}
    coded = fields.read(coded, CODED, f"{place}: quantization_config")
    if described.get("quantization_config") and not coded.get("load_in_4bit"):
        raise ValueError(
            f"{place}: quantization_config: {coded.get('quant_method')!r} is not supported; "
            "supported are bitsandbytes' 4 bits, and weights in float32, float16 or bfloat16"
        )
    return family


def _in_the_way(raw: Mapping) -> str:
    """The end of an error for an unknown causal model: the fields that our decoder lacks."""
    causal = "CausalLM" in str(raw.get("architectures"))
    names = decoder_families.unread(raw) if causal else []
    if not names:
        return ""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"; no decoder among these computes with its {', '.join(names[:6])}{more}"


def config_of(name: str, raw: Mapping, **run):
    """The family's Config from the fields of a `config.json`; run: as for `load`, with `dtype`.

    Raises ValueError that names the base, the field, what was given and what is expected.
    """
    family = family_of(name, raw)
    unknown = [field for field in run if field not in config_fields(family)]
    if unknown:
        why = ": only encoders can have a classification head" if "head" in unknown else ""
        raise ValueError(f"base: {name} ({family}) has no setting {', '.join(unknown)}{why}")
    try:
        return FAMILIES[family][0].config_from_hf(raw, **run)
    except ValueError as error:
        raise ValueError(f"base: {name}: {error}") from None


def _check_size(base: Base, directory: Path) -> None:
    """Raises ValueError if the files are too small for the parameters that config.json describes,
    before any are allocated."""
    flat = tree.flatten(base.params)
    expected = sum(leaf.size for path, leaf in flat.items() if path not in base.fresh)
    held = 2 * sum(file.stat().st_size for file in hf.weight_files(directory))  # 4 bits each
    if expected > held:
        sizes = dataclasses.asdict(base.config).items()
        sizes = ", ".join(f"{k} {v}" for k, v in sizes if isinstance(v, int | tuple) and v)
        raise ValueError(
            f"{directory / 'config.json'}: its sizes make {expected:,} parameters, more than "
            f"the {held:,} that the weight files can hold ({sizes})"
        )


def _seeded(name: str) -> tuple[str, int]:
    """(bare name, seed): "random:gpt2@3" -> ("gpt2", 3); seed 0 for a name without one.

    A name that is a directory's is never split at "@". Raises ValueError for an invalid seed.
    """
    bare = name.removeprefix("random:")
    before, at, seed = bare.rpartition("@")
    if not at or bare == name or Path(bare).is_dir():
        return bare, 0
    if not seed.isdecimal() or int(seed) >= 2**31:
        raise ValueError(
            f"base: {name}: {seed!r} given as the seed after @; expected a whole number below 2**31"
        )
    return before, int(seed)


def has_choice_of_head(name: str) -> bool:
    """Whether a base in files is an encoder with a choice of heads in `load`. Raises as `load`."""
    raw = read_json(find(name, weights=False) / "config.json")
    return "head" in config_fields(family_of(name, raw))


def config_fields(family: str) -> tuple[str, ...]:
    """Names of the fields of a family's Config."""
    _, model = FAMILIES[family]
    return tuple(model.__dataclass_fields__["config"].type.__dataclass_fields__)


def _version(file: Path) -> tuple[int, int]:
    """Changes when a file is written: its size in bytes and its time in ns."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _sha256(files: Mapping[Path, tuple[int, int]]) -> str:
    """Hash of the content of files, which must have the versions that are given."""
    digest = hashlib.sha256()
    for file, version in files.items():
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
        if _version(file) != version:
            raise ValueError(f"{file}: it has changed since it was loaded; load it again")
    return digest.hexdigest()
