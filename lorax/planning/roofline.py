"""A group on devices: members that fit, and the least time of a step and of the sweep."""

import math
from typing import NamedTuple

import jax

from lorax import config
from lorax.devices import DEVICES, SHARE
from lorax.planning.costs import Cost, Plan
from lorax.train import fitting, mesh_costs


class OnDevice(NamedTuple):
    """A group on devices of one kind. memory: bytes that a program may take on each.
    fit_side_by_side, fit_one_at_a_time: members, on all devices together. compute_seconds,
    moving_seconds, communication_seconds: of a step of all members, by a roofline. step_seconds: of
    such a step, at least, if communication overlaps with the rest; apart_seconds: if it doesn't.
    sweep_seconds: of all steps and evaluations, at least."""

    memory: float
    fit_side_by_side: int
    fit_one_at_a_time: int
    compute_seconds: float
    moving_seconds: float
    communication_seconds: float
    step_seconds: float
    apart_seconds: float
    sweep_seconds: float


def on_device(p: Plan, name: str) -> OnDevice:
    """What fits on the devices of a plan, and the least time that its steps take there."""
    memory, shape = memory_of(name), p.spread.shape
    cost, extra = None, 0
    if name == "cpu" and p.cpu is not None:
        cost = p.cpu
        extra = cost.temporaries - p.at(cost.width).temporaries
    most = [shape.member * p.most(memory - extra, side_by_side) for side_by_side in (True, False)]
    cost = cost or p.at(max(1, min(p.width, most[0] // shape.member)))
    time = step_seconds(p, name, cost, p.members)
    return OnDevice(
        memory, *most, *time, time.overlapped, time.apart, sweep_seconds(p, name, cost, p.members)
    )


def step_seconds(p: Plan, name: str, cost: Cost, members: int) -> mesh_costs.Seconds:
    """A roofline of a step of so many members. cost: of those that run side by side on a device."""
    device, shape = DEVICES[name], p.spread.shape
    load = p.load._replace(members=members, width=cost.width)
    turns = math.ceil(members / shape.member) / cost.width
    compute = turns * (cost.half / device.half + cost.full / device.full)
    time = mesh_costs.seconds(load, shape, device)
    divided = shape.fsdp * shape.tensor > 1  # then weights are read as often as on one device
    moving = max(turns * cost.moved / device.bandwidth, time.memory * divided)
    return mesh_costs.Seconds(compute, moving, time.communication)


def sweep_seconds(p: Plan, name: str, cost: Cost, members: int) -> float:
    """Seconds of all steps of so many of a group's members and of their evaluations, at least:
    without starting, compiling, loading and writing."""
    saved = p.steps[1] / (p.members * p.steps[0])  # by halving
    steps = p.steps[0] * saved * step_seconds(p, name, cost, members).overlapped
    train = p.load.train.copy_and_resolve_references()
    train.update(batch_size=p.eval_batch, accumulate=1)
    evaluated = sum(x or 0 for x in p.evaluated) / p.eval_batch
    load = p.load._replace(train=train, members=members, width=cost.width, backward=False)
    return steps + evaluated * mesh_costs.seconds(load, p.spread.shape, DEVICES[name]).overlapped


class InParts(NamedTuple):
    """A group split over machines that do not talk. parts: their number. devices: of each. mesh: of
    each. seconds: of the longest, at least."""

    parts: int
    devices: int
    mesh: str
    seconds: float


def in_parts(p: Plan, name: str, devices: int) -> InParts:
    """The group in as many parts as so many devices have room for, each on the fewest hosts that
    hold a divided base, and on all devices of a host if there are members for them."""
    device, shape = DEVICES[name], p.spread.shape
    alone = shape.fsdp * shape.tensor if p.spread.mode == "mesh" else 1
    each = math.ceil(alone / device.per_host) * device.per_host
    parts = max(1, min(p.members, devices // each))
    members = math.ceil(p.members / parts)
    member = max(1, min(members, each // alone))
    part = shape._replace(member=member)
    if alone == 1:
        part = part._replace(fsdp=1)
    split = p._replace(spread=p.spread._replace(shape=part))
    cost = p.at(max(1, min(p.width, math.ceil(members / member))))
    if p.spread.mode == "batch":  # whose costs are those of a part of the rows
        cost = Cost(cost.width, *(shape.fsdp * x for x in cost[1:]))
    return InParts(parts, part.size, str(part), sweep_seconds(split, name, cost, members))


def memory_of(name: str) -> float:
    """Bytes that a program may use on a device; on a CPU, 80% of the free memory."""
    if name != "cpu":
        return SHARE * DEVICES[name].memory
    default = config.default().train
    return fitting.memory_limit(default, jax.local_devices(backend="cpu")[:1]).bytes
