"""What `python -m lorax.xray` prints."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from lorax import spectrum
from lorax.interop.formats.contract import Found
from lorax.xray import defects, together
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
    """What a file is: "style: kohya: 264 LoRA; rank 32, F16"."""
    return f"{name}: {found.format}: {kinds(found)}"


def kinds(found: Found) -> str:
    """Kinds, ranks and types of the updates: "264 LoRA; rank 4 to 32, F16"."""
    if not found.updates:
        return "no update that the file alone has"
    counts = Counter(update.kind for update in found.updates)
    ranks = sorted({update.rank for update in found.updates})
    rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
    dtypes = ", ".join(sorted({update.dtype for update in found.updates}))
    return f"{', '.join(f'{n} {kind}' for kind, n in counts.items())}; rank {rank}, {dtypes}"


def about(found: Found) -> dict[str, str]:
    """What the file says about itself, where its scales are from, and what to know about it."""
    facts = {"scale": "; ".join(_scales(found))}
    told = {key: value for key, value in found.config.items() if TOLD.search(key.lower())}
    listed = [f"{key} {value}" for key, value in told.items() if _is_short(value)][:FACTS]
    facts["it says"] = "; ".join(listed)
    names = ", ".join(f"{name} {tuple(shape)}" for name, shape in [*found.beside.items()][:3])
    more = len(found.beside) - 3
    facts["also in it"] = names + (f" and {more} more tensors" if more > 0 else "")
    warned: dict[str, list[str]] = {}
    for update in found.updates:
        for warning in update.warnings:
            warned.setdefault(warning, []).append(update.layer)
    notes = [*found.notes, *(f"{text} ({defects.named(of)})" for text, of in warned.items())]
    facts |= {f"note {n}" if len(notes) > 1 else "note": x for n, x in enumerate(notes, 1)}
    return {name: value for name, value in facts.items() if value}


def _scales(found: Found) -> list[str]:
    """The scales and where they are from, as "2 in 64 matrices: config lora_alpha / r"."""
    scales: dict[str, list[float]] = {}
    for update in found.updates:
        scales.setdefault(update.source, []).append(update.scale)
    said = []
    for source, values in scales.items():
        low, high = min(values), max(values)
        value = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        said.append(f"{value} in {len(values)} matrices: {source}")
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


def against_base(directory: Path) -> list[Table]:
    """A table of a page's amplification and intruders by target; [] without a base."""
    from lorax import rundir

    amplified, intruding = (
        rundir.table(directory, name) for name in ("amplification", "intruders")
    )
    if not intruding.exists():
        return []
    import pandas as pd  # slow to import

    counts = pd.read_csv(intruding)
    counts = counts[(counts["k"] == counts["k"].max()) & (counts["epsilon"] == 0.5)]
    k = int(counts["k"].max())
    means = counts.groupby(["member", "target"], sort=False)[["intruders", "control"]].mean()
    if amplified.exists():
        of_w = pd.read_csv(amplified).groupby(["member", "target"])[["over_chance", "factor"]]
        means = means.join(of_w.median())
    table = Table(title="Against the base", title_justify="left", box=None, pad_edge=False)
    heads = {"intruders": f"intruders of {k}", "control": "random", "over_chance": "W over chance"}
    for head in ("", "target", *(heads.get(name, "amplification") for name in means)):
        table.add_column(head, justify="left" if head in ("", "target") else "right")
    for (name, target), row in means.iterrows():
        table.add_row(name, target, *(f"{x:.3g}" for x in row))
    return [table]
