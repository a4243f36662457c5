"""Adapter files of any program, recognised and read lazily: `read(path)` returns what is in one.

Opening reads headers; an update's tensors are read when its `read` is called, so that one layer at
a time is in memory. Nothing is unpickled or run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.interop.formats import (
    dotted,
    einsums,
    keras_hub,
    kohya,
    llama_cpp,
    loralib,
    megatron,
    mlx,
    own,
    peft,
    tinker,
    torchtune,
)
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import open_adapter

__all__ = ["FILES", "WRITERS", "Found", "Update", "read", "recognised"]

#: Modules with `recognises(opened) -> bool` and `read(opened) -> Found`; the first that recognises
#: a file reads it.
FORMATS = (
    llama_cpp,
    keras_hub,
    einsums,
    own,
    kohya,
    dotted,
    mlx,
    torchtune,
    megatron,
    tinker,
    peft,
    loralib,
)
#: Functions (path to write, what was read as it is stored, fields of the base's config.json or
#: None) -> path, by the format's name. They raise ValueError for what the format can't hold.
WRITERS = {
    "peft": peft.write,
    "kohya": kohya.write,
    "diffusers": dotted.write,
    "mlx": mlx.write,
    "gguf": llama_cpp.write,
}
#: Those that write one file; the others write a directory.
FILES = ("kohya", "gguf")


def read(path: str | Path, base: Mapping[str, Any] | None = None, as_stored: bool = False) -> Found:
    """What an adapter's file holds: a file, a directory with one, or a Hub id.

    base: the fields of its base's config.json, whose heads some formats need to put the rows of q
        and k in Hugging Face's order; None to look for one beside the file.
    as_stored: leaves modules of image models and of PEFT as the file has them, e.g. to write them
        in another format; otherwise parts of a fused matrix are told apart and counted once.

    Raises FileNotFoundError, or ValueError with one line that names the file, for what is not
    there, not recognised, damaged, or can't be read without more than the file.
    """
    opened = open_adapter(path, base)._replace(as_stored=as_stored)
    for format in FORMATS:
        if format.recognises(opened):
            return format.read(opened)
    names = ", ".join([*opened.tensors][:3])
    raise ValueError(f"{opened.file}: an unknown format of adapters; its tensors are {names}...")


def recognised(path: str | Path) -> bool:
    """Whether the format of a file is known to `read`, which may still refuse it. Raises as `read`
    for what is not there or is no container."""
    opened = open_adapter(path)
    return any(format.recognises(opened) for format in FORMATS)
