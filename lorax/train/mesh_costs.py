"""What a step costs on a mesh, from shapes alone, and which meshes are the fastest.

What one device receives in a step, and sends as much, with f devices along "fsdp" and t along
"tensor":

    weights       S (f - 1)/f of a weight of S bytes that fsdp divides: forward, backward, and with
                  remat forward again, but for down, whose outputs nothing reads then; of a head
                  only once, because the loss makes its gradients at once
    gradients     2 S (f - 1)/f of the S bytes that a member trains: all-reduced in a ring
    activations   2 S (t - 1)/t of the outputs of a kernel whose inputs tensor divides (o, down),
                  forward, and of the inputs' gradient of each kernel whose outputs tensor divides,
                  backward; S (f - 1)/f of what an embedding looks up

Rings as in Thakur et al. 2005, "Optimization of collective communication operations in MPICH".
Time is a roofline: the longest of computing, reading memory and communicating, which assumes that
they overlap; `Seconds.apart` assumes that communication does not.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from lorax import ops, sharding, tree
from lorax.devices import Device
from lorax.meshes import Shape
from lorax.models import Base

#: Fields of a config that hold the number of heads of keys and values, the first one that is set.
_HEADS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head")


class Load(NamedTuple):
    """What a step of a group computes. train: the config's section. tokens: of a row. halved:
    whether products are those of bfloat16. members: in one program. width: how many side by side,
    at most. trained: bytes of a member's adapters. state: bytes of a member's adapters, constants
    and optimiser. activation: bytes of a number between layers. copied: whether each device has all
    of the base, so that fsdp divides rows alone. backward: False for an evaluation."""

    base: Base
    train: object
    tokens: int
    halved: bool
    members: int
    width: int
    trained: int
    state: int
    activation: int
    copied: bool = False
    backward: bool = True

    def each(self, shape: Shape) -> int:
        """Members on each device."""
        return math.ceil(self.members / shape.member)

    def turns(self, shape: Shape) -> int:
        """How often each device reads the base for a step of its members."""
        each = self.each(shape)
        return math.ceil(each / min(self.width, each)) * self.train.accumulate

    def tokens_on(self, shape: Shape) -> float:
        """Tokens that each device computes in a step."""
        rows = self.train.batch_size / (shape.fsdp if self.part % shape.fsdp == 0 else 1)
        return self.each(shape) * rows * self.tokens

    @property
    def part(self) -> int:
        """Rows that a device with all of a batch's part computes together."""
        return self.train.batch_size // self.train.accumulate

    def weights(self, shape: Shape) -> list["Weight"]:
        """The arrays of the base as the mesh divides them."""
        return weights(self.base, Shape() if self.copied else shape)


class Traffic(NamedTuple):
    """Bytes that a device receives in a step: of gathered weights, gradients, activations."""

    weights: float
    gradients: float
    activations: float


class Seconds(NamedTuple):
    """A step of all members, at least: computing, reading memory, communicating."""

    compute: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def apart(self) -> float:
        """As `overlapped` if nothing is computed while devices communicate."""
        return max(self.compute, self.memory) + self.communication


class Weight(NamedTuple):
    """An array of a base, or a quantised kernel, on a mesh. stored: bytes of all of it. split:
    devices that each hold another part. axes: of the mesh, that divide it. site: None if no product
    reads it. layers: how many it holds. n_in, n_out: of one of them."""

    path: str
    stored: int
    split: int
    axes: frozenset[str]
    site: ops.Site | None
    layers: int
    n_in: int
    n_out: int


def weights(base: Base, shape: Shape) -> list[Weight]:
    """The arrays of a base on a mesh, the codes and scales of a quantised kernel together."""
    flat = tree.flatten(base.params)
    specs = tree.flatten(sharding.specs(base.params, base.sites, shape))
    found = []
    for path, leaf in flat.items():
        site, arrays = base.sites.get(path), jax.tree.leaves(leaf)
        largest = max(range(len(arrays)), key=lambda i: _bytes(arrays[i]))
        axes = _axes(_specs(specs[path])[largest], shape)
        split = math.prod(getattr(shape, axis) for axis in axes)
        lead, n_in, n_out = site.matrix_shape(leaf.shape) if site else ((), 0, 0)
        stored = sum(map(_bytes, arrays))
        found.append(Weight(path, stored, split, axes, site, math.prod(lead), n_in, n_out))
    return found


def nbytes(base: Base, shape: Shape) -> int:
    """Bytes of a base on each device, exact."""
    specs = _specs(sharding.specs(base.params, base.sites, shape))
    parts = [math.prod(getattr(shape, axis) for axis in _axes(spec, shape)) for spec in specs]
    arrays = jax.tree.leaves(base.params)
    return sum(_bytes(x) // part for x, part in zip(arrays, parts, strict=True))


def gathered(base: Base, shape: Shape) -> int:
    """Bytes of the weights of one layer, as they are stored, that a device has while it computes
    that layer: of the largest one, an embedding or a head included. 0 if fsdp divides nothing."""
    sizes = {}
    for w in weights(base, shape):
        if "fsdp" in w.axes:
            layer = w.path.split("/")[0] if w.layers > 1 else w.path
            one = w.stored / w.layers / (w.split // shape.fsdp)
            sizes[layer] = sizes.get(layer, 0) + one
    return math.ceil(max(sizes.values(), default=0))


def traffic(load: Load, shape: Shape) -> Traffic:
    """What each device receives in a step."""
    f, t = shape.fsdp, shape.tensor
    gather = reduced = looked_up = 0.0
    for w in load.weights(shape):
        if "fsdp" in w.axes:
            gather += _gathers(load, w) * w.stored / (w.split // f) * (f - 1) / f
            looked_up += w.n_out * (w.site is not None and w.site.kind == "embed")
        if "tensor" in w.axes and w.site is not None:
            reduced += _reduced(load, w)
    gradients = load.trained * load.each(shape) * load.train.accumulate
    gradients *= load.backward
    return Traffic(
        gather * load.turns(shape),
        2 * (f - 1) / f * gradients,
        (2 * (t - 1) / t * reduced + (f - 1) / f * looked_up)
        * load.tokens_on(shape)
        * load.activation,
    )


def _forward(load: Load, w: Weight) -> int:
    """How often the products of a layer with a weight are computed for a part of a batch. With
    remat twice, but for the last, which nothing reads the second time."""
    again = load.backward and load.train.remat != "none" and w.layers > 1
    return 1 + (again and "down" not in w.path)


def _gathers(load: Load, w: Weight) -> int:
    """How often a weight is gathered for a part of a batch."""
    if _is_head(load.base, w):
        return 1
    if w.site is not None and w.site.kind == "embed":
        return 0
    return _forward(load, w) + load.backward


def _reduced(load: Load, w: Weight) -> int:
    """Numbers of each token that devices along "tensor" add because this weight is divided."""
    head, looked_up = _is_head(load.base, w), w.site.kind == "embed"
    if head or looked_up:
        width = w.n_out if looked_up else w.n_in
        return width * (looked_up + head * load.backward)
    if w.path not in sharding.after(load.base.sites):
        return w.layers * w.n_in * load.backward
    return w.layers * w.n_out * _forward(load, w)


def _is_head(base: Base, w: Weight) -> bool:
    """Whether logits are products with this weight: of the tied names, the last that there is."""
    names = [name for name in base.traits.head if name in base.params]
    return bool(names) and w.site is not None and w.path.split("/")[0] == names[-1]


def seconds(load: Load, shape: Shape, device: Device) -> Seconds:
    """A roofline of a step of all members: matrix products, weights read, and `traffic`."""
    tokens, flops, read = load.tokens_on(shape), 0.0, 0.0
    for w in load.weights(shape):
        if w.site is None or (w.site.kind == "embed" and not _is_head(load.base, w)):
            continue
        passes = _forward(load, w) + load.backward
        parts = shape.tensor if "tensor" in w.axes else 1
        flops += 2 * passes * _used(load.base, w) * w.layers * w.n_in * w.n_out / parts * tokens
        read += passes * w.stored / (w.split // shape.fsdp if "fsdp" in w.axes else w.split)
    moved = traffic(load, shape)
    fsdp = bandwidth(device, shape.tensor, shape.fsdp)
    communication = (moved.weights + moved.gradients) / fsdp
    communication += moved.activations / bandwidth(device, 1, shape.tensor)
    rate = device.half if load.halved else device.full
    return Seconds(flops / rate, read * load.turns(shape) / device.bandwidth, communication)


def _used(base: Base, w: Weight) -> float:
    """The share of its layers that a token passes: of the experts, those that it takes."""
    if w.site.kind != "experts":
        return 1.0
    return base.config.num_experts_per_tok / base.config.num_experts


def bandwidth(device: Device, inner: int, size: int) -> float:
    """Bytes/s of a ring of `size` devices, `inner` apart. Where it leaves the links of a host, each
    of its devices there sends an equal part over its own network card."""
    if inner * size <= device.linked:
        return device.link
    return min(device.link, max(1, device.linked // inner) * device.network)


def estimate(load: Load, shape: Shape) -> float:
    """About how many bytes a program needs on each device, one member at a time: the base, all
    members' state, a gathered layer, and what the backward pass keeps of each layer: the outputs of
    its kernels, or with `train.remat` "full" its input alone."""
    widths, inside = {}, {}
    for w in load.weights(shape):
        layer = w.path.split("/")[0]
        if w.site is not None and w.layers > 1:
            parts = shape.tensor if "tensor" in w.axes else 1
            inside[layer] = inside.get(layer, 0) + w.n_out * _used(load.base, w) / parts
            widths[layer] = w.layers, min(w.n_in, widths.get(layer, (0, w.n_in))[1])
    kept = sum(
        layers * (width if load.train.remat == "full" else inside[layer])
        for layer, (layers, width) in widths.items()
    )
    one = load._replace(members=1).tokens_on(shape) / load.train.accumulate
    working = one * load.activation * (kept + 2 * max(inside.values(), default=0))
    each = load.each(shape) * load.state
    shape = Shape() if load.copied else shape
    return nbytes(load.base, shape) + gathered(load.base, shape) + each + working


def shapes(load: Load, devices: int) -> list[Shape]:
    """The meshes of so many devices that divide a part of a batch and the heads of attention; of
    fewer devices where there are not enough members for all."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    heads = next((n for name in _HEADS if (n := getattr(load.base.config, name, None))), 1)
    pairs = [(f, t) for f in divisors for t in divisors if devices % (f * t) == 0]
    return [
        Shape(min(load.members, devices // (f * t)), f, t)
        for f, t in pairs
        if load.part % f == 0 and heads % t == 0
    ]


def ranked(load: Load, devices: int, device: Device) -> list[Shape]:
    """The meshes of so many devices whose tensor stays within fast links, the fastest first by
    `Seconds.overlapped`; of equally fast ones that with the smallest tensor and fsdp."""

    def order(shape):
        return float(f"{seconds(load, shape, device).overlapped:.3g}"), shape.tensor, shape.fsdp

    near = [shape for shape in shapes(load, devices) if shape.tensor <= device.linked]
    return sorted(near, key=order)


def choose(load: Load, devices: int, device: Device, fits: Callable) -> Shape | None:
    """The fastest mesh (see `ranked`) that fits, None if none does. fits(shape) -> bool."""
    return next(filter(fits, ranked(load, devices, device)), None)


def wider(load: Load, devices: int, device: Device, shape: Shape, all_: bool) -> Shape | None:
    """The fastest mesh that divides a base into more parts than `shape`, None if there is none.
    all_: use every device."""
    parts = shape.fsdp * shape.tensor
    more = lambda other: other.fsdp * other.tensor > parts
    used = lambda other: other.size == devices or not all_
    return choose(load, devices, device, lambda other: more(other) and used(other))


def divide(
    load: Load, devices: int, device: Device, limit: float, all_: bool = False
) -> Shape | None:
    """The mesh to divide a base over so that it and one member need at most `limit` bytes on each
    device, by `estimate`: the fastest (see `ranked`), and where none fits the one that needs least.
    None if a device has room for all of the base. all_: use every device."""
    needs = lambda shape: estimate(load._replace(members=1), shape)
    if devices == 1 or needs(Shape()) <= limit:
        return None
    full = [s for s in ranked(load, devices, device) if s.size == devices or not all_]
    return next((s for s in full if needs(s) <= limit), min(full, key=needs, default=None))


def _bytes(x) -> int:
    return x.size * x.dtype.itemsize


def _specs(specs) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _axes(spec: PartitionSpec, shape: Shape) -> frozenset[str]:
    """The axes of the mesh that a spec names and that have several devices."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    named = {axis for part in parts for axis in part if axis is not None}
    return frozenset(axis for axis in named if getattr(shape, axis) > 1)
