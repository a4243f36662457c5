"""`save`: a `Base` -> a model directory in Hugging Face's layout."""

import collections
import dataclasses
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lorax import chat_files, gather, ops, tree, vocabulary
from lorax.files import atomically, read_json, write_json
from lorax.interop import hf
from lorax.models import custom
from lorax.models.base import Base
from lorax.models.families import FAMILIES
from lorax.vocabulary import Vocabulary


def save(directory: str | Path, base: Base, dtype=None) -> None:
    """Write a base model in the format that transformers reads; inverse of `load`.

    A base that was loaded from a directory keeps what lorax doesn't use: the other fields of its
    config.json, its `hf.SIDE` files, and the dtype of each weight there. 4-bit weights are decoded.
    Weights are gathered layer by layer, if a mesh of devices divides them; all processes must call
    it together, and the first one writes. More than 5 GB make several files (`hf.FILE`).
    The part of a model that reads images is copied from the directory. dtype: of all weights,
    instead of the files'. For a user's base see `custom.save`.

    Raises ValueError for random weights of a model with such a part, and ValueError that names the
    tensor, before anything is written, for weights that are NaN or infinite, or too large for their
    dtype.
    """
    directory, flat = Path(directory), tree.flatten(base.params)
    if custom.is_custom(base.name):
        if dtype is not None:
            flat = {path: leaf.astype(dtype) for path, leaf in flat.items()}
        return custom.save(directory, base.replace(params=tree.unflatten(flat)))
    images = _images(base, dtype)
    flat = {path: Weight(leaf, base.sites.get(path)) for path, leaf in flat.items()}
    dtypes = stored_dtypes(base) if dtype is None else dict.fromkeys(flat, jnp.dtype(dtype))
    sizes = collections.Counter()
    for path, leaf in flat.items():
        sizes[dtypes[path].name] += math.prod(leaf.shape)
    stated = sizes.most_common(1)[0][0]
    config = dict(base.traits.config)
    if base.directory is not None:
        theirs = read_json(base.directory / "config.json")
        config = _carried(theirs, config, base)
        if dtype is None:
            stated = theirs.get("dtype") or theirs.get("torch_dtype") or stated
    if "_class_name" not in config and (base.directory is not None or stated != "float32"):
        config |= {"dtype": stated, "torch_dtype": stated}  # the key of transformers 5, and of 4
    ids = _special_ids(base.vocabulary) if _new_vocabulary(base) else {}
    hf.write(directory, config | ids, base.sources, flat, dtypes, images)
    for pattern in hf.SIDE if base.directory is not None else ():
        for file in base.directory.glob(pattern):
            copy = lambda temporary, file=file: shutil.copyfile(file, temporary)
            atomically(directory / file.relative_to(base.directory), copy)
    if ids:
        atomically(directory / "tokenizer.json", lambda tmp: base.tokenizer.save(str(tmp)))
        chat_files.write(directory, base.vocabulary.templates, base.vocabulary.special)
        generation = directory / "generation_config.json"
        if generation.exists():
            write_json(generation, read_json(generation) | ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A parameter whose layers are gathered and decoded one at a time. site: None if no operator
    leaf can be there."""

    leaf: object
    site: ops.Site | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def __getitem__(self, index: tuple[int, ...]):
        """One layer's array. index: along the leading axes, () for all of it."""
        return gather.decoded(self.leaf, self.site, index)


def _images(base: Base, dtype) -> dict[str, np.ndarray]:
    """{name: tensor} of the part of the base that reads images."""
    if base.directory is not None:
        images = hf.images(base.directory)
        return {name: x.astype(dtype or x.dtype) for name, x in images.items()}
    if "text_config" in base.traits.config:
        raise ValueError(
            f"base: {base.name}: {base.family} has a part that reads images, of which there are no "
            "random weights; save a base with a model_type of text alone"
        )
    return {}


def stored_dtypes(base: Base) -> dict[str, np.dtype]:
    """{path: dtype} that `save` writes: the dtype in the files that the base was loaded from, or
    the parameter's own where the files lack it or hold 4-bit codes."""
    flat = tree.flatten(base.params)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in flat.items()}
    if base.directory is None:
        return dtypes
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    return dtypes | hf.dtypes(base.directory, base.sources, shapes)


def _carried(theirs: dict, ours: dict, base: Base) -> dict:
    """`theirs`, the original config.json, updated with what `ours` says about the base."""
    source, _ = FAMILIES[base.family]
    try:
        understood = source.hf_config(source.config_from_hf(theirs))
    except ValueError:  # made for a head that lorax lacks; the base has another one
        understood = {}
    new = {name: x for name, x in ours.items() if name not in understood or understood[name] != x}
    dropped = {"quantization_config"} | (
        {"num_labels", "problem_type"} if "id2label" in new else set()
    )
    carried = {name: x for name, x in theirs.items() if name not in dropped}
    carried = {name: x for name, x in carried.items() if x is not None or name not in ours}
    # Models of arrays, which transformers does not have, name no architecture.
    return ours | carried | new | {k: ours[k] for k in ("architectures",) if k in ours}


def _new_vocabulary(base: Base) -> bool:
    """Whether a base has a vocabulary that differs from the one in its directory, if any."""
    current = base.vocabulary
    on_disk = vocabulary.read(base.directory, current.rows) if current and base.directory else None
    if on_disk is None:
        return current is not None
    return current[1:] != on_disk[1:] or current.tokenizer.to_str() != on_disk.tokenizer.to_str()


def _special_ids(vocabulary: Vocabulary) -> dict:
    """The special-id fields of a config.json; inverse of `vocabulary.read`."""
    ids = {"pad_token_id": vocabulary.pad}
    if vocabulary.ends:
        ids["eos_token_id"] = vocabulary.end if len(vocabulary.ends) == 1 else [*vocabulary.ends]
    if vocabulary.start:
        ids["bos_token_id"] = vocabulary.start[0]
    return ids
