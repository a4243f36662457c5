"""What a worker does: trains the members of a part as the one machine would train them.

Groups are padded and compiled as if all their members were here, and the devices are as many as
that machine has, so that every member is computed by the same program of the same shape. What is
cut is only how often the program's loop over members runs.
"""

import contextlib
import json
import os
from pathlib import Path

import jax

from lorax import command_line, halving, memory, rundir, xla
from lorax.launching import parts
from lorax.launching.machines import Machine
from lorax.train import loop, prepare, stacks


def train(directory: Path, part: parts.Part) -> None:
    """Train a part, and write its members.jsonl and status.json. See `worker.run`."""
    run = parts.run_of(directory)
    common = parts.read_round(run, part.round)
    if common is None:
        raise FileNotFoundError(f"{run}: no file of round {part.round}; start the launcher again")
    memory.check()
    machine = Machine(**part.layout)
    _take_devices(machine)
    xla.keep_compiled()
    with contextlib.chdir(common.folder):  # paths in the config are from there
        settings = _settings(run, common)
        members = {n: parts.members_of(settings, lines) for n, lines in common.groups.items()}
        race = halving.race(settings, [m for group in members.values() for m in group])
        mine, loaded = set(part.members), prepare.Loaded({}, {})
        say = lambda line: print(line, flush=True)
        groups = [
            prepare.group_of(number, group, loaded, say)
            for number, group in members.items()
            if mine & {member.index for member in group}
        ]
        groups = [group._replace(stack=stacks.pick(group.stack, mine)) for group in groups]
        for group in groups:
            _check_base(group, common)
        lines = [line for group in groups for line in prepare.describe(group)]
        rundir.write_members(directory, [line for line in lines if line["member"] in mine])
        seconds = rundir.read_status(directory).get("wall_seconds", 0.0)
        rundir.write_status(directory, "running", {}, seconds, {})
        terminal = loop.Terminal(say, lambda done, total: None, lambda row: None)
        results, _ = loop.train(directory, groups, terminal, race=race, devices=machine.devices)
        rundir.write_status(directory, "finished", results, seconds, {})


def _take_devices(machine: Machine) -> None:
    """Make as many devices of a CPU as the one machine has. Raises ValueError for other devices
    than the part was made for."""
    if machine.platform == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has already started: its devices stay
            jax.config.update("jax_num_cpu_devices", machine.devices)
    here = jax.local_devices()
    if (here[0].platform, len(here)) != (machine.platform, machine.each):
        raise ValueError(
            f"this worker has {len(here)} {here[0].platform} devices, and the run was split for "
            f"workers with {machine.each} {machine.platform} devices; give its workers those"
        )


def _settings(run: Path, common: parts.Round):
    """The config of the run, from the command line that launched it. Raises ValueError if it is not
    that of config.json: its script has changed."""
    settings = command_line.read(["lorax.launch", *common.flags])[0]
    if json.loads(settings.to_json()) != rundir.read_config(run)["config"]:
        raise ValueError(
            f"config: {' '.join(common.flags)} gives another config than {run / rundir.CONFIG}; "
            "undo what was changed in the script, or start the launcher again"
        )
    return settings


def _check_base(group: prepare.Group, common: parts.Round) -> None:
    if group.base.sha256 != common.bases[group.index]:
        raise ValueError(
            f"base: the weights of {group.base.name} on this machine differ from those of the "
            "launcher; give all machines the same"
        )
