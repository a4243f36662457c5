"""Estimates the cost of a config before running it: parameters, bytes, FLOPs, time, members that
fit.

    python -m lorax.plan --config=configs/gpt2_rank_sweep.py
    python -m lorax.plan --config=configs/gpt2_rank_sweep.py --config.base=random:gpt3-175b \\
        --config.param_dtype=bfloat16 --config.dtype=bfloat16 --config.train.remat=full
    python -m lorax.plan --config=FILE --device=h200,cpu
    python -m lorax.plan --config=FILE --device=h200 --hosts=8
    python -m lorax.plan --config=FILE --device=h200 --mesh=fsdp=4,tensor=2
    python -m lorax.plan --table --markdown

Nothing is allocated: shapes come from `jax.eval_shape`, and the training step is compiled, for one
member and for a group's members side by side, to see which buffers it needs. Of a base only
config.json is read; "random:NAME" is an architecture of lorax/models/shapes.py. Only `train.epochs`
makes a plan read the task's rows, to count them.

Numbers that follow from shapes are exact. Estimated are: temporaries, including activations, as XLA
allocates them for a CPU (without converting bfloat16 weights to float32 first, which it does only
there); FLOPs, those of matrix products; bytes moved, what these products and the optimiser read and
write. Rows are assumed to be `train.seq_len` long. Time is a roofline, a lower bound.

--hosts and --mesh plan for many devices: what each holds and receives, and how long a step and the
sweep take, in one program and in independent parts. --mesh=auto, the default, is what a run takes:
the base copied to every device if it fits there with a member, else the fastest mesh that fits, by
a roofline that overlaps communication with computing. What a device receives follows from the rule
of lorax/train/mesh_costs.py; temporaries are those of the program compiled for the mesh.

--table instead compares well-known models: trainable parameters by rank, full fine-tuning with LoRA
and QLoRA, and models that need several devices. --markdown prints tables as Markdown.
"""

import os
import sys
from collections.abc import Iterable

from absl import flags
from ml_collections import ConfigDict

from lorax import __version__, command_line, config, halving, memory, meshes, search
from lorax.callable import make_callable
from lorax.command_line import FLAGS
from lorax.devices import DEVICES, check_devices
from lorax.errors import fail

ONE_TASK = (
    "sequence: a plan is of one task; give --config.sequence=() and the config.task of one. From "
    "the second task on, each member has its own base and trains alone"
)
MOST_COMPILED = 512  # devices of a CPU that a program is compiled for
MOST_TABLE = 64  # of --table

flags.DEFINE_string(
    "device", "h200,a100,tpu-v5p,cpu", "Devices to plan for, by name.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "table", False, "Compare well-known models; needs no --config.", flag_values=FLAGS
)
flags.DEFINE_string(
    "mesh", None, "Devices along each axis, such as fsdp=4,tensor=2, or auto.", flag_values=FLAGS
)
flags.DEFINE_integer("hosts", None, "Hosts, each with all of its devices.", flag_values=FLAGS)
flags.DEFINE_bool("markdown", False, "Print tables as Markdown.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """The command line. Exit code 0, or 2 for a mistake in the input."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(__doc__)
        for name in ("config", "device", "mesh", "hosts", "table", "markdown"):
            print(f"  --{name:9s} {FLAGS[name].help}")
        print(f"  devices: {', '.join(DEVICES)}")
        return 0
    try:
        if any(argument.lstrip("-") in ("table", "table=true") for argument in argv[1:]):
            FLAGS(argv)
            print(f"lorax {__version__}: well-known models, from their shapes", flush=True)
            start_devices(MOST_TABLE)
            show_comparison()
            return 0
        settings, members, _ = command_line.read(argv)
        if settings.sequence:
            raise ValueError(ONE_TASK)
        devices = FLAGS.device.split(",")
        check_devices(devices)
        print(f"lorax {__version__}: {command_line.summary(settings, members)}", flush=True)
        memory.check()
        counts = check_mesh(devices, FLAGS.mesh, FLAGS.hosts)
        start_devices(max(counts.values(), default=1))
        show_plans(settings, members, devices, counts, FLAGS.mesh)
    except Exception as error:  # a config script may raise anything: print one line
        return fail(error)
    return 0


def check_mesh(devices: Iterable[str], mesh: str | None, hosts: int | None) -> dict[str, int]:
    """{device: how many of them --mesh and --hosts mean}; {} without both. Raises ValueError for a
    mesh that is none, or of more devices than the hosts have."""
    if mesh is None and hosts is None:
        return {}
    return {name: meshes.devices_of(DEVICES[name], mesh, hosts) for name in devices}


def start_devices(n: int) -> None:
    """Start JAX with so many CPU devices, at most `MOST_COMPILED`, for programs to be compiled for.
    Must be called before JAX's first computation."""
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(MOST_COMPILED, n))


def show_plans(
    settings: ConfigDict, members, devices: list[str], counts: dict[str, int], mesh: str | None
) -> None:
    """Print the plan of every group. counts: {device: number of them}, for plans of several."""
    from lorax.planning import costs, shapes, spread, tables  # import JAX; memory may not suffice

    members = shapes.with_steps(members, print)
    race = halving.race(settings, members)
    if race and any(member.config.train.epochs for member in members):
        print(halving.budget(race))
    for index, group in enumerate(config.grouped(members)):
        if not counts:
            plan = costs.plan(group, devices, race)
            tables.show(tables.describe(index, plan, devices), FLAGS.markdown)
        for name, count in counts.items():
            plan = spread.plan(group, name, count, mesh, race)
            tables.show(tables.describe_mesh(index, plan, name, count), FLAGS.markdown)


def show_comparison() -> None:
    """Print the tables of well-known models."""
    from lorax.planning import field, tables

    tables.show(field.tables(), FLAGS.markdown)


def plan_config(
    settings: ConfigDict,
    devices: str | Iterable[str] = ("cpu",),
    mesh: str | None = None,
    hosts: int | None = None,
):
    """The cost of a config: a pandas DataFrame with a row per group of members and device.

    mesh, hosts: as --mesh and --hosts of the command; without both of them on one device.

    Columns: group, method, base, members, steps (of all members together, with what
    `config.sweep.tune` saves if nothing diverges), parameters (of the base), trainable_params (of
    the largest member), device, mesh, mode (of `train.layouts.Layout`), devices; in bytes on each
    device: weights (shared), adapters, optimizer, gradients and activations of one member, gathered
    (the largest layer that it gathers, as stored) and peak of all its members side by side, and
    weights_received, gradients_received and activations_received in a step of all members; the
    fields of `planning.roofline.OnDevice`; parts and parts_seconds of the sweep in independent
    parts. Activations, peak, what is received and all after it are estimates, the others are exact.

    Raises ValueError or FileNotFoundError for a mistake in the config, a device or a mesh.
    """
    import pandas as pd

    from lorax.planning import costs, shapes, spread

    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    check_devices(devices)
    counts = check_mesh(devices, mesh, hosts)
    if settings.sequence:
        raise ValueError(ONE_TASK)
    rows = []
    every = shapes.with_steps(search.members(settings))
    race = halving.race(settings, every)
    for index, members in enumerate(config.grouped(every)):
        c = members[0].config
        group = {"group": index, "method": c.method.name, "base": c.base, "members": len(members)}
        if not counts:
            shared = costs.plan(members, devices, race)
        for name in devices:
            count = counts.get(name, 1)
            p = spread.plan(members, name, count, mesh, race) if counts else shared
            rows.append(group | _columns(p, name, count))
    return pd.DataFrame(rows)


def _columns(p, name: str, devices: int) -> dict:
    """The columns of `plan_config` for a plan of a group on so many devices."""
    from lorax.planning import roofline
    from lorax.train import mesh_costs

    on, parts = roofline.on_device(p, name), roofline.in_parts(p, name, devices)
    received = mesh_costs.traffic(p.load, p.spread.shape)._asdict()
    row = {"steps": p.steps[1], "parameters": p.parameters, "trainable_params": max(p.trainable)}
    row |= {"device": name, "mesh": str(p.spread.shape), "mode": p.spread.mode, "devices": devices}
    row |= {"weights": p.weights, "adapters": p.adapters, "optimizer": p.optimizer}
    row |= {"gradients": p.gradients, "activations": int(p.activations(p.at(1)))}
    row |= {"gathered": p.gathered, "peak": p.peak(p.each, p.at(p.width))}
    row |= {f"{what}_received": round(size) for what, size in received.items()}
    return row | on._asdict() | {"parts": parts.parts, "parts_seconds": parts.seconds}


make_callable(__name__, plan_config)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
