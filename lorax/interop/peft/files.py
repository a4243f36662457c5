"""The two files of a PEFT adapter: names of tensors, reading and writing."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from lorax.files import write_bytes
from lorax.interop.peft.config import CONFIG, WEIGHTS, missing
from lorax.interop.tensors import read_safetensors

PREFIX = "base_model.model."
WHOLE = re.compile(r"(?!.*lora_)(.+)\.(weight|bias)")
# A tensor of an adapter in a module: in a running model an adapter's name follows the word.
_OWN = re.compile(
    r"(?P<start>(.+\.)?(lora_(embedding_)?[ABE]|lora_magnitude_vector|hada_\w+|lokr_\w+"
    r"|vera_lambda_[bd]|vera_[AB]|ia3_l|ln_tuning_layers|miss_block|hira_[AB]"
    r"|shira_weight|shira_indices|gralora_[AB](_general)?|oft_(embedding_)?R"
    r"|fourierft_spectrum|hra_u|randlora_(lambda|gamma|A|B)))"
    r"(\.(?P<name>[^.]+))??(?P<end>(\.(weight|bias))?)"
)
# A module trained whole: the trained copy, and the base's original, which is unused.
_COPY = re.compile(r"(?P<module>.+)\.(?P<which>modules_to_save|original_module)\.(?P<rest>.+)")


def write(
    directory: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Write the two files of an adapter; the directory. metadata: of the safetensors file."""
    directory = pathlib.Path(directory)
    stored = lambda x: np.ascontiguousarray(x, np.int32 if x.dtype.kind == "i" else np.float32)
    tensors = {name: stored(tensor) for name, tensor in tensors.items()}
    data = serialise(tensors, {"format": "pt"} | dict(metadata or {}))
    write_bytes(directory / WEIGHTS, data)
    write_bytes(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return directory


def serialise(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes are a function of its content.

    The library writes the metadata in a random order; here the header's keys are sorted. (The
    format: 8 bytes of header length, the header as JSON padded with spaces, the data.)
    """
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_tensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: float32 array}, the file's metadata) of a safetensors file; SHiRA's places may be
    integers. Raises FileNotFoundError, or ValueError for any other file and for a tensor that is
    not of finite floats."""
    if not file.exists():
        raise missing(file)
    return read_safetensors(file, integers=r".*\.shira_indices(\..+)?")


def own_names(
    stored: Mapping[str, Any], file: pathlib.Path, same: Callable[..., bool] = np.array_equal
) -> dict[str, Any]:
    """{name as `save_pretrained` writes it, without "base_model.model.": tensor, an array or its
    place in the file}.

    In a state dict of a running model, names include the adapter's ("lora_A.default.weight"), and a
    module trained whole occurs twice: "modules_to_save" is the trained module, "original_module"
    the base's, which is left out. same: whether two tensors are equal.

    Raises ValueError that names the file if it has several adapters, a name twice with different
    values, or a base's original module without the trained one.
    """
    matches = {key: _OWN.fullmatch(key.removeprefix(PREFIX)) for key in stored}
    adapters = {match["name"] for match in matches.values() if match}
    if len(adapters) > 1:
        named = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise ValueError(
            f"{file}: several adapters, {named}; one can be read: save it by itself with PEFT's "
            "save_pretrained(folder, selected_adapters=[name])"
        )
    tensors: dict[str, Any] = {}
    originals = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if match := matches[key]:
            name = match["start"] + match["end"]
        elif match := _COPY.fullmatch(name):
            first, _, rest = match["rest"].partition(".")
            rest = rest if rest and first in adapters | {"default"} else match["rest"]
            name = f"{match['module']}.{rest}"
            if match["which"] == "original_module":
                originals[f"{match['module']}.{match['rest']}"] = key
                continue
        name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
        if name in tensors and not same(tensors[name], tensor):
            raise ValueError(f"{file}: {name} occurs twice, with different values; {key} is one")
        tensors[name] = tensor
    for name, key in originals.items():
        if name not in tensors:
            raise ValueError(f"{file}: {key}: the base's own module, the trained one is missing")
    return tensors
