"""Finds the file of an adapter and opens it; no numbers are read yet, nothing is unpickled."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lorax.files import LFS, pointer_hint, read_json
from lorax.interop import hub, tensors
from lorax.interop.peft.config import CONFIG, PICKLES, WEIGHTS
from lorax.interop.states import DELTA

#: Types of floats in adapter files, as safetensors call them.
FLOATS = tensors.FLOATS | {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
#: Files that a directory may hold its adapter in, the first that is there is taken.
NAMES = (DELTA, WEIGHTS, "pytorch_lora_weights.safetensors", "adapters.safetensors")
#: By the end of a file's name.
CONTAINERS = {".safetensors": "safetensors", ".gguf": "gguf", ".h5": "h5"}
#: A file of an orbax checkpoint: of an item, of a step with items, of a run with steps.
_ORBAX = ("_METADATA", "*/_METADATA", "*/*/_METADATA")
_BLOCK = 2**14  # numbers that are converted at once: take makes indices of 64 bits of them
_LONGEST = 512  # characters of a tensor's name
_UNREAD = (*PICKLES, ".distcp", ".pkl")
_HUB = [f"*{end}" for end in CONTAINERS] + ["*.json", "*.yaml"]
_HUB += ["*METADATA*", "*ocdbt*", "d/*", "*/d/*"]  # of orbax
_BASES = ["*-of-*.safetensors", "model.safetensors", "tf_model.h5"]  # which are no adapters


class Opened(NamedTuple):
    """An adapter's file, opened.

    path: what was asked for. file: the file in it that holds tensors (for orbax the directory).
    container: "safetensors", "gguf", "h5" or "orbax".
    tensors: {name: its place} of safetensors; {} for others, which their readers open.
    metadata: of the safetensors' header.
    config: the adapter_config.json beside the file, {} if there is none.
    base: the fields of the base's config.json, given or beside the file, {} if they are not known.
    as_stored: whether modules are wanted as the file has them, with nothing fused told apart.
    """

    path: Path
    file: Path
    container: str
    tensors: dict[str, tensors.Stored]
    metadata: dict[str, str]
    config: dict[str, Any]
    base: Mapping[str, Any] = {}
    as_stored: bool = False


def open_adapter(path: str | Path, base: Mapping[str, Any] | None = None) -> Opened:
    """Open a file, a directory with one, or what a Hub id stands for.

    base: the fields of its base's config.json, None to look for one beside the file.

    Raises FileNotFoundError or ValueError, one line that names it, for what is not there, is no
    adapter's container, is only a pointer or is a pickle.
    """
    path = located(path)
    file = adapter_file(path)
    container = "orbax" if file.is_dir() else container_of(file)
    folder = file if file.is_dir() else file.parent
    config, beside = (_fields(folder / name) for name in (CONFIG, "config.json"))
    opened = Opened(path, file, container, {}, {}, config, beside if base is None else base)
    if container != "safetensors":
        return opened
    with tensors.opened(file) as handle:
        metadata = handle.metadata() or {}
    stored = tensors.stored(file)
    check_names(file, stored)
    return opened._replace(tensors=stored, metadata=metadata)


def check_names(file: Path, names: Iterable[str]) -> None:
    """Raises ValueError for names of tensors that would not fit into a line of an error."""
    for name in names:
        if not name.isprintable() or len(name) > _LONGEST:
            raise ValueError(f"{file}: {name[:40]!r}... is no name of a tensor: it is damaged")


def _fields(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def located(path: str | Path) -> Path:
    """A local path, or the cached or downloaded files of a Hub id ("owner/name", or
    "owner/name/file.safetensors"). Raises FileNotFoundError."""
    local = Path(path).expanduser()
    name = str(path)
    if local.exists() or local.is_absolute() or name.startswith(".") or "/" not in name:
        if not local.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
        return local
    owner, model, *inside = name.split("/")
    if inside and Path(name).suffix not in CONTAINERS:
        raise FileNotFoundError(f"{path}: no such file or directory")
    file = "/".join(inside)
    around = "/".join([*inside[:-1], ""])
    wanted = [file, f"{around}*.json", f"{around}*.yaml"] if inside else _HUB
    try:
        there = hub.snapshot(f"{owner}/{model}", wanted, () if inside else _BASES) / file
        if not there.exists():
            raise FileNotFoundError(f"FileNotFoundError: there is no {file} in {owner}/{model}")
        return there
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file or directory, and reading it from the Hub failed ({error})"
        ) from None


def adapter_file(path: Path) -> Path:
    """The file that holds an adapter's tensors: the path itself, or the one in a directory; the
    directory of an orbax checkpoint. Raises FileNotFoundError, or ValueError for several files."""
    if not path.is_dir():
        return path
    named = [path / name for name in NAMES if (path / name).exists()]
    if named:
        return named[0]
    if any(next(path.glob(pattern), None) for pattern in _ORBAX):
        return path
    files = sorted(file for end in CONTAINERS for file in path.glob(f"*{end}"))
    if len(files) == 1:
        return files[0]
    below = sorted(file.parent for name in NAMES for file in path.glob(f"*/{name}"))
    if len(below) == 1 and not files:
        return adapter_file(below[0])
    if found := files or below:
        names = ", ".join(file.name for file in found[:8]) + " ..." * (len(found) > 8)
        raise ValueError(f"{path}: holds {len(found)} adapters, {names}; give one of them")
    pickled = sorted(file for file in path.glob("*") if file.suffix in _UNREAD)
    if pickled:
        raise refused(pickled[0])
    ends = ", ".join(CONTAINERS)
    raise FileNotFoundError(f"{path}: no adapter in it: no file {ends}, no orbax checkpoint")


def container_of(file: Path) -> str:
    """The container of a file, by its first bytes and its name. Raises ValueError."""
    if file.suffix in _UNREAD:
        raise refused(file)
    with open(file, "rb") as handle:
        first = handle.read(len(LFS))
    if first == LFS:
        raise ValueError(f"{file}: no adapter{pointer_hint(file)}")
    if first.startswith(b"GGUF"):
        return "gguf"
    if file.suffix not in CONTAINERS:
        raise ValueError(f"{file}: adapters are read from {', '.join(CONTAINERS)} and from orbax")
    return CONTAINERS[file.suffix]


def refused(file: Path) -> ValueError:
    """The error for a file that is or may be a pickle."""
    if file.suffix == ".distcp":
        how = "export the adapter in PEFT's format with the program that wrote it"
    else:
        how = (
            "save its tensors with safetensors.torch.save_file(torch.load(file, weights_only=True)"
            ", name), or in PEFT's format with the program that wrote it"
        )
    return ValueError(f"{file}: a pickle can run code when opened, so it is not read; {how}")


# ---------------------------------------------------------------------------------------- numbers


def quiet(function: Callable) -> Callable:
    """A function that computes with numbers of a file, without numpy's warnings of those that are
    NaN or become infinite."""
    return np.errstate(over="ignore", invalid="ignore")(function)


@quiet
def numbers(tensor: tensors.Stored, index: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """A tensor of floats as float32, NaN and infinity included; with `index` a part of it, as
    `Stored.read` takes it. Raises ValueError that names file and tensor for other types."""
    check_floats(tensor)
    if tensor.kind in tensors.FLOATS:
        stored = tensor.read(index)
    else:  # 8 bits
        stored = tensor.as_bytes().read().view(FLOATS[tensor.kind]).reshape(tensor.shape)
        stored = stored if index is None else stored[np.ix_(*index)]
    return single(stored)


def single(x: np.ndarray) -> np.ndarray:
    """Floats as float32, the array itself if it is."""
    if x.dtype != np.float16:
        return np.asarray(x, np.float32)
    out = np.empty(x.shape, np.float32)
    bits, flat = np.ravel(x).view(np.uint16), out.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        part = slice(start, start + _BLOCK)
        np.take(_halves(), bits[part], out=flat[part], mode="clip")
    return out


@functools.cache
def _halves() -> np.ndarray:
    """(65536,) float32, all float16 by their bits. Looking numbers up is faster than casting them,
    seven times if they are below 6e-5, as those of small updates are."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def check_floats(tensor: tensors.Stored) -> None:
    """Raises ValueError that names file and tensor if it holds no floats."""
    if tensor.kind not in FLOATS:
        known = ", ".join(FLOATS)
        raise ValueError(f"{tensor.file}: {tensor.key}: {tensor.kind} given; expected {known}")


def same(one: tensors.Stored, other: tensors.Stored) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.kind, one.shape) != (other.kind, other.shape):
        return False
    return np.array_equal(one.as_bytes().read(), other.as_bytes().read())


def number(tensor: tensors.Stored) -> float:
    """A single finite number, of any type. Raises ValueError that names file and tensor."""
    if tensor.shape not in ((), (1,)):
        raise ValueError(f"{tensor.file}: {tensor.key}: one number expected, it is {tensor.shape}")
    kinds = FLOATS | _INTEGERS
    if tensor.kind not in kinds:
        raise ValueError(f"{tensor.file}: {tensor.key}: {tensor.kind} given; expected a number")
    value = float(tensor.as_bytes().read().view(kinds[tensor.kind])[0])
    if not np.isfinite(value):
        raise ValueError(f"{tensor.file}: {tensor.key}: {value}; it must be finite")
    return value


def fields(metadata: dict[str, str]) -> dict[str, Any]:
    """A safetensors file's metadata, texts, with those that are JSON objects or lists parsed."""
    parsed = {}
    for name, text in metadata.items():
        try:
            value = json.loads(text) if text[:1] in ("{", "[") else text
        except (ValueError, RecursionError):
            value = text
        parsed[name] = value
    return parsed
