"""Results beside each other: ratios, shares of what the device reaches, and the table of paths.

They are computed from the file that `python -m lorax.bench gpu` writes, whichever device it is of.
"""

from typing import NamedTuple

from rich.table import Table

from lorax.bench.gpu.schedule import DONE, duration
from lorax.quant import matmul

BF16 = "bf16"
#: Rows of x -> time over that of a bfloat16 weight that a product with NF4 is to have at most.
GOALS = {1: 0.50, 16: 0.60, 256: 1.30, 1024: 1.25, 2048: 1.15, 8192: 1.05}
DECODE_GOAL = 0.75  # of the bandwidth


class Rates(NamedTuple):
    """What the device reaches: bytes/s of a copy, FLOP/s of products; None if not measured."""

    bandwidth: float | None
    bfloat16: float | None
    float32: float | None


class Line(NamedTuple):
    """A row beside the others of its case. relative: its time over that of the case's first row.
    share: the least time by the device's rates, over the row's. goal: "", or what is wanted and
    whether it holds. remark: why there is no time. Unknown numbers are None."""

    case: str
    path: str
    ms: float | None
    relative: float | None
    share: float | None
    goal: str
    remark: str


def rows_of(results: dict) -> list[dict]:
    """The rows of all measurements."""
    return [row for result in results["measurements"] for row in result["rows"]]


def rates(rows: list[dict]) -> Rates:
    """From the rows of `products.ceilings`."""
    found = {}
    for row in rows:
        if "ms" in row and row["case"].startswith(("copy", "square product")):
            ((moved, flops),) = row["phases"]
            name = "bandwidth" if moved else row["path"]
            found[name] = (moved or flops) / row["ms"] * 1e3
    return Rates(*(found.get(name) for name in Rates._fields))


def least_ms(row: dict, known: Rates) -> float | None:
    """The least time of a row's phases at these rates, None if a rate is missing."""
    rate = known.float32 if row.get("dtype") == "float32" else known.bfloat16
    if not row["phases"] or None in (rate, known.bandwidth):
        return None
    return 1e3 * sum(max(moved / known.bandwidth, flops / rate) for moved, flops in row["phases"])


def lines(rows: list[dict]) -> list[Line]:
    """All rows, those of a case together, in the order of the first of each."""
    known, cases = rates(rows), {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    made = []
    for case, members in cases.items():
        first = next((row["ms"] for row in members if "ms" in row), None)
        for row in members:
            if "ms" not in row:
                why = row.get("failed") or row.get("skipped")
                made.append(Line(case, row["path"], None, None, None, "", why))
                continue
            least, relative = least_ms(row, known), row["ms"] / first
            share = least and least / row["ms"]
            goal = _goal(row, members[0], relative, share)
            made.append(Line(case, row["path"], row["ms"], relative, share, goal, ""))
    return made


def _goal(row: dict, first: dict, relative: float, share: float | None) -> str:
    n = _rows(row["case"])
    if n in GOALS and first["path"] == BF16 and row["path"] == matmul.path(n):
        return f"<= {GOALS[n]:.2f} {'met' if relative <= GOALS[n] else 'missed'}"
    if row["case"].startswith("decode ") and share is not None:
        return f">= {DECODE_GOAL:.0%} {'met' if share >= DECODE_GOAL else 'missed'}"
    return ""


def _rows(case: str) -> int | None:
    """Of "product 4096 x 4096, 16 rows": 16; None for another case."""
    words = case.split()
    is_product = case.startswith("product ") and words[-1] in ("row", "rows")
    return int(words[-2]) if is_product else None


class Class(NamedTuple):
    """A line of `matmul.PATHS`. rows: "65-512". takes: its path. fastest: {(case's shape, rows):
    path of `matmul` with the least time}."""

    rows: str
    takes: str
    fastest: dict[tuple[str, int], str]

    @property
    def hint(self) -> str:
        other = {key: path for key, path in self.fastest.items() if path != self.takes}
        if not self.fastest:
            return "not measured"
        if not other:
            return "is the fastest where measured"
        where = ", ".join(f"{path} at {n} ({shape})" for (shape, n), path in other.items())
        return f"faster: {where}"


def classes(rows: list[dict]) -> list[Class]:
    """The lines of `matmul.PATHS`, with the path that these rows say was fastest."""
    times = {}
    for row in rows:
        n = _rows(row["case"])
        if n and "ms" in row and row["path"] in (matmul.FUSED, matmul.TWO_PASSES):
            shape = row["case"].removeprefix("product ").partition(",")[0]
            times.setdefault((shape, n), {})[row["path"]] = row["ms"]
    # A path that was measured alone may have been the only one that could.
    fastest = {key: min(ms, key=ms.get) for key, ms in times.items() if len(ms) == 2}
    made, least = [], 1
    for most, takes in matmul.PATHS:
        here = {key: path for key, path in sorted(fastest.items()) if least <= key[1] <= most}
        name = f"{least}-{most}" if most > least else f"{least}"
        made.append(Class(name if most < 1e9 else f"> {least - 1}", takes, here))
        least = most + 1
    return made


# --------------------------------------------------------------------------------------- on a page


def summary(results: dict) -> list[Table | str]:
    """What is printed at the end."""
    rows = rows_of(results)
    title = f"{results['machine']['name']}, jax {results['machine']['versions']['jax']}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "by", "time", "of the first", "of the device", "goal"):
        right = heading in ("time", "of the first", "of the device")
        table.add_column(heading, justify="right" if right else "left")
    last = None
    for line in lines(rows):
        numbers = [
            duration(line.ms) if line.ms is not None else "-",
            f"{line.relative:.2f}" if line.relative is not None else "",
            f"{line.share:.0%}" if line.share is not None else "",
        ]
        name = line.case if line.case != last else ""
        table.add_row(name, line.path, *numbers, line.goal or line.remark)
        last = line.case
    known = rates(rows)
    parts: list[Table | str] = [table]
    if None not in known:
        parts.append(
            f"of the device: of {known.bandwidth / 1e12:.3g} TB/s of a copy and "
            f"{known.bfloat16 / 1e12:.3g} TFLOP/s ({known.float32 / 1e12:.3g} in float32) of a "
            "square product, the slower of the two"
        )
    parts.append("lorax.quant.matmul.PATHS takes, by rows of x:")
    parts += [f"  {c.rows}: {c.takes}; {c.hint}" for c in classes(rows)]
    for result in results["measurements"]:
        if result["status"] != DONE:
            parts.append(f"{result['name']}: {result['status']}: {result['why']}")
    if results["small"]:
        parts.append("small shapes: these times say that the code runs, and nothing about speed")
    return parts
