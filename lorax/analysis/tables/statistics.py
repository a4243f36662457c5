"""Statistics of every update: functions of an `Update`, lorax's own and anyone's.

    def condition_number(update):
        sigma = update.singular_values
        return sigma[0] / sigma[-1]

A statistic returns a number, or {name: number}. Its name is the function's.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis.measures import spectrum
from lorax.analysis.tables.matrices import Updates, by_matrix, identity, shape_of, stacked, stacks
from lorax.analysis.tables.update import BUILT_IN, NoBaseError, Update
from lorax.errors import reason

Statistic = Callable[[Update], float | Mapping[str, float]]

#: Names of what lorax itself writes into analysis/
TAKEN = (
    "against_base amplification base_ranks base_spectra calibration cka differences intrinsic "
    "intrinsic_points intruders members methods ranks runs sensitivity settings similarity spectra "
    "trajectory"
).split()
#: Columns that tables of updates have
COLUMNS = ("member", "path", "layer", "target", "rank", "name", "adapter", "sigma", "index")


class Measured(NamedTuple):
    """What a statistic says of all updates.

    table: a row a member and matrix (member, path, layer, target), and a column a number.
    columns: names of these. missing: {(member, path): why it has no number}.
    """

    table: pd.DataFrame
    columns: list[str]
    missing: dict[tuple[Hashable, str], str]


def check(statistic: Statistic, name: str = "") -> None:
    """Raises ValueError that names the statistic where it can't be one: it is no function of one
    argument, or its name is taken. name: how it was spelled."""
    called = getattr(statistic, "__name__", "")
    name = name or called or repr(statistic)
    if not callable(statistic) or not called.isidentifier():
        raise ValueError(
            f"analysis.also: {name} is not a function with a name; expected one of an Update, as "
            "in def condition_number(update)"
        )
    if called in TAKEN or called in COLUMNS or called in [built.__name__ for built in BUILT_IN]:
        raise ValueError(f"analysis.also: {name}: lorax has a {called} itself; choose another name")
    try:
        inspect.signature(statistic).bind(object())
    except TypeError:
        taken = inspect.signature(statistic)
        raise ValueError(
            f"analysis.also: {name}{taken}: must take one argument, the update"
        ) from None
    except ValueError:  # of a builtin that does not say what it takes
        pass


def check_all(statistics: Sequence[Statistic], names: Sequence[str] = ()) -> None:
    """`check` of each; also that no two have one name."""
    for number, statistic in enumerate(statistics):
        check(statistic, names[number] if names else "")
    called = [statistic.__name__ for statistic in statistics]
    for name in called:
        if called.count(name) > 1:
            raise ValueError(f"analysis.also: two statistics are called {name}; rename one")


def each(
    updates: Mapping[Hashable, Updates],
    kernels: Mapping[str, np.ndarray] | None = None,
    no_kernels: str = "no base was given",
) -> Iterable[Update]:
    """Every update of every member, with its singular values, which are found in stacks.

    Args:
      updates: {member: {path: Factors, or dW (in, out)}}.
      kernels: the base's (in, out) by path; where one is missing or of another shape, the update
        has none. no_kernels: why there are none at all.
    """
    every = by_matrix(updates)
    sigmas = singular_values(every)
    for (member, path), given in every.items():
        kernel, why = (kernels or {}).get(path), no_kernels
        if kernels is not None and kernel is None:
            why = f"the base has no {path}"
        elif kernel is not None and kernel.shape != shape_of(given)[:2]:
            kernel, why = None, f"the base's {path} is {kernel.shape}"
        yield Update(member, path, given, kernel, why, sigmas[member, path])


def singular_values(every: Mapping[tuple[Hashable, str], object]) -> dict:
    """{(member, path): sigma (k,)}, descending, float64; every: of `by_matrix`."""
    sigmas = {}
    for keys in stacks({key: shape_of(update) for key, update in every.items()}):
        update = stacked([every[key] for key in keys])
        if isinstance(update, tuple):
            sigma = spectrum.factor_svd(*update)[1]
        else:
            sigma = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        sigmas |= dict(zip(keys, sigma, strict=True))
    return sigmas


def numbers(statistic: Statistic, update: Update) -> dict[str, float]:
    """{column: number} of one update. Raises ValueError for what is no number."""
    value = statistic(update)
    named = value if isinstance(value, Mapping) else {statistic.__name__: value}
    return {_column(name): _number(name, value) for name, value in named.items()}


def _column(name: object) -> str:
    if not isinstance(name, str) or not name or name in COLUMNS:
        raise ValueError(f"returned a number called {name!r}, which no column can be called")
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
    """{name: what the statistic says of every update}.

    Where one raises, returns no number or returns NaN, the row has NaN, and `missing` says why; the
    other rows have their numbers.

    Args:
      updates: {member: {path: Factors, or dW (in, out)}}.
      functions: statistics; their names are the functions'.
      kernels, no_kernels: see `each`.

    Raises ValueError for what can be no statistic (`check`).
    """
    check_all(functions)
    rows: dict[str, list[dict]] = {function.__name__: [] for function in functions}
    missing: dict[str, dict] = {name: {} for name in rows}
    for update in each(updates, kernels, no_kernels):  # each is dropped before the next
        key = update.member, update.path
        for function in functions:
            name, found = function.__name__, {}
            try:
                found = numbers(function, update)
                nan = [column for column, value in found.items() if math.isnan(value)]
                if nan:
                    missing[name][key] = f"{', '.join(nan)} is NaN"
            except NoBaseError as why:
                missing[name][key] = f"needs the base's weights: {why}"
            except Exception as error:  # whatever it is, the others stand
                missing[name][key] = reason(error)
            rows[name].append(identity(*key) | found)
    measured = {}
    for name, listed in rows.items():
        columns = list(dict.fromkeys(key for row in listed for key in row if key not in COLUMNS))
        columns = columns or [name]
        table = pd.DataFrame(listed, columns=["member", "path", "layer", "target", *columns])
        measured[name] = Measured(table, columns, missing[name])
    return measured
