"""`load`: a shipped model, a Hugging Face directory or a Hub id -> `Base`."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from lorax import fields, intercept, tree, vocabulary
from lorax.errors import nearest
from lorax.files import read_json
from lorax.interop import hf
from lorax.models.base import Base
from lorax.models.families import FAMILIES, WHOLE, traits
from lorax.models.shapes import architecture
from lorax.quant import bnb

ASSETS = Path(__file__).parent.parent / "assets"

#: What is read of a config.json of any family, and of its "quantization_config".
DESCRIBED = {
    "model_type": fields.TEXT,
    "architectures": fields.optional(fields.TEXTS),
    "quantization_config": fields.optional(fields.OBJECT),
}
CODED = {"load_in_4bit": fields.FLAG, "quant_method": fields.TEXT}


def load(name: str, dtype: str = "float32", param_dtype=jnp.float32, **run) -> Base:
    """Load a base model.

    name: a shipped model ("gpt2-nano"), a directory in Hugging Face's layout, or a Hub id. With
    "random:" in front the architecture is taken and the weights are drawn as its authors would
    have, from seed 0, or from seed 3 for "random:mnist-fc@3"; that goes for the names that
    `shapes.architecture` knows as well. dtype: of the computation. param_dtype: of the weights.
    run: further fields of the family's Config: how to run it (`remat`, `unroll`) or, for an
    encoder, which head it has (`head="classification"`, `labels=2`; drawn at random where the files
    have none).

    Raises ValueError or FileNotFoundError with what was given and what would be right.
    """
    random = name.startswith("random:")
    base, directory, init = _build(name, not random, dtype, param_dtype, run)
    shapes, fresh = tree.flatten(base.params), base.fresh
    if random:
        params = jax.tree.map(lambda x: x.astype(param_dtype), jax.jit(init)())
        sha256 = "random"
    else:
        head = tuple(path for path in shapes if path.startswith("head/"))
        sizes = {path: leaf.shape for path, leaf in shapes.items()}
        where = base.sources
        flat = bnb.read(directory, where, sizes)
        _check_size(base, directory)
        where = {path: own for path, own in where.items() if path not in flat}
        flat |= hf.read(directory, where, sizes, param_dtype, optional=head)
        fresh = tuple(path for path in head if path not in flat)
        if fresh:
            drawn = tree.flatten(jax.jit(lambda: init()["head"])())
            flat |= {path: drawn[path.removeprefix("head/")].astype(param_dtype) for path in fresh}
        params = tree.unflatten({path: flat[path] for path in shapes})
        sha256 = _sha256(hf.weight_files(directory))
    rows = getattr(base.config, "vocab_size", None)
    words = vocabulary.read(directory, rows) if directory else None
    own = None if random else directory
    return base.replace(params=params, vocabulary=words, sha256=sha256, fresh=fresh, directory=own)


def skeleton(name: str, dtype: str = "float32", param_dtype=jnp.float32, **run) -> Base:
    """`load` without the weights: of the files only config.json is read, `params` is a tree of
    `jax.ShapeDtypeStruct`, and `fresh` is what config.json lets expect. Arguments and errors as for
    `load`."""
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


def config_fields(family: str) -> tuple[str, ...]:
    """Names of the fields of a family's Config."""
    _, model = FAMILIES[family]
    return tuple(model.__dataclass_fields__["config"].type.__dataclass_fields__)


def find(name: str, weights: bool = True) -> Path:
    """The directory of a shipped model, a local path or a Hub id (fetched or from its cache)."""
    shipped = sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").exists())
    if name in shipped:
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"base: {path} is a directory without config.json")
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"base: no directory {name}")
    return _from_hub(name, weights, shipped)


def _from_hub(name: str, weights: bool, shipped: list[str]) -> Path:
    from huggingface_hub import (
        snapshot_download,
    )  # a second of imports that local models don't need

    files = [*vocabulary.FILES, *hf.SIDE] + ["*.safetensors*"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the Hub's own, the network's and the cache's: all mean "not here"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = nearest(name, shipped)
        raise FileNotFoundError(
            f"base: {name!r} is neither shipped ({', '.join(shipped)}), nor a directory, and the "
            f"Hub did not give it ({type(error).__name__}: {reason[:120]}){hint}. Download "
            f"https://huggingface.co/{name} (config.json, model.safetensors, tokenizer.json) and "
            f"pass that directory."
        ) from None


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
