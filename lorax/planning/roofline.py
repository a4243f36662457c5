"""A group on a device: members that fit, and the least time of a step by a roofline."""

from typing import NamedTuple

import jax

from lorax import config
from lorax.devices import DEVICES, SHARE
from lorax.planning.costs import Plan
from lorax.train import fitting


class OnDevice(NamedTuple):
    """A group on a device. memory: bytes that a program may take. fit_side_by_side,
    fit_one_at_a_time: members. compute_seconds, moving_seconds: of a step of all members, by a
    roofline."""

    memory: float
    fit_side_by_side: int
    fit_one_at_a_time: int
    compute_seconds: float
    moving_seconds: float


def on_device(p: Plan, name: str) -> OnDevice:
    """What fits on a device, and the least time that a step of all members takes there."""
    device, memory, cost, extra = DEVICES[name], memory_of(name), None, 0
    if name == "cpu" and p.cpu is not None:
        cost = p.cpu
        extra = cost.temporaries - p.at(cost.width).temporaries
    most = [p.most(memory - extra, side_by_side) for side_by_side in (True, False)]
    cost = cost or p.at(max(1, min(p.width, most[0])))
    turns = p.members / cost.width
    compute = turns * (cost.half / device.half + cost.full / device.full)
    return OnDevice(memory, *most, compute, turns * cost.moved / device.bandwidth)


def memory_of(name: str) -> float:
    """Bytes that a program may use on a device; on a CPU, 80% of the free memory."""
    if name != "cpu":
        return SHARE * DEVICES[name].memory
    default = config.default().train
    return fitting.memory_limit(default, jax.local_devices(backend="cpu")[:1]).bytes
