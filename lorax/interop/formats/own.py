"""lorax's own format, of methods that PEFT does not have: the dense dW of every matrix
(`lorax.interop.states`)."""

import numpy as np

from lorax.interop import states
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened, check_floats, numbers
from lorax.interop.tensors import Stored


def recognises(opened: Opened) -> bool:
    """Whether it is a file of ours; one of PEFT's may be beside it."""
    ours = opened.file.name in (states.DELTA, states.STATE)
    return ours and states.is_here(opened.file.parent)


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names the file, also for the state of a method
    that changes no weights or whose dW needs the base."""
    about = states.about(opened.file.parent)
    if opened.file.name != states.DELTA:
        raise ValueError(
            f"{opened.file}: {about['name']}: no update of weights that can be read without its "
            "base"
        )
    found = tuple(_update(layer, tensor) for layer, tensor in opened.tensors.items())
    return Found("lorax", opened.path, found, {}, about)


def _update(layer: str, tensor: Stored) -> Update:
    check_floats(tensor)
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"{tensor.file}: {layer}: {tensor.shape} given; expected (in, out)")
    read = lambda: np.ascontiguousarray(numbers(tensor))
    source = "1: dW is stored"
    return Update(layer, "full", tensor.shape, min(tensor.shape), 1.0, source, tensor.kind, read)
