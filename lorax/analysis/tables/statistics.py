"""Statistics of every update: functions of an `Update`, built-in and user-defined.

    def condition_number(update):
        sigma = update.singular_values
        return sigma[0] / sigma[-1]

A statistic returns a number, or {name: number}. Its name is the function's.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax import outside, spectrum
from lorax.analysis.tables.matrices import (
    SVDs,
    Updates,
    identity,
    shape_of,
    stacked,
    stacks,
)
from lorax.analysis.tables.update import BUILT_IN, NoBaseError, Update
from lorax.errors import reason
from lorax.interop.adapter import shapes_of

Statistic = Callable[[Update], float | Mapping[str, float]]

#: Names of lorax's own tables and figures
RESERVED = (
    "against_base against_base_layers amplification amplification_layers base_ranks base_spectra "
    "base_spectrum between_layers calibration cka curves differences frontier intrinsic "
    "intrinsic_points intruders kept_rank layers learning_curves members methods "
    "over_chance_layers overlap parallel rank_curve ranks runs sensitivity settings similarity "
    "similarity_grid size_curve spectra spectra_layers texts trajectory update_ranks"
).split()
#: Columns in tables of updates
COLUMNS = ("member", "path", "layer", "target", "rank", "name", "adapter", "sigma", "index")


class Measured(NamedTuple):
    """The values of a statistic for all updates.

    table: one row per member and matrix (member, path, layer, target), and a column per number.
    columns: the names of these columns. missing: {(member, path): why it has no number}.
    """

    table: pd.DataFrame
    columns: list[str]
    missing: dict[tuple[Hashable, str], str]


def read_statistics(names: Sequence[str]) -> list[Statistic]:
    """The functions that "FILE.py:function" names.

    Raises FileNotFoundError or ValueError that names what can't be a statistic.
    """
    functions = [outside.resolve(name, "analysis.also") for name in names]
    check(functions)
    return functions


def check(functions: Sequence[Statistic]) -> None:
    """Raises ValueError that names a function which can't be a statistic: its name is missing or
    taken, or it doesn't take one argument."""
    taken = (*RESERVED, *COLUMNS, *(function.__name__ for function in BUILT_IN))
    seen = set()
    for function in functions:
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise ValueError(
                f"analysis.also: {name or function!r} given, must be a function with a name, as in "
                "def condition_number(update)"
            )
        if name in taken:
            raise ValueError(f"analysis.also: lorax has a {name} of its own; choose another name")
        if name in seen:
            raise ValueError(f"analysis.also: two statistics are called {name}; rename one")
        seen.add(name)
        signature = inspect.signature(function)
        try:
            signature.bind(None)
        except TypeError:
            text = f"analysis.also: {name}{signature} given, must take one argument, the update"
            raise ValueError(text) from None


def each(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray] | None = None,
    no_kernels: str = "no base was given",
    delta_svds: Mapping[Hashable, SVDs] | None = None,
) -> Iterable[Update]:
    """Every update of every member, with its singular values, computed in stacks of one shape and
    in the order of these; updates that are read when asked for are in memory a stack at a time.

    Args:
      updates: {member: {path: Factors, or dW (in, out)}}.
      kernels: the base's (in, out) by path; if one is missing or has another shape, the update has
        no kernel.
      no_kernels: why there are no kernels at all.
      delta_svds: from `update_svds`, if already computed.
    """
    shapes = {
        (member, path): shape
        for member, by_path in updates.items()
        for path, shape in shapes_of(by_path).items()
    }
    for keys in stacks(shapes):
        stack = {(member, path): updates[member][path] for member, path in keys}
        for (member, path), sigma in singular_values(stack, delta_svds).items():
            given = stack.pop((member, path))
            kernel, why = (kernels or {}).get(path), no_kernels
            if kernels is not None and kernel is None:
                why = f"the base has no {path}"
            elif kernel is not None and kernel.shape != shape_of(given)[:2]:
                kernel, why = None, f"the base's {path} is {kernel.shape}"
            yield Update(member, path, given, kernel, why, sigma)


def in_order(rows: Mapping[tuple[Hashable, str], Any], updates: Mapping[Hashable, Updates]) -> list:
    """The values of `rows`, {(member, path): value}, in the order of the updates."""
    return [rows[member, path] for member, by_path in updates.items() for path in by_path]


def singular_values(
    flat: Mapping[tuple[Hashable, str], object], delta_svds: Mapping[Hashable, SVDs] | None = None
) -> dict:
    """{(member, path): sigma (k,)}, descending, float64, of {(member, path): update}. delta_svds:
    from `update_svds`, if already computed."""
    known = {key: (delta_svds or {}).get(key[0], {}).get(key[1]) for key in flat}
    sigmas = {key: svd[1] for key, svd in known.items() if svd is not None}
    for keys in stacks({key: shape_of(x) for key, x in flat.items() if key not in sigmas}):
        update = stacked([flat[key] for key in keys])
        if isinstance(update, tuple):
            sigma = spectrum.factor_svd(*update)[1]
        else:
            sigma = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        sigmas |= dict(zip(keys, sigma, strict=True))
    return sigmas


def numbers(statistic: Statistic, update: Update) -> dict[str, float]:
    """{column: number} of one update. Raises ValueError for a value that isn't a number."""
    value = statistic(update)
    named = value if isinstance(value, Mapping) else {statistic.__name__: value}
    return {_column(name): _number(name, value) for name, value in named.items()}


def _column(name: object) -> str:
    if not isinstance(name, str) or not name or name in COLUMNS:
        raise ValueError(f"returned a number called {name!r}, which can't be a column name")
    return name


def _number(name: str, value: object) -> float | int:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, (Real, np.number, np.bool_)) or isinstance(value, np.complexfloating):
        shape = f" {value.shape}" if isinstance(value, np.ndarray) else ""
        raise ValueError(f"{name} is {type(value).__name__}{shape}; expected a number")
    return int(value) if isinstance(value, (int, np.integer, np.bool_)) else float(value)


def statistics(
    updates: Mapping[Hashable, Updates],
    functions: Sequence[Statistic],
    kernels: Mapping[str, np.ndarray] | None = None,
    no_kernels: str = "no base was given",
) -> dict[str, Measured]:
    """{name: the statistic of every update}.

    If a statistic raises, returns no number or returns NaN, its row has NaN, and `missing` says
    why; the other rows are not affected.

    Args:
      updates: {member: {path: Factors, or dW (in, out)}}.
      functions: the statistics, named by their functions.
      kernels, no_kernels: see `each`.

    Raises ValueError for a function that can't be a statistic (`check`).
    """
    check(functions)
    rows: dict[str, dict] = {function.__name__: {} for function in functions}
    missing: dict[str, dict] = {name: {} for name in rows}
    # Each update is freed before the next.
    for update in each(updates, kernels, no_kernels) if functions else ():
        key = update.member, update.path
        for function in functions:
            name, values = function.__name__, {}
            try:
                values = numbers(function, update)
                nan = [column for column, value in values.items() if math.isnan(value)]
                if nan:
                    missing[name][key] = f"{', '.join(nan)} is NaN"
            except NoBaseError as why:
                missing[name][key] = f"needs the base's weights: {why}"
            except Exception as error:  # whatever it is, compute the others
                missing[name][key] = reason(error)
            rows[name][key] = identity(*key) | values
    measured = {}
    for name, by_key in rows.items():
        listed = in_order(by_key, updates)
        columns = list(dict.fromkeys(key for row in listed for key in row if key not in COLUMNS))
        columns = columns or [name]
        table = pd.DataFrame(listed, columns=["member", "path", "layer", "target", *columns])
        measured[name] = Measured(table, columns, missing[name])
    return measured
