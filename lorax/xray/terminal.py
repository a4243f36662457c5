"""What `python -m lorax.xray` prints."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.table import Table

from lorax.analysis.measures import spectrum
from lorax.interop.formats.contract import Found
from lorax.xray import together
from lorax.xray.keeping import Kept
from lorax.xray.measured import Measured

ROWS = 40  # matrices in a table, if not all are asked for
SIGMAS = 4  # singular values in a row
FACTS = 12  # lines of what a file says about itself
#: Fields of a file's own words that say what it is.
TOLD = re.compile(
    r"base_model|model_name|model_version|architecture|title|author|trigger|peft_type|fine_tune"
    r"|(^|_)(r|rank|dim|alpha|scale|rslora|dora|module|type)$"
)


def headline(name: str, found: Found) -> str:
    """What a file is: "style.safetensors: kohya, 264 matrices: 264 LoRA of rank 32, F16"."""
    kinds = Counter(update.kind for update in found.updates)
    ranks = sorted({update.rank for update in found.updates})
    rank = f"{ranks[0]}" if len(ranks) < 2 else f"{ranks[0]} to {ranks[-1]}"
    dtypes = ", ".join(sorted({update.dtype for update in found.updates}))
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{name}: {found.format}: {parts}; rank {rank}, {dtypes}"


def about(found: Found) -> list[str]:
    """What the file says about itself, where its scales are from, and what to know about it."""
    said = []
    sources: dict[str, set[float]] = {}
    for update in found.updates:
        sources.setdefault(update.source, set()).add(update.scale)
    counts = Counter(update.source for update in found.updates)
    for source, scales in sources.items():
        low, high = min(scales), max(scales)
        value = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        said.append(f"scale {value} in {counts[source]} matrices: {source}")
    told = {key: value for key, value in found.config.items() if TOLD.search(key.lower())}
    told = {key: value for key, value in told.items() if _is_short(value)}
    listed = [f"{key} {value}" for key, value in told.items()][:FACTS]
    if listed:
        said.append(f"the file says: {'; '.join(listed)}")
    if found.beside:
        names = ", ".join(f"{name} {tuple(shape)}" for name, shape in [*found.beside.items()][:3])
        more = len(found.beside) - 3
        said.append(f"also in it: {names}" + (f" and {more} more tensors" if more > 0 else ""))
    said += found.notes
    warned: dict[str, list[str]] = {}
    for update in found.updates:
        for warning in update.warnings:
            warned.setdefault(warning, []).append(update.layer)
    said += [
        f"{warning} ({layers[0]}" + f" and {len(layers) - 1} more" * (len(layers) > 1) + ")"
        for warning, layers in warned.items()
    ]
    return said


def _is_short(value) -> bool:
    return isinstance(value, bool | int | float) or isinstance(value, str) and 0 < len(value) < 80


def matrices(measured: Sequence[Measured], all_rows: bool = False) -> tuple[Table, str]:
    """(The table of a file's updates, which rows it leaves out). It has those with the largest
    norms if there are more than `ROWS`."""
    squares = np.array([0.0 if one.bad else one.norm**2 for one in measured])
    total = squares.sum()
    shown = range(len(measured))
    if len(measured) > ROWS and not all_rows:
        shown = sorted(np.argsort(-squares, kind="stable")[:ROWS].tolist())
    table = Table(title_justify="left", box=None, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    for head in ("in x out", "r", "s", "numerical", "effective", "stable", "90%", "||dW||"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("singular values", no_wrap=True)
    for i in shown:
        table.add_row(*_cells(measured[i], squares[i] / total if total else 0.0))
    left = len(measured) - len(shown)
    rest = 1 - squares[list(shown)].sum() / total if total else 0.0
    omitted = f"{left} smaller matrices, {rest:.1%} of the squared norm, are left out: --all"
    return table, omitted if left else ""


def _cells(one: Measured, share: float) -> list[str]:
    update, sigma = one.update, one.sigma
    start = [update.layer, f"{update.shape[0]} x {update.shape[1]}", str(update.rank)]
    start.append(f"{update.scale:.4g}")
    if one.bad:
        return [*start, *["-"] * 6, f"{one.bad} NaN or infinite"]
    return [
        *start,
        str(numerical(one)),
        f"{spectrum.effective_rank(sigma):.2f}",
        f"{spectrum.stable_rank(sigma):.2f}",
        str(spectrum.energy_rank(sigma, 0.9)),
        f"{one.norm:.4g}",
        f"{share:.1%}",
        " ".join(f"{x:.3g}" for x in sigma[:SIGMAS]) + " ..." * (len(sigma) > SIGMAS),
    ]


def numerical(one: Measured) -> int:
    """The numerical rank of an update, at the rounding of float32."""
    return int(spectrum.numerical_rank(one.sigma, one.update.shape))


def total(measured: Sequence[Measured]) -> str:
    """A line about all updates of a file."""
    finite = [one for one in measured if not one.bad]
    norm = float(np.sqrt(sum(one.norm**2 for one in finite)))
    moving = [one for one in finite if not one.idle]
    mean = np.mean([spectrum.effective_rank(one.sigma) for one in moving]) if moving else 0.0
    return (
        f"all: ||dW|| {norm:.4g}; {mean:.1f} directions per matrix on average (effective rank); "
        f"{sum(one.parameters for one in measured):,} parameters"
    )


def smaller(choices: Iterable[Kept], before: int) -> Table:
    """How far a file can be shrunk. before: its parameters."""
    table = Table(title="Shrunk to", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for head in ("relative error", "directions", "largest rank", "parameters", "of now"):
        table.add_column(head, justify="right")
    for choice in choices:
        table.add_row(
            choice.words,
            f"{choice.error:.3g}",
            f"{sum(choice.ranks.values()):,}",
            str(max(choice.ranks.values())),
            f"{choice.parameters:,}",
            f"{choice.parameters / before:.0%}",
        )
    return table


def pairs(rows: Iterable[together.Whole]) -> Table:
    """The similarity of files."""
    table = Table(title="Directions in common", title_justify="left", box=None, pad_edge=False)
    for head in ("", "and"):
        table.add_column(head)
    heads = ("matrices", "cosine of dW", "chance", "phi in", "chance", "phi out", "chance")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row.first,
            row.second,
            str(row.matrices),
            f"{row.cosine:+.3f}",
            f"± {row.chance:.2g}",
            *(f"{getattr(row, x):.3f}" for x in ("phi_in", "chance_in", "phi_out", "chance_out")),
        )
    return table


def added(rows: Iterable[together.InSum]) -> Table:
    """What becomes of each file in the sum of all."""
    table = Table(title="In the sum of all", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for head in ("matrices", "kept", "disturbed by others", "by chance"):
        table.add_column(head, justify="right")
    for row in rows:
        numbers = f"{row.kept:.3f}", f"{row.disturbed:.3f}", f"{row.by_chance:.3f}"
        table.add_row(row.name, str(row.matrices), *numbers)
    return table


def conflicts(rows: Sequence[together.Added], most: int = 5) -> list[str]:
    """The matrices in which the sum cancels most of an update, at least a tenth; a line each."""
    worst = []
    for row in rows:
        kept = row.total.kept
        if np.isfinite(kept).any():
            i = int(np.nanargmin(kept))
            worst.append((float(kept[i]), row.names[i], row.layer))
    cancelled = sorted(x for x in worst if x[0] < 0.9)[:most]
    return [f"{layer}: {kept:.2f} of {name} is kept" for kept, name, layer in cancelled]


def shapes(measured: Iterable[Measured]) -> Mapping[str, tuple[int, int]]:
    """{layer: (in, out)}."""
    return {one.update.layer: one.update.shape for one in measured}
