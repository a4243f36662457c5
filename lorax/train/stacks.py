"""Stacks members of one shape: every array gets a leading axis M.

Members are padded to the largest width (a rank, or the dimension of a subspace), and each has
arrays for every matrix that any of them adapts. A group's members are stacked as shapes
(`described`); a part of them is drawn when it trains (`stack`), as together they may be large.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import catalogue, methods, ops, tasks, tree
from lorax.config import Member, seed_of
from lorax.methods import Method
from lorax.models import Base
from lorax.train import evidence
from lorax.train import step as train_step


class Stack(NamedTuple):
    """Members of one shape, each leaf with a leading member axis M.

    methods: one per member. constants, hyper: not trained. state: `MemberState` at step 0. The
    leaves of these three are arrays, or `jax.ShapeDtypeStruct` of members that are not drawn.
    """

    members: tuple[Member, ...]
    methods: tuple[Method, ...]
    constants: dict
    hyper: train_step.Hyper
    state: train_step.MemberState

    @property
    def config(self):
        """The config of the first member; the others differ only in values passed as data."""
        return self.members[0].config

    @property
    def one(self) -> tuple:
        """The shapes of (constants, hyper, state) of one member."""
        without = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return jax.tree.map(without, tuple(self[2:]))


def hyperparameters(member, base: Base) -> dict:
    """{name: value} of the hyperparameters of the member's method, from its config.

    In a sweep over methods, a key applies to the methods that have it; None means the method's own
    default.
    """
    hp = member.config.method.to_dict()
    if base.fresh:  # a randomly initialised head must be trained
        hp["full"] = tuple(dict.fromkeys((*hp["full"], "classifier")))
    return methods.given(hp["name"], hp)


def build_methods(members, base: Base, decided: dict | None = None) -> list[Method]:
    """Each member's method, with targets, layers and rank checked against the base.

    decided: {member index: hyperparameters} where evidence chose them (`lorax.train.evidence`).
    Raises ValueError for what does not fit.
    """
    built = []
    for member in members:
        hp = (decided or {}).get(member.index) or hyperparameters(member, base)
        method = methods.method(member.config.method.name, **hp)
        method.count(base.params, base.sites)  # raises on what does not fit
        built.append(method)
    return built


class Padding(NamedTuple):
    """targets: {path: Site} of the matrices that any member of a program adapts. width: the largest
    one. None if the method doesn't use it."""

    targets: dict | None
    width: int | None


def padding(built: list[Method], base: Base) -> Padding:
    """The padding for members with these methods."""
    targets, width = None, None
    if built[0].adapts is not None:
        any_of_them = {path for m in built for path in m.adapts(base.params, base.sites)}
        targets = {path: site for path, site in base.sites.items() if path in any_of_them}
    if built[0].width is not None:
        width = max(method.width for method in built)
    return Padding(targets, width)


def start(member, method: Method, base: Base, pad: Padding, task=None, seen=None) -> tuple:
    """(constants, hyper, state) of one member at step 0, for a `Stack`. Can be traced.
    task, seen: as for `stack`."""
    # Two streams, so that start and dropout are independent where their seeds are the same.
    init_key, _ = jax.random.split(jax.random.key(seed_of(member.config, "start")))
    _, dropout_key = jax.random.split(jax.random.key(seed_of(member.config, "order")))
    read = None
    if method.needs is not None and task is not None:
        seen, matrices = {} if seen is None else seen, method.adapts(base.params, base.sites)
        read = evidence.read(member, base, task, matrices, method.needs, seen)
    trainable, constants = method.init(init_key, base.params, base.sites, *pad, read)
    train = member.config.train
    hyper = train_step.Hyper(jnp.float32(train.lr), jnp.float32(train.weight_decay), dropout_key)
    state = train_step.start(method, trainable, constants, train, hyper, base.sites)
    return constants, hyper, state


def stack(
    members,
    built: list[Method],
    base: Base,
    pad: Padding | None = None,
    task: tasks.Task | None = None,
) -> Stack:
    """Initialise every member, padded to the largest width (rank, or dimension of a subspace) and
    the union of the targets, and stack them. pad: of a group that has more members than these.

    In LoRA and similar methods, zero rows of b with zero columns of a have zero gradients, so
    padding stays exactly zero under AdamW and weight decay. The same holds for a matrix that a
    member does not adapt. task: needed only for initialisations that read training batches
    (`lorax.train.evidence`).
    """
    pad, seen = pad or padding(built, base), {}
    pairs = zip(members, built, strict=True)
    started = [start(member, method, base, pad, task, seen) for member, method in pairs]
    together = lambda *leaves: jnp.stack(leaves)
    return Stack(tuple(members), tuple(built), *jax.tree.map(together, *started))


def described(members, built: list[Method], one: tuple) -> Stack:
    """The stack of members that are not drawn. one: (constants, hyper, state) of any of them, which
    may be shapes: all have the same."""
    many = lambda x: jax.ShapeDtypeStruct((len(members), *x.shape), x.dtype)
    return Stack(tuple(members), tuple(built), *jax.tree.map(many, one))


def rehearse(
    members, built: list[Method], base: Base, pad: Padding, task: tasks.Task, seen: dict
) -> tuple:
    """The shapes of (constants, hyper, state) of one member. For every setting of the method one
    member is drawn and dropped again, so that what can't be drawn raises before training. task,
    seen: as for `evidence.read`."""
    settings = {}
    for member, method in zip(members, built, strict=True):
        settings.setdefault(str(method.hp), (member, method))
    started = [
        tree.shapes(start(member, method, base, pad, task, seen))
        for member, method in settings.values()
    ]
    if isinstance(catalogue.row(built[0].name).where, Callable):
        check_alike([method for _, method in settings.values()], base, started)
    return started[0]


def made_whole(stacked: Stack, base: Base) -> str:
    """A line about kernels whose operator leaves the module can't compute with, so that each call
    makes them plain arrays; "" if there are none. Arrays may be shapes."""
    method, flat = stacked.methods[0], tree.flatten(base.params)

    def bound(states, params):
        member = jax.tree.map(lambda x: x[0], states)
        return method.bind(*member, params, sites=base.sites)

    if not base.traits.whole:
        return ""
    states = stacked.state.trainable, stacked.constants
    leaves = tree.flatten(jax.eval_shape(bound, states, base.params))
    paths = [path for path in base.traits.whole if ops.is_operator(leaves[path])]
    weights = [ops.frozen(flat[path]) for path in paths]
    size = sum(x.size * x.dtype.itemsize for x in map(_as_shape, weights))
    named = ", ".join(path.rpartition("/")[0] for path in paths[:4]) + " ..." * (len(paths) > 4)
    size = f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
    line = f"each member's step makes {len(paths)} kernels plain arrays, {size} in all"
    return f"{line}, because the module does more than multiply by them: {named}" * bool(paths)


def _as_shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def check_alike(built: list[Method], base: Base, started: list[tuple]) -> None:
    """Raises ValueError if members can't share a program although their method's `varies` says so:
    their trees have different shapes, or their functions differ. started: `start` of each, as
    shapes. Only users' methods are checked; lorax's own are tested."""
    seen = {}  # how members differ from the first -> (shapes, computation)
    for method, (constants, _, state) in zip(built, started, strict=True):
        different = {k: value for k, value in method.hp.items() if value != built[0].hp.get(k)}
        if str(different) in seen:
            continue
        trees = state.trainable, constants
        named = tree.flatten(dict(zip(("trainable", "constants"), trees, strict=True)))
        shapes = {path: tuple(x.shape) for path, x in named.items()}
        first, computed = next(iter(seen.values()), (shapes, None))
        problem = (
            f"method {method.name!r}: members that differ in {', '.join(different)} can't share a "
        )
        problem += "program, though it varies"
        for path in sorted(shapes.keys() | first.keys()):
            if shapes.get(path) != first.get(path):
                raise ValueError(
                    f"{problem}: {path} is {first.get(path)} and {shapes.get(path)}; `init` has to "
                    "pad to the width and have arrays for all targets that it is given"
                )
        bind = lambda *trees, m=method: m.bind(*trees, sites=base.sites)
        penalty = lambda *trees, m=method: m.penalty and m.penalty(*trees[:2])
        delta = lambda *trees, m=method: m.delta and m.delta(*trees, base.sites)
        computation = "".join(_computation(f, *trees, base.params) for f in (bind, penalty, delta))
        if computed not in (None, computation):
            raise ValueError(
                f"{problem}: `bind`, `penalty` or `delta` takes them from elsewhere than the "
                "trees; put them into the constants, or leave them out of `varies`"
            )
        seen[str(different)] = shapes, computation


def _computation(f, *trees) -> str:
    """A text that describes the computation of f, its constants and static fields: the same text
    for the same computation."""
    traced, shape = jax.make_jaxpr(f, return_shape=True)(*trees)
    text = f"{traced.jaxpr} {[*map(str, traced.consts)]} {jax.tree.structure(shape)}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def pick(stacked: Stack, chosen: set[int]) -> Stack:
    """The chosen members of a stack that is not drawn, by their numbers, in its order."""
    pairs = zip(stacked.members, stacked.methods, strict=True)
    pairs = [pair for pair in pairs if pair[0].index in chosen]
    members, built = zip(*pairs, strict=True) if pairs else ((), ())
    return described(members, built, stacked.one)


def parts(stacked: Stack, size: int) -> list[Stack]:
    """A stack that is not drawn, in parts of at most `size` members."""
    starts, (members, built, *_) = range(0, len(stacked.members), size), stacked
    cut = lambda i: (members[i : i + size], built[i : i + size])
    return [described(*cut(i), stacked.one) for i in starts]
