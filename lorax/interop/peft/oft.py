"""OFT in PEFT's modules (`lorax.interop.peft.matrices` says what `write` and `read` are).

A module that is several matrices here has one rotation of its inputs for all of them. PEFT has no
OFT of GPT-2's Conv1D.

The sign of the stored numbers depends on two fields of the config, and their meaning on PEFT's
version: with `use_cayley_neumann`, files from before 0.18 have another series, and only from then
on is there a `peft_version`.
"""

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS
from lorax.interop.peft.modules import Arrays, fit, input_of, not_conv1d


def write(modules, shared, hp):
    """`oft_R.weight` (in/b, b (b - 1) / 2) of every module, without padding.

    Raises ValueError for GPT-2's Conv1D, and for a module whose parts are turned differently."""
    tensors, size = {}, hp["block_size"]
    for place, parts in modules:
        not_conv1d(place, "OFT")
        q = _narrow(input_of(place, parts, "q", "turns"), size, place.inputs)
        tensors[f"{place.name}.oft_R.weight"] = q if hp["neumann"] else -q
    config = {"r": 0, "oft_block_size": size, "module_dropout": 0.0, "init_weights": True}
    config |= {"coft": False, "block_share": False, "peft_version": "0.21.0"}
    config |= {"use_cayley_neumann": hp["neumann"] > 0}
    return tensors, config | {"num_cayley_neumann_terms": hp["neumann"] or 5}


def _narrow(q: np.ndarray, size: int, inputs: int) -> np.ndarray:
    """The numbers of blocks of `size` rows from those of blocks that are as large or larger."""
    large = int(np.sqrt(2 * q.shape[-1])) + 1
    if large == size:
        return q
    full = np.zeros((len(q), large, large), q.dtype)
    full[:, *np.triu_indices(large, 1)] = q
    rows, columns = np.triu_indices(size, 1)
    starts = np.arange(inputs // size)[:, None] * size
    return full[starts // large, starts % large + rows, starts % large + columns]


def read(modules, shared, config, where):
    """The rotations of every module, with one block size for all.

    Raises ValueError for a config that does not say which rotation the numbers mean, for shapes
    that don't fit the base, and for several block sizes."""
    _check_version(config, where)
    exact = not config["use_cayley_neumann"]
    terms = 0 if exact else config.get("num_cayley_neumann_terms", 5)
    if terms == 1:
        raise ValueError(f"{where / CONFIG}: num_cayley_neumann_terms: 1 given, no rotation at all")
    layers: dict[str, Arrays] = {}
    sizes = {}
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        not_conv1d(place, "OFT", here)
        n = fit(here, tensors, **{"oft_R.weight": ("blocks", "pairs")})["blocks"]
        if n == 0 or place.inputs % n:
            raise ValueError(f"{here}: oft_R.weight has {n} blocks for {place.inputs} inputs")
        size = place.inputs // n
        fit(here, tensors, **{"oft_R.weight": (n, size * (size - 1) // 2)})
        _check_size(config, place.inputs, size, f"{where / CONFIG}: {place.name}")
        sizes[place.name] = size
        q = tensors["oft_R.weight"]
        layers |= dict.fromkeys(place.columns, {"q": -q if exact else q})
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(f"{where / WEIGHTS}: one block size can be read, not {found}")
    return {"block_size": sizes.popitem()[1], "neumann": terms}, layers, {}


def _check_version(config, where) -> None:
    """Raises ValueError where it can't be told which rotation was trained."""
    if "oft_block_size" not in config:
        raise ValueError(
            f"{where / CONFIG}: oft_block_size is missing: the file is from before PEFT 0.14, "
            "which has another OFT"
        )
    if config.get("use_cayley_neumann") is None:
        raise ValueError(
            f"{where / CONFIG}: use_cayley_neumann is missing: the rotation was trained either as "
            "exact (false) or as its transpose (true); add what is right"
        )
    version = str(config.get("peft_version") or "0").split("@")[0].split(".")
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in version[:2])
    if config["use_cayley_neumann"] and numbers < (0, 18):
        raise ValueError(
            f"{where / CONFIG}: peft_version: {config.get('peft_version')!r} given; with "
            "use_cayley_neumann, PEFT before 0.18 has another series"
        )


def _check_size(config, inputs: int, size: int, here: str) -> None:
    """Raises ValueError for blocks of another size than PEFT gives a module with these inputs."""
    said, number = config["oft_block_size"], config.get("r", 0)
    if bool(said) == bool(number):
        raise ValueError(f"{here}: r: {number} and oft_block_size: {said} given; one must be 0")
    chosen = _divisor(inputs, said) if said else inputs // _divisor(inputs, number)
    if chosen != size:
        raise ValueError(
            f"{here}: r: {number} and oft_block_size: {said} given, which are blocks of {chosen} "
            f"for {inputs} inputs, but there are blocks of {size}"
        )


def _divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to a number, the smaller one of two; n for a larger number.
    As PEFT's `adjust_oft_parameters`."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
