"""`load`: a shipped model, a Hugging Face directory or a Hub id -> `Base`."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from lorax import fields, intercept, memory, outside, tree, vocabulary
from lorax.errors import nearest
from lorax.files import read_json
from lorax.interop import hf
from lorax.models import custom
from lorax.models.base import Base
from lorax.models.directories import find
from lorax.models.families import FAMILIES, WHOLE, traits
from lorax.models.shapes import architecture
from lorax.quant import bnb

#: What is read of a config.json of any family, and of its "quantization_config".
DESCRIBED = {
    "model_type": fields.TEXT,
    "architectures": fields.optional(fields.TEXTS),
    "quantization_config": fields.optional(fields.OBJECT),
}
CODED = {"load_in_4bit": fields.FLAG, "quant_method": fields.TEXT}


def load(name, dtype: str = "float32", param_dtype=jnp.float32, **run) -> Base:
    """Load a base model.

    name: a shipped model ("gpt2-nano"), a directory in Hugging Face's layout, or a Hub id. With
    "random:" in front the architecture is taken and the weights are drawn as its authors would
    have, from seed 0, or from seed 3 for "random:mnist-fc@3"; that goes for the names that
    `shapes.architecture` knows as well. A function that returns a Linen module, or its name
    "FILE.py:function", is a model of the user's own (`models.custom`).
    dtype: of the computation. param_dtype: of the weights. run: further fields of the family's
    Config: how to run it (`remat`, `unroll`) or, for an encoder, which head it has
    (`head="classification"`, `labels=2`; drawn at random where the files have none); of a function,
    arguments that it takes.

    Raises ValueError or FileNotFoundError with what was given and what would be right, MemoryError
    if the weights have no room.
    """
    name = outside.spell(name, "base")
    if custom.is_custom(name):
        return custom.load(name, dtype, param_dtype, run)
    random = name.startswith("random:")
    base, directory, init = _build(name, not random, dtype, param_dtype, run)
    rows = getattr(base.config, "vocab_size", None)
    base = base.replace(vocabulary=vocabulary.read(directory, rows) if directory else None)
    if random:
        _check_room(name, jax.tree.leaves(base.params))
        params = jax.tree.map(lambda x: x.astype(param_dtype), jax.jit(init)())
        return base.replace(params=params, sha256="random")
    params, fresh = _read(base, directory, param_dtype, init)
    sha256 = _sha256(hf.weight_files(directory))
    return base.replace(params=params, sha256=sha256, fresh=fresh, directory=directory)


def _read(base: Base, directory: Path, param_dtype, init) -> tuple[dict, tuple[str, ...]]:
    """(params of the files, paths of a head that they lack, which `init` has drawn)."""
    arrays = tree.flatten(base.params)
    shapes = {path: x.shape for path, x in arrays.items()}
    head = tuple(path for path in shapes if path.startswith("head/"))
    flat = bnb.read(directory, base.sources, shapes)
    _check_size(base, directory)
    rest = {path: source for path, source in base.sources.items() if path not in flat}
    _check_room(base.name, [arrays[path] for path in rest])
    flat |= hf.read(directory, rest, shapes, param_dtype, optional=head)
    fresh = tuple(path for path in head if path not in flat)
    if fresh:
        drawn = tree.flatten(jax.jit(lambda: init()["head"])())
        flat |= {path: drawn[path.removeprefix("head/")].astype(param_dtype) for path in fresh}
    return tree.unflatten({path: flat[path] for path in shapes}), fresh


def skeleton(name, dtype: str = "float32", param_dtype=jnp.float32, **run) -> Base:
    """`load` without the weights: of the files only config.json is read, `params` is a tree of
    `jax.ShapeDtypeStruct`, and `fresh` is what config.json lets expect. Arguments and errors as for
    `load`."""
    name = outside.spell(name, "base")
    if custom.is_custom(name):
        return custom.skeleton(name, dtype, param_dtype, run)
    return _build(name, False, dtype, param_dtype, run)[0]


def _build(name: str, weights: bool, dtype, param_dtype, run: dict):
    """(`Base` whose params are shapes, its directory or None, init() -> float32 params)."""
    random, (bare, seed) = name.startswith("random:"), _seeded(name)
    shaped = architecture(bare) if random and not Path(bare).is_dir() else None
    if shaped:
        directory, raw = None, shaped
    elif not Path(bare).is_dir() and (architecture(bare) or {}).get("model_type") in WHOLE:
        raise FileNotFoundError(f"base: {name} has no weights to load; random:{name} draws some")
    else:
        directory = find(bare, weights)
        raw = read_json(directory / "config.json")
    family = family_of(name, raw)
    config = config_of(name, raw, dtype=dtype, **run)
    _, model = FAMILIES[family]
    module = model(config)
    # Traced, not made: images may be large.
    about = traits(family, config)
    init = lambda: module.init(jax.random.key(seed), about.example())["params"]
    stored = lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype)
    params = jax.tree.map(stored, jax.eval_shape(init))
    sites = intercept.sites(module, params, jax.eval_shape(about.example))
    in_files = "SequenceClassification" in str(raw.get("architectures"))
    found = not random and (in_files or getattr(config, "head", None) != "classification")
    head = tuple(p for p in tree.flatten(params) if p.startswith("head/"))
    fresh = () if found or family in WHOLE else head
    return Base(module, params, config, None, sites, family, name, "", fresh), directory, init


def family_of(name: str, raw: Mapping) -> str:
    """Hugging Face's model_type of a `config.json`'s fields, one of `FAMILIES`.

    Raises ValueError for any other, and for weights in a form that can't be read."""
    place = f"base: {name}"
    found = fields.read(raw, DESCRIBED, place)
    family = found.get("model_type")
    if family == custom.MODEL_TYPE:
        raise ValueError(
            f"{place}: holds the weights of a module that a Python function returns, which a file "
            f"must not choose; load them as FILE.py:function@{name}"
        )
    if family not in FAMILIES:
        known = f"{', '.join(FAMILIES)}{nearest(str(family), FAMILIES)}"
        raise ValueError(f"{place}: model_type {family!r} is not one of {known}")
    coded = found.get("quantization_config") or {}
    coded = fields.read(coded, CODED, f"{place}: quantization_config")
    if found.get("quantization_config") and not coded.get("load_in_4bit"):
        raise ValueError(
            f"{place}: quantization_config: {coded.get('quant_method')!r} is not supported; "
            "bitsandbytes' 4 bits are, and weights in float32, float16 or bfloat16"
        )
    return family


def config_of(name: str, raw: Mapping, **run):
    """The family's Config of a `config.json`'s fields; run: as for `load`, with `dtype`.

    Raises ValueError that names the base, the field, what was given and what would be right.
    """
    family = family_of(name, raw)
    unknown = [field for field in run if field not in config_fields(family)]
    if unknown:
        why = ": only encoders take a head for texts with labels" if "head" in unknown else ""
        raise ValueError(f"base: {name} ({family}) has no {', '.join(unknown)} to set{why}")
    try:
        return FAMILIES[family][0].config_from_hf(raw, **run)
    except ValueError as error:
        raise ValueError(f"base: {name}: {error}") from None


def _check_room(name: str, arrays) -> None:
    """Raises MemoryError if weights have no room; nothing is allocated. arrays: their shapes."""
    needs, there = tree.nbytes(arrays), memory.free()
    if needs > there.bytes:
        stored = arrays[0].dtype.name
        smaller = ", or param_dtype=bfloat16" * (stored == "float32")
        raise MemoryError(
            f"base: {name} has {needs / 1e9:.2f} GB of weights in {stored} and "
            f"{there.bytes / 1e9:.2f} GB {there.limit}; take a smaller base{smaller}"
        )


def _check_size(base: Base, directory: Path) -> None:
    """ValueError where the files can't hold as many parameters as config.json says, before any of
    them is allocated."""
    flat = tree.flatten(base.params)
    expected = sum(leaf.size for path, leaf in flat.items() if path not in base.fresh)
    held = 2 * sum(file.stat().st_size for file in hf.weight_files(directory))  # 4 bits each
    if expected > held:
        sizes = dataclasses.asdict(base.config).items()
        sizes = ", ".join(f"{k} {v}" for k, v in sizes if isinstance(v, int | tuple) and v)
        raise ValueError(
            f"{directory / 'config.json'}: its sizes make {expected:,} parameters, more than "
            f"{held:,}, the most that the weight files have bytes for ({sizes})"
        )


def _seeded(name: str) -> tuple[str, int]:
    """(name without "random:" and "@3", 3) of "random:gpt2@3"; seed 0 of a name without one.

    A directory that is called so is one. Raises ValueError for a seed that is none.
    """
    bare = name.removeprefix("random:")
    before, at, seed = bare.rpartition("@")
    if not at or bare == name or Path(bare).is_dir():
        return bare, 0
    if not seed.isdecimal() or int(seed) >= 2**31:
        raise ValueError(
            f"base: {name}: {seed!r} given as the seed behind @, it must be a whole number below "
            "2**31"
        )
    return before, int(seed)


def has_choice_of_head(name: str) -> bool:
    """Whether a base is an encoder that `load` gives one of several heads. Raises as `load`."""
    if custom.is_custom(name):
        return custom.takes_labels(name)
    raw = read_json(find(name, weights=False) / "config.json")
    return "head" in config_fields(family_of(name, raw))


def config_fields(family: str) -> tuple[str, ...]:
    """Names of the fields of a family's Config."""
    _, model = FAMILIES[family]
    return tuple(model.__dataclass_fields__["config"].type.__dataclass_fields__)


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
