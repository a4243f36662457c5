"""Estimates the cost of a config before running it: parameters, bytes, FLOPs, time, members that
fit.

    python -m lorax.plan --config=configs/gpt2_rank_sweep.py
    python -m lorax.plan --config=configs/gpt2_rank_sweep.py --config.base=random:gpt3-175b \\
        --config.param_dtype=bfloat16 --config.dtype=bfloat16 --config.train.remat=full
    python -m lorax.plan --config=FILE --device=h200,cpu
    python -m lorax.plan --table --markdown

Nothing is allocated: shapes come from `jax.eval_shape`, and the training step is compiled, for one
member and for a group's members side by side, to see which buffers it needs. Of a base only
config.json is read; "random:NAME" is an architecture of lorax/models/shapes.py. Only `train.epochs`
makes a plan read the task's rows, to count them.

Numbers that follow from shapes are exact. Estimated are: temporaries, including activations, as XLA
allocates them for a CPU (without converting bfloat16 weights to float32 first, which it does only
there); FLOPs, those of matrix products; bytes moved, what these products and the optimiser read and
write. Rows are assumed to be `train.seq_len` long. Time is a roofline, a lower bound.

--table instead compares well-known models: trainable parameters by rank, and full fine-tuning
with LoRA and QLoRA. --markdown prints tables as Markdown.
"""

import sys
from collections.abc import Iterable

from absl import flags
from ml_collections import ConfigDict

from lorax import __version__, command_line, config, halving, memory, search
from lorax.callable import make_callable
from lorax.command_line import FLAGS
from lorax.devices import DEVICES, check_devices
from lorax.errors import fail

flags.DEFINE_string(
    "device", "h200,a100,tpu-v5p,cpu", "Devices to plan for, by name.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "table", False, "Compare well-known models; needs no --config.", flag_values=FLAGS
)
flags.DEFINE_bool("markdown", False, "Print tables as Markdown.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """The command line. Exit code 0, or 2 for a mistake in the input."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(__doc__)
        for name in ("config", "device", "table", "markdown"):
            print(f"  --{name:9s} {FLAGS[name].help}")
        print(f"  devices: {', '.join(DEVICES)}")
        return 0
    try:
        if any(argument.lstrip("-") in ("table", "table=true") for argument in argv[1:]):
            FLAGS(argv)
            print(f"lorax {__version__}: well-known models, from their shapes", flush=True)
            show_comparison()
            return 0
        settings, members, _ = command_line.read(argv)
        devices = FLAGS.device.split(",")
        check_devices(devices)
        print(f"lorax {__version__}: {command_line.summary(settings, members)}", flush=True)
        memory.check()
        show_plans(settings, members, devices)
    except Exception as error:  # a config script may raise anything: print one line
        return fail(error)
    return 0


def show_plans(settings: ConfigDict, members, devices: list[str]) -> None:
    """Print the plan of every group."""
    from lorax.planning import costs, shapes, tables  # imports JAX; memory may not suffice for it

    members = shapes.with_steps(members, print)
    race = halving.race(settings, members)
    if race and any(member.config.train.epochs for member in members):
        print(halving.budget(race))
    for index, group in enumerate(config.grouped(members)):
        plan = costs.plan(group, devices, race)
        tables.show(tables.describe(index, plan, devices), FLAGS.markdown)


def show_comparison() -> None:
    """Print the tables of well-known models."""
    from lorax.planning import field, tables

    tables.show(field.tables(), FLAGS.markdown)


def plan_config(settings: ConfigDict, devices: str | Iterable[str] = ("cpu",)):
    """The cost of a config: a pandas DataFrame with a row per group of members and device.

    Columns: group, method, base, members, steps (of all members together, with what
    `config.sweep.tune` saves if nothing diverges), parameters (of the base), trainable_params (of
    the largest member); in bytes: weights (shared), adapters, optimizer, gradients and activations
    of one member and peak of all members side by side; then device and the fields of
    `planning.roofline.OnDevice`. Activations, peak and the fields of a device are estimates, the
    others are exact.

    Raises ValueError or FileNotFoundError for a mistake in the config or a device.
    """
    import pandas as pd

    from lorax.planning import costs, roofline, shapes

    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    check_devices(devices)
    rows = []
    every = shapes.with_steps(search.members(settings))
    race = halving.race(settings, every)
    for index, members in enumerate(config.grouped(every)):
        p, c = costs.plan(members, devices, race), members[0].config
        group = {"group": index, "method": c.method.name, "base": c.base, "members": p.members}
        group |= {"steps": p.steps[1]}
        group |= {"parameters": p.parameters, "trainable_params": max(p.trainable)}
        group |= {"weights": p.weights, "adapters": p.adapters, "optimizer": p.optimizer}
        group |= {"gradients": p.gradients, "peak": p.peak(p.members, p.at(p.width))}
        group |= {"activations": int(p.activations(p.at(1)))}
        on = lambda name, p=p: roofline.on_device(p, name)._asdict()
        rows += [group | {"device": name} | on(name) for name in devices]
    return pd.DataFrame(rows)


make_callable(__name__, plan_config)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
