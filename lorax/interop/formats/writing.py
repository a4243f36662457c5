"""What an adapter's updates must be so that a file of another format can hold them."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats import heads, names
from lorax.interop.formats.contract import Found, Update

_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
#: Formats with Hugging Face's names, and those with the scale in another file than the tensors.
_OWN = ("PEFT", "MLX", "Tinker")
_LOSES_SCALE = ("MLX", "torchtune", "Megatron", "Tinker", "tunix", "MaxText", "keras-hub")


def factors(found: Found, own_names: bool = False) -> dict[str, Factors]:
    """{Hugging Face's name: factors} of a language model's adapter, with rows in Hugging Face's
    order; with `own_names` names and rows are those of the file.

    The arrays have the type that the file has; 8 bits and types that differ become float32.
    Raises ValueError that names what would be lost or wrong: an update without factors, weights
    trained beside, a matrix twice, a name, a scale or an order of rows that is not known.
    """
    if found.beside:
        raise _refused(found, f"{', '.join([*found.beside][:3])} beside the updates of matrices")
    made: dict[str, Factors] = {}
    for update in found.updates:
        name = update.layer if own_names else _name(found, update)
        if update.kind not in ("LoRA", "DoRA"):
            raise _refused(found, f"{update.layer} is {update.kind}; expected LoRA or DoRA")
        if found.format in _LOSES_SCALE and update.source.startswith("default"):
            raise _refused(found, f"the scale of {update.layer} is not known ({update.source})")
        if name in made:
            raise _refused(found, f"{name} occurs twice, once as {update.layer}")
        made[name] = in_its_type(update)
    if not made:
        raise _refused(found, "no updates in it")
    return made


def _name(found: Found, update: Update) -> str:
    name = names.hugging_face(update.layer)
    if heads.is_unordered(update):
        why = f"the order of the rows of {update.layer} needs the base's heads; give --base"
        raise _refused(found, why)
    if found.format not in _OWN and not name.startswith(("model.", "lm_head")):
        raise _refused(found, f"Hugging Face's name of {update.layer} is not known")
    return name


def in_its_type(update: Update) -> Factors:
    """The factors of an update in the type that the file has."""
    dtype = _DTYPES.get(update.dtype, np.float32)
    a, b, s, m = update.read()
    return Factors(a.astype(dtype, copy=False), b.astype(dtype, copy=False), s, m)


def _refused(found: Found, why: str) -> ValueError:
    return ValueError(f"{found.path}: not converted: {why}")


def one_scale(made: Mapping[str, Factors], format: str) -> tuple[float, int]:
    """(the scale, the largest rank) of factors for a format that has one of each for all matrices.
    Raises ValueError that names two matrices with different scales."""
    if not made:
        raise ValueError(f"{format}: nothing to write")
    scales = {one.s: name for name, one in made.items()}
    if len(scales) > 1:
        (s, name), (t, other) = [*scales.items()][:2]
        raise ValueError(
            f"{format} has one scale for all matrices; given {s:g} in {name}, {t:g} in {other}"
        )
    return next(iter(scales)), max(one.a.shape[1] for one in made.values())


def padded(one: Factors, rank: int) -> Factors:
    """Factors of a larger rank with the same dW: zeros are added."""
    more = rank - one.a.shape[1]
    a, b = np.pad(one.a, ((0, 0), (0, more))), np.pad(one.b, ((0, more), (0, 0)))
    return one._replace(a=a, b=b)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that a file's config names, None if it does not."""
    for field in ("base_model_name_or_path", "model"):
        if isinstance(name := config.get(field), str) and name:
            return name
    return None
