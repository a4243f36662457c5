"""How long a sweep takes on 1 to 1,000 devices, on paper. Reads measured.csv (see measure.py).

    python -m experiments.many_devices.simulate

Writes parts.csv, sharded.csv, gather.csv and many_devices.png beside itself and prints the tables
of docs/many_machines.md. Nothing is run: independent parts take what measure.py has measured, one
sharded base takes the roofline of `lorax.train.mesh_costs`.
"""

import csv
import math
import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.plotting import GREY, STYLE
from lorax import config, methods
from lorax.devices import DEVICES, SHARE
from lorax.meshes import Shape
from lorax.models.load import skeleton
from lorax.planning.shapes import quantised
from lorax.train import mesh_costs

HERE = pathlib.Path(__file__).parent

COUNTS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000)
SWEEPS = (15, 100, 1000)  # members
MODELS = {
    "LLaMA 70B, NF4": ("llama2-70b", True),
    "LLaMA 70B, bfloat16": ("llama2-70b", False),
    "GPT-3 175B, bfloat16": ("gpt3-175b", False),
}
DEVICE, ROWS, TOKENS, MEMBERS = "h200", 64, 2048, 16


def costs() -> tuple[float, float]:
    """(seconds before a part trains, seconds of a member), least squares through measured.csv."""
    with open(HERE / "measured.csv") as file:
        points = [(int(row["members"]), float(row["seconds"])) for row in csv.DictReader(file)]
    each, start = np.polyfit(*zip(*points, strict=True), 1)
    return float(start), float(each)


def parts(members: int, start: float, each: float) -> list[dict]:
    """A sweep in as many parts as there are devices: a row for each number of devices."""
    once = start + members * each
    rows = []
    for devices in COUNTS:
        most = math.ceil(members / devices)
        seconds = start + most * each
        share = start / seconds
        rows.append({"members": members, "devices": devices, "seconds": seconds})
        rows[-1] |= {"efficiency": once / devices / seconds, "starting": share}
    return rows


def load(name: str, four_bits: bool, members: int) -> mesh_costs.Load:
    """LoRA of rank 8 on q and v, 64 rows of 2,048 tokens a step, with remat, members in turn."""
    base = skeleton(f"random:{name}", param_dtype="bfloat16")
    trained = 4 * methods.method("lora", rank=8, targets=("q", "v")).count(base.params, base.sites)
    base = quantised(base, "nf4", True) if four_bits else base
    train = config.default().train
    train.batch_size, train.seq_len, train.remat = ROWS, TOKENS, "full"
    return mesh_costs.Load(base, train, TOKENS, True, members, 1, trained, 3 * trained, 2)


def in_parts(given: mesh_costs.Load, parts: int) -> mesh_costs.Load:
    """The same with batches in so many parts (`train.accumulate`)."""
    train = given.train.copy_and_resolve_references()
    train.accumulate = parts
    return given._replace(train=train)


def whole(load: mesh_costs.Load, devices: int, device) -> Shape | None:
    """The fastest mesh that fits and has so many devices."""
    memory = SHARE * device.memory
    fits = lambda shape: shape.size == devices and mesh_costs.estimate(load, shape) <= memory
    return mesh_costs.choose(load, devices, device, fits)


def sharded(label: str, members: int) -> list[dict]:
    """A step of all members on 1, 2, 4 ... devices: of the meshes that use them all and fit, with
    batches in as many parts as it takes, the fastest."""
    given, device, rows = load(*MODELS[label], members), DEVICES[DEVICE], []
    loads = [in_parts(given, n) for n in (1, 2, 4, 8, 16, 32, 64)]
    alone = mesh_costs.seconds(given, Shape(), device).compute
    for devices in (2**n for n in range(11)):
        chosen = [(load, whole(load, devices, device)) for load in loads]
        timed = [(mesh_costs.seconds(*x, device), *x) for x in chosen if x[1]]
        if not timed:
            continue
        time, split, shape = min(timed, key=lambda x: (round(x[0].overlapped, 9), x[0].apart))
        row = {"model": label, "members": members, "devices": devices}
        row |= {"mesh": str(shape), "parts": split.train.accumulate}
        row |= {"gigabytes": mesh_costs.nbytes(given.base, shape) / 1e9} | time._asdict()
        ideal = alone / devices
        row |= {"overlapped": ideal / time.overlapped, "apart": ideal / time.apart}
        rows.append(row)
    return rows


def gather() -> list[dict]:
    """Tokens on a device at which the product with a layer takes as long as its gathering: n
    numbers of b bytes take b n / bandwidth to gather and 2 n tokens / rate to multiply. Without
    the CPU, whose rate is that of the cores at hand."""
    rows = []
    for name, device in DEVICES.items():
        if name == "cpu":
            continue
        far = mesh_costs.bandwidth(device, 1, 2 * device.linked)
        for stored, size in (("bfloat16", 2), ("NF4", (4 + 8 / 64 + 32 / (64 * 256)) / 8)):
            near, over = (size * device.half / 2 / speed for speed in (device.link, far))
            rows.append({"device": name, "stored": stored, "linked": near, "network": over})
    return rows


def write(name: str, rows: list[dict], directory: pathlib.Path) -> None:
    text = lambda x: f"{x:.4g}" if isinstance(x, float) else x
    with open(directory / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: text(value) for key, value in row.items()} for row in rows)


def markdown(headings: tuple, rows: list[tuple]) -> None:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), end="\n\n")


def draw(swept: list[list[dict]], divided: list[list[dict]], directory: pathlib.Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for rows in swept:
            label = f"{rows[0]['members']:,} members"
            left.plot([r["devices"] for r in rows], [r["efficiency"] for r in rows], label=label)
        for rows in divided:
            at = [r["devices"] for r in rows]
            (line,) = right.plot(at, [r["overlapped"] for r in rows], label=rows[0]["model"])
            right.plot(at, [r["apart"] for r in rows], ":", color=line.get_color())
        left.set_title("independent parts, measured on a CPU core")
        right.set_title(f"{divided[0][0]['members']} members, roofline of {DEVICE.upper()}s")
        for axes in (left, right):
            axes.axhline(0.5, color=GREY, linewidth=1)
            axes.set_xscale("log")
            axes.set_xlabel("devices")
            axes.set_ylim(0, 1.05)
            axes.legend(fontsize=7)
        left.set_ylabel("share of the devices' time that trains")
        figure.savefig(directory / "many_devices.png", dpi=150)


def main(directory: pathlib.Path = HERE) -> None:
    start, each = costs()
    swept = [parts(members, start, each) for members in SWEEPS]
    one = [sharded(label, 1) for label in MODELS]
    several = [sharded(label, MEMBERS) for label in MODELS]
    write("parts.csv", [row for rows in swept for row in rows], directory)
    write("sharded.csv", [row for rows in one + several for row in rows], directory)
    write("gather.csv", gather(), directory)
    draw(swept, several, directory)
    print(f"a part starts in {start:.1f} s, a member takes {each:.1f} s\n")
    cell = lambda row: f"{row['seconds']:,.0f} s, {row['efficiency']:.0%}"
    table = [(f"{n:,}", *(cell(rows[i]) for rows in swept)) for i, n in enumerate(COUNTS)]
    markdown(("devices", *(f"{n:,} members" for n in SWEEPS)), table)
    for runs in (one, several):
        print(f"{runs[0][0]['members']} member(s)\n")
        show = lambda r: (
            *(f"{r['devices']:,}", r["mesh"], r["parts"], f"{r['gigabytes']:.3g} GB"),
            *(f"{r[name]:.3g} s" for name in ("compute", "communication")),
            *(f"{r[name]:.0%}" for name in ("overlapped", "apart")),
        )
        for rows in runs:
            head = (rows[0]["model"], "mesh", "parts", "base a device", "compute", "communication")
            markdown((*head, "overlapped", "apart"), [show(row) for row in rows])
    table = [(r["device"], r["stored"], *(f"{r[k]:,.0f}" for k in ("linked", "network")))
             for r in gather()]  # fmt: skip
    markdown(("device", "base in", "tokens, over links", "tokens, over the network"), table)


if __name__ == "__main__":
    main()
