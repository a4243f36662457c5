"""What an adapter's updates must be so that another format can hold them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats import heads, names
from lorax.interop.formats.contract import Found, Update

_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
#: Formats with Hugging Face's names, and those with the scale in another file than the tensors.
_OWN = ("PEFT", "MLX", "Tinker")
_LOSES_SCALE = ("MLX", "torchtune", "Megatron", "Tinker", "tunix", "MaxText", "keras-hub")


class Plain(NamedTuple):
    """Low-rank updates by Hugging Face's names, with one scale and one rank.

    rank: the largest; factors of a smaller one are padded with zeros, which leaves dW as it is.
    """

    updates: dict[str, Update]
    scale: float
    rank: int

    def read(self, name: str) -> Factors:
        """a (in, rank), b (rank, out) and DoRA's lengths, in the type of the file; 8 bits and types
        that differ become float32."""
        update = self.updates[name]
        a, b, s, m = update.read()
        dtype = _DTYPES.get(update.dtype, np.float32)
        more = self.rank - a.shape[1]
        a, b = np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))
        return Factors(a.astype(dtype), b.astype(dtype), s, m)


def plain(found: Found, format: str, kinds: Sequence[str]) -> Plain:
    """The updates of a file for a format that holds these kinds, with one scale and one rank.

    Raises ValueError that says what the format can't hold: another kind, weights trained beside,
    several scales, a matrix twice, rows in an order that is not known.
    """

    def refused(why: str) -> ValueError:
        return ValueError(f"{found.path}: {format} can't hold it: {why}")

    by_name: dict[str, Update] = {}
    for update in found.updates:
        name = names.hugging_face(update.layer)
        if update.kind not in kinds:
            raise refused(f"{update.layer} is {update.kind}; it holds {' and '.join(kinds)}")
        if heads.is_unordered(update):
            raise refused(
                f"the order of the rows of {update.layer} needs the base's heads; give --base"
            )
        if found.format in _LOSES_SCALE and update.source.startswith("default"):
            raise refused(f"its scale is not known: {update.layer} has {update.source}")
        if found.format not in _OWN and not name.startswith(("model.", "lm_head")):
            raise refused(f"Hugging Face's name of {update.layer} is not known")
        if name in by_name:
            raise refused(f"{name} occurs twice, once as {update.layer}")
        by_name[name] = update
    if not by_name:
        raise refused("no updates in it")
    if found.beside:
        raise refused(f"{', '.join([*found.beside][:3])} beside the updates of matrices")
    if len(of_kind := {update.kind for update in by_name.values()}) > 1:
        raise refused(f"{' and '.join(sorted(of_kind))} in one file")
    scales = {update.scale: update.layer for update in by_name.values()}
    if len(scales) > 1:
        (s, one), (t, other) = [*scales.items()][:2]
        raise refused(f"one scale for all, and it is {s:g} in {one}, {t:g} in {other}")
    rank = max(update.rank for update in by_name.values())
    return Plain(by_name, *scales, rank)


def base_name(found: Found) -> str | None:
    """The base that a file names, None if it does not."""
    for field in ("base_model_name_or_path", "model", "general.base_model.0.repo_url"):
        name = found.config.get(field) if isinstance(found.config, Mapping) else None
        if isinstance(name, str) and name:
            return name
    return None
