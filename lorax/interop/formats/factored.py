"""Updates of low rank for formats that hold each with its own rank and scale."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lorax.interop.formats import heads, image_names, updates
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import numbers
from lorax.interop.tensors import Stored

KINDS = ("LoRA", "LoCon", "DoRA", "AdaLoRA")
#: Formats of image models, whose programs take 1 for a scale that a file does not have.
IMAGES = ("kohya", "diffusers", "ComfyUI", "XLabs", "PEFT's names")
_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Tensors(NamedTuple):
    """An update as torch stores it: down (r, in) and up (out, r), of a convolution (r, in, kh, kw)
    and (out, r, 1, 1); m: DoRA's lengths (out,), or None."""

    down: np.ndarray
    up: np.ndarray
    m: np.ndarray | None


def named(
    found: Found,
    format: str,
    name_of: Callable[[str], str | None] = image_names.diffusers,
    unordered: bool = False,
    kinds: Sequence[str] = KINDS,
    changes: bool = False,
) -> dict[str, Update]:
    """{name: update} of a file that was read as it is stored. name_of: the name of a matrix by the
    file's own; diffusers' by default. unordered: whether rows may be in the file's own order.
    kinds: what the format holds; changes: whether differences of biases and norms, too.

    Raises ValueError that says what the format can't hold.
    """
    refused = refusal(found, format)
    by_name: dict[str, Update] = {}
    for update in found.updates:
        name = name_of(update.layer)
        if update.kind not in kinds:
            raise refused(
                f"{update.layer} is {update.kind}; it holds {', '.join(kinds)}" + _instead(update)
            )
        if heads.is_unordered(update) and not unordered:
            raise refused(f"the rows of {update.layer} need the base's heads; give --base")
        if updates.ROWS in update.warnings:
            raise refused(f"{update.layer}: DoRA with one length per input; it has one per output")
        check_scale(found, update, refused)
        if name is None:
            raise refused(f"its name of {update.layer} is not known")
        if name in by_name:
            raise refused(f"{name} occurs twice, once as {update.layer}")
        by_name[name] = update
    if not by_name:
        raise refused("no updates in it")
    held = found.changes if changes else {}
    if beside := [name for name in found.beside if name not in held]:
        raise refused(f"{', '.join(beside[:3])} beside the updates of matrices")
    return by_name


def _instead(update: Update) -> str:
    """What can be done with an update of a kind that a format has not."""
    if "DoRA" in update.kind:
        return ""  # whose lengths belong to its own update on its base
    return "; python -m lorax.convert shrink makes LoRA of it, with --format"


def check_scale(found: Found, update: Update, refused: Callable[[str], ValueError]) -> None:
    """Raises ValueError if a file does not say the scale of an update."""
    if update.source.startswith("default") and found.format not in IMAGES:
        raise refused(f"its scale is not known: {update.layer} has {update.source}")


def refusal(found: Found, format: str) -> Callable[[str], ValueError]:
    """The error that a format can't hold a file, for a reason."""
    return lambda why: ValueError(f"{found.path}: {format} can't hold it: {why}")


def alpha_of(update: Update, refused: Callable[[str], ValueError]) -> float:
    """The alpha that divided by the rank is the scale, to the bit. Raises ValueError if none is."""
    rank = inner_rank(update)
    product = update.scale * rank
    for alpha in (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)):
        if alpha / rank == update.scale:
            return alpha
    raise refused(
        f"{update.layer} has the scale {update.scale!r}, which no alpha divided by its rank "
        f"{rank} is exactly"
    )


def inner_rank(update: Update) -> int | None:
    """The rank that alpha is divided by, None for kinds without one."""
    if update.kind in KINDS:
        return update.rank
    inner = ("hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((update.stored[word].shape[0] for word in inner if word in update.stored), None)


def as_stored(update: Update) -> dict[str, np.ndarray]:
    """{LyCORIS's word: tensor} of an update without factors, in the file's types."""
    return {word: unchanged(x) for word, x in update.stored.items()}


def unchanged(tensor: Stored) -> np.ndarray:
    """The numbers of a tensor, in its type."""
    return _stored(numbers(tensor), tensor.kind)


def tensors(update: Update) -> Tensors:
    """The numbers of an update of `KINDS`, in the file's type if that holds them, as it does unless
    they were computed, otherwise in float32."""
    a, b, _, m = update.read()
    down, up = a.T, b.T
    if update.kernel:
        down = down.reshape(len(down), -1, *update.kernel)
        up = up.reshape(*up.shape, *(1 for _ in update.kernel))
    return Tensors(*(None if x is None else _stored(x, update.dtype) for x in (down, up, m)))


def as_peft(update: Update) -> dict[str, np.ndarray]:
    """{PEFT's words below a module: tensor}."""
    down, up, m = tensors(update)
    named = {"lora_A.weight": down, "lora_B.weight": up}
    if m is not None:
        named["lora_magnitude_vector"] = m.reshape(1, -1, 1, 1) if update.kernel else m
    return named


def _stored(x: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = x.astype(_DTYPES.get(kind, np.float32))
        same = np.array_equal(narrow.astype(np.float32), x, equal_nan=True)
    return np.ascontiguousarray(narrow if same else x)


def check_written(
    by_name: Mapping[str, Update],
    written: Found,
    refused: Callable[[str], ValueError],
) -> None:
    """Raises ValueError unless a written file has the scales and ranks of the updates that it was
    made of: in PEFT's patterns a name may be the end of another."""
    want, got = (
        {name: (one.scale, one.rank, one.shape) for name, one in file}
        for file in (by_name.items(), ((one.layer, one) for one in written.updates))
    )
    for name in want | got:
        if want.get(name) != got.get(name):
            raise refused(
                f"{name} has (s, r, shape) {want.get(name)} and would have {got.get(name)}"
            )
