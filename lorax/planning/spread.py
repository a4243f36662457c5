"""Plans of a group on the devices of one or several hosts: a mesh that is named, or the one that a
run would choose."""

from lorax.devices import DEVICES
from lorax.halving import Race
from lorax.meshes import parse
from lorax.planning import costs
from lorax.planning.compiled import Spread
from lorax.planning.costs import Plan
from lorax.planning.roofline import memory_of
from lorax.planning.shapes import shapes
from lorax.train import fitting, layouts, mesh_costs


def plan(members, name: str, devices: int, mesh: str | None, race: Race | None = None) -> Plan:
    """The plan of a group on so many devices, with the mesh that is named, or with "auto" or None
    the one that a run takes (`layouts.layout`, `mesh_costs.divide`): the base copied to every
    device if it fits with one member, else the fastest mesh that fits by the compiled program.

    Raises ValueError for a mesh that does not divide a batch, and as `costs.plan`.
    """
    c, n = members[0].config, len(members)
    described = shapes(members)
    make = lambda spread: costs.plan(members, (name,), race, spread, described)
    part = c.train.batch_size // c.train.accumulate
    mesh = mesh or c.train.mesh
    if devices == 1 and mesh == "auto":
        return make(Spread())
    if mesh != "auto":
        shape = parse(mesh)
        if part % shape.fsdp:
            raise ValueError(
                f"--mesh: fsdp={shape.fsdp} does not divide the {part} rows that are computed "
                "together (train.batch_size / train.accumulate)"
            )
        return make(Spread("mesh" if shape.fsdp * shape.tensor > 1 else "members", shape))
    device, memory, load = DEVICES[name], memory_of(name), fitting.load_of(c, described[0], n)
    many = devices > device.per_host
    shape = mesh_costs.divide(load, devices, device, memory, many)
    while shape is not None:
        p = make(Spread("mesh", shape))
        wider = mesh_costs.wider(load, devices, device, shape, many)
        if p.peak(1, p.at(1)) <= memory or wider is None:
            return p
        shape = wider
    return make(Spread(*layouts.copied(c.train.parallel, n, part, devices, many)))
