"""`save`: a `Base` -> a model directory in Hugging Face's layout."""

import collections
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lorax import ops, tree, vocabulary
from lorax.files import atomically, read_json, write_json
from lorax.interop import hf
from lorax.models import custom
from lorax.models.base import Base
from lorax.models.families import FAMILIES
from lorax.vocabulary import Vocabulary


def save(directory: str | Path, base: Base, dtype=None) -> None:
    """Write a base model as transformers reads it; inverse of `load`.

    A base that was loaded from a directory keeps what is not ours: the other fields of its
    config.json, its `hf.SIDE` files, and the dtype that each weight has there. 4-bit weights are
    decoded. dtype: of all weights, in place of the files'. A base of the user's own: see
    `custom.save`.

    Raises ValueError that names the tensor, before anything is written, for weights that are NaN or
    infinite, or that are too large for their dtype.
    """
    directory, flat = Path(directory), tree.flatten(base.params)
    if custom.is_custom(base.name):
        if dtype is not None:
            flat = {path: leaf.astype(dtype) for path, leaf in flat.items()}
        return custom.save(directory, base.replace(params=tree.unflatten(flat)))
    flat = {path: ops.dense(leaf, base.sites.get(path)) for path, leaf in flat.items()}
    dtypes = stored_dtypes(base) if dtype is None else dict.fromkeys(flat, jnp.dtype(dtype))
    sizes = collections.Counter()
    for path, leaf in flat.items():
        sizes[dtypes[path].name] += leaf.size
    stated = sizes.most_common(1)[0][0]
    config = dict(base.traits.config)
    if base.directory is not None:
        theirs = read_json(base.directory / "config.json")
        config = _carried(theirs, config, base)
        if dtype is None:
            stated = theirs.get("dtype") or theirs.get("torch_dtype") or stated
    if base.directory is not None or stated != "float32":
        config |= {"dtype": stated, "torch_dtype": stated}  # transformers 5's word, and 4's
    ids = _special_ids(base.vocabulary) if _new_vocabulary(base) else {}
    hf.write(directory, config | ids, base.sources, flat, dtypes)
    for pattern in hf.SIDE if base.directory is not None else ():
        for file in base.directory.glob(pattern):
            copy = lambda temporary, file=file: shutil.copyfile(file, temporary)
            atomically(directory / file.relative_to(base.directory), copy)
    if ids:
        atomically(directory / "tokenizer.json", lambda tmp: base.tokenizer.save(str(tmp)))
        generation = directory / "generation_config.json"
        if generation.exists():
            write_json(generation, read_json(generation) | ids)


def stored_dtypes(base: Base) -> dict[str, np.dtype]:
    """{path: dtype} that `save` writes in: that of the files which the base was loaded from, and of
    the parameter itself where they hold none, or codes of 4 bits."""
    flat = tree.flatten(base.params)
    own = {path: np.dtype(leaf.dtype) for path, leaf in flat.items()}
    if base.directory is None:
        return own
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    return own | hf.dtypes(base.directory, base.sources, shapes)


def _carried(theirs: dict, ours: dict, base: Base) -> dict:
    """A config.json that says of a base what `ours` does, with all else as in `theirs`."""
    source, _ = FAMILIES[base.family]
    try:
        said = source.hf_config(source.config_from_hf(theirs))
    except ValueError:  # made for a head that is none of ours; this one has been given another
        said = {}
    new = {name: x for name, x in ours.items() if name not in said or said[name] != x}
    gone = {"quantization_config"} | (
        {"num_labels", "problem_type"} if "id2label" in new else set()
    )
    kept = {name: x for name, x in theirs.items() if name not in gone}
    kept = {name: x for name, x in kept.items() if x is not None or name not in ours}
    return ours | kept | new | {"architectures": ours["architectures"]}


def _new_vocabulary(base: Base) -> bool:
    """Whether a base has a vocabulary, and no directory of its own that holds it."""
    own = base.vocabulary
    there = vocabulary.read(base.directory, own.rows) if own and base.directory else None
    if there is None:
        return own is not None
    return own[1:] != there[1:] or own.tokenizer.to_str() != there.tokenizer.to_str()


def _special_ids(vocabulary: Vocabulary) -> dict:
    """The fields of a config.json that say what ids mean; inverse of `vocabulary.read`."""
    found = {"pad_token_id": vocabulary.pad}
    if vocabulary.ends:
        found["eos_token_id"] = vocabulary.end if len(vocabulary.ends) == 1 else [*vocabulary.ends]
    if vocabulary.start:
        found["bos_token_id"] = vocabulary.start[0]
    return found
