"""Plans as tables: what a group needs, and what that means on each device."""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from rich import box, table

from lorax.console import console
from lorax.devices import DEVICES, SHARE
from lorax.planning.costs import Plan
from lorax.planning.roofline import OnDevice, in_parts, memory_of, on_device
from lorax.train import mesh_costs


class Table(NamedTuple):
    """A title, headings and rows of text, and a note below the table."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def describe(index: int, p: Plan, devices: Iterable[str]) -> list[Table]:
    """The two tables of a group: what it needs, and what that means on each device."""
    n, one, wide = p.members, p.at(1), p.at(p.width)
    exact, estimated = "exact", "estimated"
    export = exact if p.files_exact else estimated
    each = lambda x: (bytes_text(x), bytes_text(n * x))
    remat = {
        "none": "kept for the backward pass",
        "full": "recomputed in the backward pass",
        "dots": "recomputed except products",
    }[p.remat]
    saved = p.steps[1] < n * p.steps[0]  # by halving
    steps = (one, wide._replace(half=n / p.width * wide.half, full=n / p.width * wide.full))
    lines = [
        ("parameters of the base", f"{p.parameters:,}", "shared", exact),
        ("trainable parameters", _range(p.trainable, "{:,}"), f"{sum(p.trainable):,}", exact),
        ("weights", bytes_text(p.weights), "shared", exact),
        ("adapters, padded alike", *each(p.adapters), exact),
        *[("adapters of the best step", *each(p.kept), exact)] * bool(p.kept),
        *[("states of the base, for the KL", bytes_text(p.states), "shared", exact)]
        * bool(p.states),
        ("constants of the method", *each(p.constants), exact),
        (f"optimiser state{', in the host memory' * p.offload}", *each(p.optimizer), exact),
        ("batches and counters", *each(p.rest), exact),
        ("gradients", bytes_text(p.gradients), bytes_text(p.width * p.gradients), exact),
        (f"activations, {remat}", *(bytes_text(p.activations(c)) for c in (one, wide)), estimated),
        ("peak of training", bytes_text(p.peak(1, one)), bytes_text(p.peak(n, wide)), estimated),
        ("exported arrays", _range(p.files, bytes_text), bytes_text(sum(p.files)), export),
        ("checkpoint", *each(p.state + p.kept), exact),
        ("steps of training", *(f"{x:,}" for x in p.steps), estimated if saved else exact),
        (
            "rows evaluated" + ", test rows apart" * (p.evaluated[1] is None),
            *(f"{m * sum(x or 0 for x in p.evaluated):,}" for m in (1, n)),
            "at most",
        ),
        ("FLOPs a step", *(_si(c.half + c.full) for c in steps), estimated),
        (
            "bytes moved a step",
            bytes_text(one.moved),
            bytes_text(n / p.width * wide.moved),
            estimated,
        ),
    ]
    title = f"Group {index}: {n} member{'s' * (n > 1)}, {p.name}"
    headings = ("", "one member", f"all {n}, {p.width} side by side", "")
    if n == 1:
        headings, lines = ("", "one member", ""), [(a, b, d) for a, b, _, d in lines]
    reached = [_on_device(p, name) for name in devices]
    columns = ("device", "memory to use", "fit side by side", "fit one at a time", "compute")
    columns += ("memory traffic", "a step of all members, at least")
    note = f"All estimated. Memory to use: {SHARE:.0%} of an accelerator's, 80% of what is free "
    note += "on this machine. Peaks: "
    note += "; ".join(f"{name}: {DEVICES[name].source}" for name in devices) + "."
    what = Table(title, headings, lines, "\n".join(p.notes))
    return [what, Table(f"Group {index} on devices", columns, reached, note)]


def describe_mesh(index: int, p: Plan, name: str, devices: int) -> list[Table]:
    """The tables of a group on several devices of one kind: what each has and receives, and how
    fast the meshes are. devices: how many there are."""
    device, on, shape = DEVICES[name], on_device(p, name), p.spread.shape
    each, one = p.each, p.at(1)
    wide = p.at(max(1, min(p.width, on.fit_side_by_side // shape.member)))
    load = p.load._replace(width=wide.width)
    alone, all_ = (
        mesh_costs.traffic(load._replace(members=n), shape) for n in (shape.member, p.members)
    )
    exact, estimated = "exact", "estimated"
    two = lambda x: (bytes_text(x), bytes_text(each * x))
    lines = [
        ("weights", bytes_text(p.weights), "shared", exact),
        ("adapters, padded alike", *two(p.adapters), exact),
        (f"optimiser state{', in the host memory' * p.offload}", *two(p.optimizer), exact),
        ("gradients", bytes_text(p.gradients), bytes_text(wide.width * p.gradients), exact),
        ("activations", *(bytes_text(p.activations(c)) for c in (one, wide)), estimated),
        ("of these a gathered layer, as stored", bytes_text(p.gathered), "shared", exact),
        ("peak of training", bytes_text(p.peak(1, one)), bytes_text(p.peak(each, wide)), estimated),
        ("received in a step: weights", *map(bytes_text, (alone[0], all_[0])), "by the rule"),
        ("gradients of adapters", *map(bytes_text, (alone[1], all_[1])), "by the rule"),
        ("activations", *map(bytes_text, (alone[2], all_[2])), "by the rule"),
    ]
    how = {"mesh": str(shape), "none": "one of them", "members": "members spread, base copied"}
    how = how.get(p.spread.mode, "rows spread, base copied")
    title = f"Group {index} on {devices} {name}: {how}"
    headings = ("on each device", "one member", f"all {each}, {wide.width} side by side", "")
    note = f"By the rule of lorax/train/mesh_costs.py. Links: {device.links}."
    return [Table(title, headings, lines, note), _times(index, p, name, devices, on)]


def _times(index: int, p: Plan, name: str, devices: int, on: OnDevice) -> Table:
    """How long a step and the sweep take: on the mesh of the plan, in parts, and on other meshes by
    the roofline of shapes alone."""
    shape, limit = p.spread.shape, memory_of(name)
    split = in_parts(p, name, devices)
    step = on.compute_seconds, on.moving_seconds, on.communication_seconds, on.step_seconds
    step = [seconds_text(x) for x in (*step, on.apart_seconds, on.sweep_seconds)]
    fits = lambda room: "yes" if room else "no"
    room = fits(p.peak(1, p.at(1)) <= limit)
    taken = f"batch over {shape.fsdp}" if p.spread.mode == "batch" else str(shape)
    lines = [(f"{taken} (taken)", shape.size, room, on.fit_one_at_a_time, *step)]
    parts = f"{split.parts} part{'s' * (split.parts > 1)} of {split.mesh}"
    ends = seconds_text(split.seconds)
    lines.append((parts, split.parts * split.devices, room, *[""] * 6, ends))
    others = p.load._replace(copied=False)
    for other in mesh_costs.ranked(others, devices, DEVICES[name])[:5]:
        if other != shape or p.spread.mode == "batch":
            time = mesh_costs.seconds(others, other, DEVICES[name])
            need = mesh_costs.estimate(others._replace(members=1), other)
            times = [seconds_text(x) for x in (*time, time.overlapped, time.apart)]
            lines.append((str(other), other.size, fits(need <= limit), "", *times, ""))
    columns = ("mesh", "devices", "fits", "members", "compute", "memory", "links", "step", "apart")
    note = "All estimated: a roofline without latencies. Members: that fit. Step: of all members, "
    note += "communication overlapped; apart: not overlapped. Sweep: all steps and evaluations of "
    note += "all members, without starting, compiling and loading. Parts: independent programs "
    note += "(lorax.launch). Last: the fastest other meshes, by shapes alone."
    rows = [tuple(map(str, line)) for line in lines]
    return Table(f"Group {index}: time on {devices} {name}", (*columns, "sweep"), rows, note)


def _on_device(p: Plan, name: str) -> tuple[str, ...]:
    """A device's row in words."""
    on = on_device(p, name)
    compute, moving = on.compute_seconds, on.moving_seconds
    least = f"{seconds_text(max(compute, moving))} ({'compute' if compute > moving else 'memory'})"
    most = on.fit_side_by_side, on.fit_one_at_a_time
    fit = [f"{x:,}" if most[1] else "none" for x in most]
    end = least if most[1] else "does not fit"
    return name, bytes_text(on.memory), *fit, seconds_text(compute), seconds_text(moving), end


def _range(values, show) -> str:
    show = show.format if isinstance(show, str) else show
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def count_text(x: int) -> str:
    """A number of parameters as the field writes it: 6.74B."""
    return _si(x).replace(" ", "").replace("G", "B")


def _si(x: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 T."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{x / size:.{4 if x >= 999.5 * size else 3}g} {prefix}{unit}"
    return f"{x:.3g} {unit}".strip()


def bytes_text(x: float) -> str:
    """A number of bytes: 1.23 GB."""
    return _si(x, "B")


def seconds_text(x: float) -> str:
    """Seconds, or below one milliseconds."""
    return f"{x:.3g} s" if x >= 1 else f"{1e3 * x:.3g} ms"


def show(tables: Iterable[Table], markdown: bool) -> None:
    """Print the tables, each with its note below it: in Markdown, or drawn for the terminal."""
    if markdown:
        for t in tables:
            lines = [t.headings, ["---"] + ["---:"] * (len(t.headings) - 1), *t.rows]
            print(f"\n**{_cell(t.title)}**\n")
            print("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
            print(f"\n{t.note}" * bool(t.note), flush=True)
        return

    screen = console(width=None if sys.stdout.isatty() else 140)
    for t in tables:
        drawn = table.Table(title=t.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(t.headings):
            drawn.add_column(name, justify="right" if i else "left")
        for row in t.rows:
            drawn.add_row(*row)
        screen.print(drawn)
        if t.note:
            screen.print(t.note)


def _cell(text: str) -> str:
    """Text for a Markdown table, where a bar would end the cell."""
    return text.replace("|", "\\|")
