"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.
diffusers' has diffusion_pytorch_model.safetensors instead.

Weights are read in small blocks into the final arrays, so peak memory is the tree itself, and only
the parts that are asked for are read. The files are not mapped into memory as a whole: their pages
would count as the process's own, and to copy from them takes as long as to read.
Only safetensors are opened: a pickled `.bin` can run code and is refused.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax import hosts
from lorax.devices import cores
from lorax.files import atomically, draft, read_json, remove, write_json
from lorax.interop.tensors import Stored, check_finite, check_weight, opened, stored

THREADS = min(8, cores())  # that read weights
BLOCK = 1 << 20  # bytes that are read at a time; they stay in the processor's cache
ALIGNMENT = 64  # of the memory that JAX takes as it is on a CPU
FILE = 5 * 10**9  # bytes of weights in a file that is written; at least one tensor
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model"  # in place of "model" in the names of these files

#: Files besides config.json and the weights: tokenizer, image processor, chat templates, generation
#: settings and licence.
SIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)

#: First words of the names of the tensors that read images, which no model of text computes with.
IMAGES = tuple(
    f"{first}{part}."
    for first in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)

#: Dtypes that are kept when weights are written again, by safetensors' names.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Source(NamedTuple):
    """A parameter's place in Hugging Face's tensors: ours = theirs.transpose(axes)[..., part].

    name: of their tensor, with "{}" for the layer if ours stacks all layers, and a second one for
    the expert if ours stacks those as well. axes: the order of their axes in ours, None for the
    same; (1, 0) for a torch `Linear`. part: slice or integer array, our columns of a fused tensor;
    None for all. tied: another tensor with the same weight, read if the files have only that one.
    layer: the parameter's name in one layer, with "{}" for each number, if there is not just one,
    which follows the first word of its path. other: the parameter's place in another version's
    files, read if the first one is not there. experts: their number if the tensor has all experts
    of a layer along its first axis, and the name no "{}" for them. linear: whether a kernel with
    more than two axes is that of a linear layer, whose inputs or outputs have several axes.
    window: (height, width) of a convolution's kernel, which is (height, width, in, out) here and
    (out, in, height, width) there; of any number of axes.
    """

    name: str
    axes: tuple[int, ...] | None = None
    part: slice | np.ndarray | None = None
    tied: str | None = None
    layer: str | None = None
    linear: bool = False
    other: "Source | None" = None
    experts: int | None = None
    window: tuple[int, ...] | None = None

    @property
    def axes_stacked(self) -> int:
        """Leading axes of ours, layers and experts, that are numbers in the tensors' names."""
        return self.name.count("{}")

    def width(self) -> int:
        """The fewest columns that a fused tensor with this part can have."""
        return self.part.stop if isinstance(self.part, slice) else int(np.max(self.part)) + 1


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: the single file, which transformers and diffusers
    prefer too, or the shards of an index in order.

    Raises FileNotFoundError if there is none (with advice if there are only pickles), and
    ValueError for an index with anything other than names of files in the folder.
    """
    for single in _of_both(SINGLE):
        if (directory / single).is_file():
            return [directory / single]
    if index := _index(directory):
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(
                f"{directory}: shards {missing[:3]}{others} of {index.name} are missing"
            )
        return [directory / name for name in names]
    if list(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"{directory}: only pickled weights (*.bin), which can run code when opened. Convert: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise FileNotFoundError(f"{directory}: no {' or '.join(_of_both(SINGLE))}")


def _of_both(name: str) -> tuple[str, str]:
    """The name of a file of weights in transformers' directories and in diffusers'."""
    return name, name.replace("model", DIFFUSERS, 1)


def _index(directory: Path) -> Path | None:
    """The index of a model directory with shards."""
    indices = (directory / name for name in _of_both(INDEX))
    return next((index for index in indices if index.exists()), None)


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: name of its file} of an index. The file may be a symbolic link, as in the Hub's
    cache, but a name can't lead out of the folder otherwise."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: no 'weight_map' from tensors to files")
    for key, name in where.items():
        plain = isinstance(name, str) and name not in ("", "..") and Path(name).name == name
        if not plain or "\0" in name or len(name.encode()) > 255:
            raise ValueError(
                f"{index}: weight_map: {key[:80]}: {reprlib.repr(name)} given; it must be the name "
                "of a file in this folder"
            )
    return where


def tensors(directory: Path) -> dict[str, Stored]:
    """{tensor's name: its place} of all safetensors files of a model directory.

    Raises as `weight_files`; ValueError that names a damaged file, or a tensor that is in two files
    or in another file than the index says."""
    where: dict[str, Stored] = {}
    files = weight_files(directory)
    for file in files:
        opened(file)  # raises for a damaged file
        for key, place in stored(file).items():
            if key in where:
                raise ValueError(f"{directory}: {key} is in {where[key].file.name} and {file.name}")
            where[key] = place
    single = len(files) == 1 and files[0].name in _of_both(SINGLE)
    index = None if single else _index(directory)
    for key, name in _weight_map(index).items() if index else ():
        if key in where and where[key].file.name != name:
            raise ValueError(
                f"{directory}: {key} is in {where[key].file.name}, and {index.name} says in {name}"
            )
    return where


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter in the files of a model; nothing of it is read yet.

    each: {index along the stacked axes: its tensor}. twin: another tensor in the files to which
    config.json ties the only one. dtype: of the arrays that `read` gives.
    """

    source: Source
    each: Mapping[tuple[int, ...], Stored]
    shape: tuple[int, ...]
    dtype: np.dtype
    twin: Stored | None = None

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A block of the parameter, read by several threads. index: a slice for each axis.

        Raises ValueError that names file and tensor if a file is corrupt, a number is NaN, infinite
        or too large for the dtype, or the two tied tensors differ.
        """
        at = [range(n)[part] for n, part in zip(self.shape, index, strict=True)]
        block = _aligned(tuple(map(len, at)), self.dtype)
        stacked = self.source.axes_stacked
        layers = itertools.product(*at[:stacked])
        places = np.ndindex(*block.shape[:stacked])
        pieces = [
            piece
            for layer, place in zip(layers, places, strict=True)
            for piece in self._pieces(self.each[layer], block[(*place, ...)], at[stacked:])
        ]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda piece: self._fill(*piece), pieces):
                pass  # raises what the thread has raised
        return block

    def _pieces(self, tensor: Stored, ours: np.ndarray, at: list[range]) -> list[tuple]:
        """The arguments of `_fill` for a layer. ours: its block; at: positions of that."""
        axes = self.source.axes or tuple(range(ours.ndim))
        theirs = dict(zip(axes, at, strict=True))  # {axis of the tensor: positions along it}
        part = self.source.part
        if part is not None:
            columns = range(tensor.shape[axes[-1]])[part] if isinstance(part, slice) else part
            theirs[axes[-1]] = columns[at[-1].start : at[-1].stop]
        turned = ours.transpose(np.argsort(axes)) if axes else ours
        cuts = _cuts(turned.shape, tensor.dtype.itemsize)
        index = lambda cut: [theirs[axis][where] for axis, where in enumerate(cut)]
        return [(turned[(*cut, ...)], tensor, index(cut)) for cut in cuts]

    def _fill(self, ours: np.ndarray, tensor: Stored, index: list) -> None:
        """Fill a piece of a block. index: its positions in the tensor."""
        value = tensor.read(index)
        check_weight(value, tensor.key, tensor.file, self.dtype)
        if self.twin is not None and not np.array_equal(value, self.twin.read(index)):
            raise _differ(tensor, self.twin)
        ours[...] = value


def parameters(
    directory: Path,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple],
    dtype=jnp.float32,
    optional: Collection[str] = (),
) -> dict[str, Parameter]:
    """{path: `Parameter`} of the parameters in `sources`, to be read in `dtype`.

    shapes: {path: expected shape}; leading axes of layers and experts are filled from one tensor
    for each.
    optional: paths that may be missing from the files, or have another shape there (a classifier
    with other classes); they are then missing from the result.
    Raises ValueError that names file and tensor if shapes disagree or a file is corrupt.
    """
    where = tensors(directory)
    sources = {path: stored_place(source, where) for path, source in sources.items()}
    widths: dict[str, int] = {}  # of fused tensors
    for source in sources.values():
        if source.part is not None:
            widths[source.name] = max(source.width(), widths.get(source.name, 0))

    def one(source, index, shape, optional) -> Stored | None:
        """The tensor of one layer, which has `shape` in ours."""
        key = _key(source, index, where)
        if key is None and optional:
            return None
        if key is None:
            name = source.name.format(*index)
            raise ValueError(f"{directory}: no tensor {name!r} in its safetensors files")
        whole = (*shape[:-1], widths.get(source.name, shape[-1])) if shape else ()
        right = tuple(whole[i] for i in np.argsort(source.axes or range(len(whole))))
        if where[key].shape != right and optional:
            return None
        tensor = where[key].checked()
        if tensor.shape != right:
            raise ValueError(
                f"{tensor.file}: {key} has shape {tensor.shape}, config.json says {right}"
            )
        return tensor

    found = {}
    for path, source in sources.items():
        axes = source.axes_stacked
        stack, shape = tuple(shapes[path][:axes]), tuple(shapes[path][axes:])
        each = {
            index: one(source, index, shape, path in optional and not stack)
            for index in np.ndindex(*stack)
        }
        if None not in each.values():
            twin = _twin(source, each, where)
            found[path] = Parameter(source, each, (*stack, *shape), np.dtype(dtype), twin)
    return found


def _twin(source: Source, each: Mapping, where: Mapping[str, Stored]) -> Stored | None:
    """The tensor that config.json ties to a parameter's only one, if the files have both."""
    if source.tied not in where or each[()].key == source.tied:
        return None
    twin = where[source.tied].checked()
    if twin.shape != each[()].shape:
        raise _differ(each[()], twin)
    return twin


def _differ(tensor: Stored, twin: Stored) -> ValueError:
    return ValueError(
        f"{tensor.file}: {twin.key} differs from {tensor.key}, to which config.json ties it; "
        "tie_word_embeddings must be false there"
    )


def _aligned(shape: tuple, dtype: np.dtype) -> np.ndarray:
    """An array without values, in memory that JAX takes as it is on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _cuts(shape: tuple[int, ...], itemsize: int) -> list[tuple[slice, ...]]:
    """An array with numbers of `itemsize` bytes, cut along its first axes into blocks of at most
    `BLOCK` bytes: a slice for each axis."""
    if not shape:
        return [()]
    row = math.prod(shape[1:]) * itemsize
    many = max(1, BLOCK // row)
    inner = _cuts(shape[1:], itemsize) if row > BLOCK else [tuple(slice(n) for n in shape[1:])]
    return [(slice(i, i + many), *rest) for i in range(0, shape[0], many) for rest in inner]


def stored_place(source: Source, where: Collection[str]) -> Source:
    """The source itself, or its `other` if the files have only that one's first tensor."""
    first = lambda place: _key(place, (0,) * place.axes_stacked, where)
    other = source.other
    return other if other and first(source) is None and first(other) is not None else source


def _key(source: Source, index: tuple[int, ...], where: Collection[str]) -> str | None:
    """The name of one layer's tensor in the files, None if it is missing."""
    names = (*spellings(source.name.format(*index)), source.tied)
    return next((key for key in names if key in where), None)


def spellings(name: str) -> list[str]:
    """Possible names of a tensor: a checkpoint of the bare model lacks the prefix "transformer.",
    the oldest BERT files call a norm's weight and bias gamma and beta, and the oldest models of
    images and texts have "model." after "language_model."."""
    names = [name, name.split(".", 1)[-1]]
    names += [name.replace("model.language_model.", "language_model.model.")]
    old = [n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    return names + [n.replace("LayerNorm.bias", "LayerNorm.beta") for n in old]


def dtypes(
    directory: Path, sources: Mapping[str, Source], shapes: Mapping[str, tuple]
) -> dict[str, np.dtype]:
    """{path: dtype} of the parameters that a model directory stores as floating point numbers, the
    widest if layers differ. sources, shapes: as for `read`."""
    where, result = tensors(directory), {}
    for path, source in sources.items():
        source = stored_place(source, where)
        layers = np.ndindex(*shapes[path][: source.axes_stacked])
        keys = [key for index in layers if (key := _key(source, index, where)) is not None]
        kinds = {where[key].kind for key in keys}
        if kinds and kinds <= _DTYPES.keys():
            result[path] = np.dtype(functools.reduce(jnp.promote_types, map(_DTYPES.get, kinds)))
    return result


def images(directory: Path) -> dict[str, np.ndarray]:
    """{name: tensor} of the part of a model that reads images, as stored; {} for a model of text.
    Raises ValueError for one that is stored as something other than floats."""
    return {
        key: tensor.checked().read()
        for key, tensor in tensors(directory).items()
        if key.startswith(IMAGES)
    }


def write(
    directory: Path,
    config: dict,
    sources: Mapping[str, Source],
    params: Mapping,
    dtypes: Mapping | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write {path: array} and config.json so that transformers loads them, or diffusers if the
    config has its `_class_name`; inverse of `parameters`.

    params: each has a `shape` and gives its layers by `[index]`, which are asked for one at a time.
    More than `FILE` bytes make several files and an index; only one file is in memory at a time.
    dtypes: {path: dtype} to round to; None for float32. beside: {name: tensor} of further tensors.
    Raises ValueError that names the tensor, and leaves the directory as it was, for NaN, infinity
    and numbers too large for the dtype.
    """
    dtype_of = lambda path: np.dtype(np.float32 if dtypes is None else dtypes[path])
    parts: dict[str, list] = {}  # of each tensor: (source, path, index of the layer)
    for path, source in sources.items():
        for index in np.ndindex(*params[path].shape[: source.axes_stacked]):
            parts.setdefault(source.name.format(*index), []).append((source, path, index))
    widths = {name: max(s.width() for s, *_ in p) for name, p in parts.items() if _is_fused(p)}

    def tensor(name: str) -> np.ndarray:
        pieces = []
        for source, path, index in parts[name]:
            exact = np.asarray(params[path][index])
            with np.errstate(over="ignore"):  # `check_finite` says it with the tensor's name
                pieces.append((source, exact.astype(dtype_of(path))))
            check_finite(name, exact, pieces[-1][1])
        source, whole = pieces[0]
        axes = source.axes or range(whole.ndim)
        if name in widths:
            whole = np.zeros((*whole.shape[:-1], widths[name]), whole.dtype)
            for source, value in pieces:
                whole[..., source.part] = value
        return np.ascontiguousarray(whole.transpose(np.argsort(axes)))

    def size(name: str) -> int:
        _, path, index = parts[name][0]
        *shape, columns = (1, *params[path].shape[len(index) :])
        return math.prod(shape) * widths.get(name, columns) * dtype_of(path).itemsize

    beside = dict(beside or {})
    sizes = {name: x.nbytes for name, x in beside.items()} | {name: size(name) for name in parts}
    single, index = (_of_both(name)["_class_name" in config] for name in (SINGLE, INDEX))
    value = lambda name: beside[name] if name in beside else tensor(name)
    _write_files(directory, single, index, sizes, value)
    write_json(directory / "config.json", config)


def _is_fused(pieces: list[tuple]) -> bool:
    return pieces[0][0].part is not None


def _write_files(
    directory: Path, single: str, index: str, sizes: Mapping[str, int], tensor: Callable
) -> None:
    """Write the tensors of a model, in the file `single` if they are no more than `FILE` bytes,
    otherwise in several, which `index` lists. sizes: {name: bytes}. tensor(name) -> it."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > FILE:
            groups.append([])
        groups[-1].append(name)

    def write(file: Path, names: list[str]) -> None:
        tensors = {name: tensor(name) for name in names}
        atomically(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))

    if len(groups) == 1:
        write(directory / single, groups[0])
        return
    numbered = lambda i: f"-{i:05}-of-{len(groups):05}.safetensors"
    files = [single.replace(".safetensors", numbered(i)) for i in range(1, len(groups) + 1)]
    drafts = draft(directory / "weights")
    try:
        for file, names in zip(files, groups, strict=True):
            write(drafts / file, names)
        if hosts.first():
            for file in files:
                os.replace(drafts / file, directory / file)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
    named = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    total = {"total_size": sum(sizes.values())}
    write_json(directory / index, {"metadata": total, "weight_map": named})
    remove(directory / single)  # which would be read first
