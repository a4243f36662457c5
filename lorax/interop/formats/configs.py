"""The fields of PEFT's configs, LoraConfig, LoHaConfig and LoKrConfig, for updates in a file.

PEFT's directory has them in adapter_config.json, diffusers' file in its header. PEFT makes the
tensors of LoKr by a rule (tuners/lokr/layer.py): sizes are divided by `decompose_factor`, and a
side of the product is itself a product if r is less than half of its longer axis, the first side
only with `decompose_both`. LyCORIS has the same rule, and more freedom: what is not so is refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lorax.factorization import factorization
from lorax.interop.formats.contract import Update
from lorax.interop.formats.factored import alpha_of, inner_rank
from lorax.interop.peft.config import as_patterns

#: Kinds whose tensors are LyCORIS's, and PEFT's word for them.
LYCORIS = {"LoHa": "LOHA", "LoKr": "LOKR"}
_CORES = ("hada_t1", "lokr_t2")

Refused = Callable[[str], ValueError]


def config_fields(by_name: Mapping[str, Update], refused: Refused) -> dict[str, Any]:
    """The fields for {module: update}. Raises ValueError for what PEFT can't say."""
    words = {LYCORIS.get(update.kind, "LORA") for update in by_name.values()}
    if len(words) > 1:
        kind = next(update.kind for update in by_name.values() if update.kind in LYCORIS)
        raise refused(f"{kind} in some of its matrices; PEFT has it in all or none")
    match words.pop():
        case "LORA":
            return _lora(by_name, refused)
        case "LOHA":
            return _loha(by_name, refused)
        case _:
            return _lokr(by_name, refused)


def _lora(by_name: Mapping[str, Update], refused: Refused) -> dict[str, Any]:
    dora = {update.kind == "DoRA" for update in by_name.values()}
    if len(dora) > 1:
        raise refused("DoRA in some of its matrices; PEFT has it in all or none")
    ranks = {name: update.rank for name, update in by_name.items()}
    alphas = {name: alpha_of(update, refused) for name, update in by_name.items()}
    common = _patterns(by_name, ranks, alphas)
    common["lora_alpha"] = common.pop("alpha")
    flags = {"use_dora": dora.pop(), "use_rslora": False, "bias": "none"}
    return {"peft_type": "LORA"} | common | flags


def _loha(by_name: Mapping[str, Update], refused: Refused) -> dict[str, Any]:
    ranks = {}
    for name, update in by_name.items():
        of_sides = {update.stored[f"hada_w{i}_b"].shape[0] for i in "12"}
        if len(of_sides) > 1:
            raise refused(f"{name} has sides of ranks {sorted(of_sides)}; PEFT has one rank")
        ranks[name] = of_sides.pop()
    alphas = {name: alpha_of(update, refused) for name, update in by_name.items()}
    cores = {"use_effective_conv2d": _with_cores(by_name, refused)}
    return {"peft_type": "LOHA"} | _patterns(by_name, ranks, alphas) | cores


def _patterns(by_name: Mapping[str, Update], ranks, alphas) -> dict[str, Any]:
    (r, rank_pattern), (alpha, alpha_pattern) = (
        as_patterns({_pattern(name, by_name): x for name, x in values.items()})
        for values in (ranks, alphas)
    )
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(by_name),
    }


def _pattern(name: str, names: Iterable[str]) -> str:
    """A pattern that matches this name alone: one without "^" also matches what ends so."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _with_cores(by_name: Mapping[str, Update], refused: Refused) -> bool:
    """Whether convolutions have Tucker's cores, which with PEFT all have or none."""
    has = {name: any(core in x.stored for core in _CORES) for name, x in by_name.items()}
    for name, update in by_name.items():
        whole = "lokr_w2" in update.stored
        if any(has.values()) and not has[name] and not whole and _kernels(name)[0] > 1:
            raise refused(f"{name} has no core of Tucker's; PEFT has one in all or none")
    return any(has.values())


# ------------------------------------------------------------------------------------------- LoKr


class _Sides(NamedTuple):
    """w1 (out 1, in 1) and w2 (out 2, in 2 · kernel) of a module. products: whether each is one.
    rank: of the products, None if both are whole."""

    first: tuple[int, int]
    second: tuple[int, int]
    products: tuple[bool, bool]
    rank: int | None


def _lokr(by_name: Mapping[str, Update], refused: Refused) -> dict[str, Any]:
    sides = {name: _sides(update) for name, update in by_name.items()}
    both = any(one.products[0] for one in sides.values())
    # Of sides that are whole, r only divides alpha; a power of two does so without rounding.
    ranks = {name: one.rank or _power(max(*one.first, *one.second)) for name, one in sides.items()}
    factor = _factor(sides, ranks, both)
    if factor is None:
        listed = ", ".join(f"{name} {one.first} x {one.second}" for name, one in sides.items())
        raise refused(f"no decompose_factor of PEFT's LoKr makes these sides: {listed[:200]}")
    alphas = {
        name: update.scale * ranks[name] if sides[name].rank is None else alpha_of(update, refused)
        for name, update in by_name.items()
    }
    flags = {"decompose_both": both, "decompose_factor": factor}
    flags["use_effective_conv2d"] = _with_cores(by_name, refused)
    return {"peft_type": "LOKR"} | _patterns(by_name, ranks, alphas) | flags


def _sides(update: Update) -> _Sides:
    stored, sides = update.stored, []
    for i in "12":
        if whole := stored.get(f"lokr_w{i}"):
            sides.append((whole.shape[0], math.prod(whole.shape[1:])))
        else:
            a, b = (stored[f"lokr_w{i}_{x}"].shape for x in "ab")
            core = stored.get("lokr_t2") if i == "2" else None
            sides.append((a[1], b[1] * math.prod(core.shape[2:])) if core else (a[0], b[1]))
    products = tuple(f"lokr_w{i}" not in stored for i in "12")
    return _Sides(*sides, products, inner_rank(update))


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << (n - 1).bit_length()


def _factor(sides: Mapping[str, _Sides], ranks: Mapping[str, int], both: bool) -> int | None:
    """The `decompose_factor` with which PEFT makes all these sides, None if none does."""
    most = max(max(one.first) for one in sides.values())
    for factor in (-1, *range(1, 2 * most + 1)):  # one that divides no size may be larger than most
        if all(_makes(name, one, ranks[name], both, factor) for name, one in sides.items()):
            return factor
    return None


def _makes(name: str, one: _Sides, r: int, both: bool, factor: int) -> bool:
    """Whether PEFT makes these sides of a module, with one of the kernels that it may have."""
    (out_1, in_1), (out_2, in_2k) = one.first, one.second
    for kernel in _kernels(name):
        in_2, rest = divmod(in_2k, kernel)
        products = both and r < max(out_1, in_1) / 2, r < max(out_2, in_2) / 2
        divided = factorization(out_1 * out_2, factor), factorization(in_1 * max(in_2, 1), factor)
        if not rest and products == one.products and divided == ((out_1, out_2), (in_1, in_2)):
            return True
    return False


def _kernels(name: str) -> tuple[int, ...]:
    """Numbers of a kernel that a module may have, which a product of two sides does not say."""
    return (9, 1, 3, 25, 49) if re.search(r"(^|\.)(conv(?!_shortcut)|op\b)", name) else (1,)
