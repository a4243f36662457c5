"""The adapted matrices of members: their names, and stacks of matrices with the same shape."""

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from lorax.interop.adapter import Factors, Updates, shape_of

_INSIDE = r"(?:transformer_blocks[._]\d+[._])?(?P<rest>.+)"
_UNET = re.compile(
    r"(?:^|[._])(?P<part>down|mid|up|input|middle|output)_blocks?[._](?:(?P<i>\d+)[._])?"
    r"(?:(?P<kind>attentions|resnets|downsamplers|upsamplers)[._])?(?:(?P<j>\d+)[._])?" + _INSIDE
)
_BLOCKS = re.compile(
    r"(?:^|[._])(?P<single>single_)?(?:double|transformer|single_transformer|(?<=single_))_?blocks"
    r"[._](?P<layer>\d+)[._](?P<rest>.+)"
)
_FLATTENED = re.compile(r"_(?:layers?|blocks?|h)_(?P<layer>\d+)_(?P<rest>.+)")
TOGETHER = 2**22  # numbers in a stack of matrices: 32 MB in float64

SVDs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # u, sigma, vt by path, thin


def layer_and_target(path: str) -> tuple[int, str]:
    """Layer and target of a path: "h/3/attn/q" -> (3, "q"), and of another library's module
    "encoder.layer.3.attention.query" -> (3, "query"); -1 for a matrix outside all layers. Each
    expert is a target: "h/3/experts/5/up" -> (3, "experts.5.up").

    Names of image models (`_of_image_model`) may be flattened:
    "unet_mid_block_attentions_0_proj_in" -> (12, "proj_in")."""
    if place := _of_image_model(path):
        return place
    parts = re.split(r"[/.]", path)
    layer = next((int(part) for part in parts if part.isdecimal()), -1)
    of_expert = len(parts) > 2 and parts[-3] == "experts" and parts[-2].isdecimal()
    return layer, ".".join(parts[-3:]) if of_expert else parts[-1]


def _of_image_model(path: str) -> tuple[int, str] | None:
    """Layer and target in a U-Net, a diffusion transformer or a flattened name; None for others.

    A U-Net's layers have the numbers of Stable Diffusion's original code, in which diffusers'
    down_blocks.i.attentions.j is input block 3 i + j + 1: 0 to 11 are the input blocks, 12 is the
    middle, 13 to 24 are the output blocks. A target begins with "single:" in a transformer's second
    kind of blocks, and with "te2:" in a second text encoder.
    """
    if match := _UNET.search(path):
        start, i, j = match["part"], int(match["i"] or 0), int(match["j"] or 0)
        depth = {"down": 3 * i + j + 1, "input": i, "up": 13 + 3 * i + j, "output": 13 + i}
        depth["down"] = depth["down"] + 2 * (match["kind"] == "downsamplers")
        depth["up"] = depth["up"] + 2 * (match["kind"] == "upsamplers")
        return depth.get(start, 12), match["rest"]
    if match := _BLOCKS.search(path):
        return int(match["layer"]), "single:" * bool(match["single"]) + match["rest"]
    if not re.search("[./]", path) and (match := _FLATTENED.search(path)):
        encoder = re.search(r"(?:^|_)(te[2-9])_", path)
        return int(match["layer"]), (f"{encoder[1]}:" if encoder else "") + match["rest"]
    return None


def identity(member: Hashable, path: str) -> dict:
    """The columns that identify the matrix of a row."""
    layer, target = layer_and_target(path)
    return {"member": member, "path": path, "layer": layer, "target": target}


def stacks(shapes: Mapping[Hashable, tuple[int, ...]]) -> Iterator[list]:
    """Lists of keys with equal shapes, each at most a stack of `TOGETHER` numbers.

    shapes: what must be equal within a stack; the two largest numbers of a shape are the size of a
    matrix.
    """
    by_shape: dict[tuple[int, ...], list] = {}
    for key, shape in shapes.items():
        by_shape.setdefault(tuple(shape), []).append(key)
    for shape, keys in by_shape.items():
        count = max(1, TOGETHER // max(1, math.prod(sorted(shape)[-2:])))
        yield from (keys[n : n + count] for n in range(0, len(keys), count))


def stacked(updates: Sequence):
    """Updates of one shape, stacked for the array functions: (a, b, s), or (..., in, out)."""
    if isinstance(updates[0], Factors):
        return tuple(np.stack([update[n] for update in updates]) for n in range(3))
    return np.stack(updates)


def by_matrix(
    updates: Mapping[Hashable, Updates], kernels: Mapping[str, np.ndarray] | None = None
) -> dict[tuple[Hashable, str], Factors | np.ndarray]:
    """{(member, path): update}. Raises KeyError or ValueError if the kernels do not fit them."""
    flat = {
        (member, path): update
        for member, by_path in updates.items()
        for path, update in by_path.items()
    }
    for (_, path), update in flat.items() if kernels is not None else ():
        if reason := misfit(path, update, kernels):
            raise (ValueError if path in kernels else KeyError)(reason)
    return flat


def misfit(path: str, update: Factors | np.ndarray, kernels: Mapping[str, np.ndarray]) -> str:
    """Why an update doesn't fit its kernel; "" if it fits."""
    return misfit_of(path, shape_of(update), kernels)


def misfit_of(path: str, shape: tuple[int, ...], kernels: Mapping[str, np.ndarray]) -> str:
    """`misfit` of an update of this `shape_of`."""
    if path not in kernels:
        return f"{path}: adapted, but not among the base's kernels"
    shape, known = shape[:2], kernel_shape(kernels, path)
    if shape != known:
        return f"{path}: an update of {shape}, but a kernel of {known}"
    return ""


def kernel_shape(kernels: Mapping[str, np.ndarray], path: str) -> tuple[int, int]:
    """(in, out) of a kernel. `lorax.models.kernels` says it without reading the weight."""
    shapes = getattr(kernels, "shapes", None)
    return kernels[path].shape if shapes is None else shapes[path]


def with_base(every: dict, kernels: Mapping, svds: SVDs, keys: list) -> tuple:
    """Stacks of updates of one shape, their kernels and the kernels' SVDs."""
    w = np.stack([np.asarray(kernels[path], np.float64) for _, path in keys])
    w_svd = tuple(np.stack([svds[path][n] for _, path in keys]) for n in range(3))
    return stacked([every[key] for key in keys]), w, w_svd
