"""What a group of members needs in bytes and FLOPs, from its shapes and its compiled program."""

import bisect
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax

from lorax import config, halving, tasks, tree
from lorax.halving import Race
from lorax.planning import compiled
from lorax.planning.compiled import Spread
from lorax.planning.shapes import one_member, rows, shapes, states_of_base
from lorax.train import fitting, layouts, mesh_costs, stacks


class Cost(NamedTuple):
    """Of `width` members side by side. temporaries: bytes of the program beside its arguments.
    half, full: FLOPs of one step in products of bfloat16 and of float32. moved: bytes a step."""

    width: int
    temporaries: float
    half: float
    full: float
    moved: float


class Plan(NamedTuple):
    """What one group needs on each device, in bytes per member unless said otherwise.

    members: their number. steps: (of one, of all together), with what halving saves if nothing
    diverges. width: how many run side by side. name: a description of the group. parameters: number
    of the base's. trainable: number of each member's, without padding. weights: of the base, shared
    by all members. adapters, constants, gradients, optimizer: padded as in the sweep. rest:
    counters, learning rate, batches of one call. offload: whether the optimiser's state is kept in
    the host's memory. files: arrays that each member exports. costs: by width, ascending. cpu: the
    cost of the width that a CPU uses, None if no CPU was asked for. kept: of the best step, with
    `eval.keep` "best". evaluated: number of validation rows that a member that trains to the end is
    evaluated on in all, those of further tasks (`eval.also`) included, and of test rows, None where
    only the data tell. states: bytes of the base's states that the KL of `eval.also` reads. notes:
    what else to know about the base, a line each. spread: over which devices; `members` are those
    of all of them.
    load: what a step costs on a mesh. gathered: bytes of the largest layer that a device gathers.
    eval_batch: rows that are evaluated together.
    """

    members: int
    steps: tuple[int, int]
    width: int
    name: str
    remat: str
    offload: bool
    parameters: int
    trainable: list[int]
    weights: int
    adapters: int
    constants: int
    gradients: int
    optimizer: int
    rest: int
    files: list[int]
    files_exact: bool
    costs: list[Cost]
    cpu: Cost | None
    kept: int = 0
    evaluated: tuple[int, int | None] = (0, 0)
    notes: tuple[str, ...] = ()
    spread: Spread = Spread()
    load: mesh_costs.Load | None = None
    gathered: int = 0
    eval_batch: int = 1
    states: int = 0

    @property
    def each(self) -> int:
        """Members on each device."""
        return math.ceil(self.members / self.spread.shape.member)

    @property
    def state(self) -> int:
        """Bytes of one member's state that training changes and a checkpoint holds."""
        return self.adapters + self.optimizer

    @property
    def resident(self) -> int:
        """Bytes of `state` that are on the device while gradients are computed."""
        return self.adapters + (0 if self.offload else self.optimizer)

    def activations(self, cost: Cost) -> float:
        """Bytes of the temporaries other than the gradients of the members that run."""
        return max(cost.temporaries - cost.width * self.gradients, 0)

    def at(self, width: int) -> Cost:
        """The cost of a width: as compiled, or interpolated between the two nearest widths that
        were compiled; in proportion to the width if only one was."""
        known = self.costs
        i = min(max(bisect.bisect([c.width for c in known], width), 1), len(known) - 1)
        a, b = known[i - 1 : i + 1] if i else (Cost(0, 0, 0, 0, 0), known[0])
        t = (width - a.width) / (b.width - a.width)
        return Cost(width, *((1 - t) * x + t * y for x, y in zip(a[1:], b[1:], strict=True)))

    def peak(self, members: int, cost: Cost) -> int:
        """Bytes of a program for this many members, `cost.width` of them side by side."""
        each = self.resident + self.constants + self.rest + self.kept
        total = self.weights + self.states + members * each + cost.temporaries
        if cost.width < members:  # the loop holds finished members, and those that are running
            total += cost.width * each
            made = (members - cost.width) * self.gradients
            total += made if self.offload else members * self.state
        if self.offload:  # the update is a separate program
            update = self.state + self.constants + self.gradients + self.kept
            total = max(total, self.weights + self.states + members * update)
        return math.ceil(total)

    def most(self, memory: float, side_by_side: bool) -> int:
        """Number of members that fit into this memory, side by side or one after another."""
        fits = lambda n: self.peak(n, self.at(n if side_by_side else 1)) <= memory
        low, high = 0, 1
        while fits(high) and high < 1 << 20:
            low, high = high, 2 * high
        return bisect.bisect_left(range(low + 1, high), True, key=lambda n: not fits(n)) + low


def plan(
    members,
    devices: Iterable[str] = (),
    race: Race | None = None,
    spread: Spread | None = None,
    described: tuple | None = None,
) -> Plan:
    """Plan one group of members (`config.grouped`). devices: names in `DEVICES`; with "cpu" the
    program is also compiled for the width that a CPU uses. race: if an axis is tuned. spread: over
    devices; None: on one. described: `planning.shapes.shapes` of the members, where they are known.
    Raises ValueError or FileNotFoundError for a config or a base that can't be planned."""
    c, n, spread = members[0].config, len(members), spread or Spread()
    race = race or halving.without(members)
    base, stacked = described or shapes(members)
    batch = rows(c, base)
    trainable = [method.count(base.params, base.sites) for method in stacked.methods]
    exported = _exported(stacked, base)
    each = math.ceil(n / spread.shape.member)
    width = layouts.even_width(c.train.width or each, each)
    on_cpu = "cpu" in devices and spread.shape.size == 1
    costs, cpu = _costs(stacked, base, batch, width, on_cpu, spread)
    one = compiled.on_one_device(stacked, base, batch, spread)
    load = load_of(stacked, base, width)._replace(copied=spread.mode != "mesh")
    return Plan(
        members=n,
        steps=(c.train.steps, halving.all_steps(race, [member.index for member in members])),
        width=width,
        name=_name(stacked, base),
        remat=c.train.remat,
        offload=bool(c.train.offload),
        parameters=tree.count(base.params),
        trainable=trainable,
        weights=one.weights,
        adapters=one.adapters,
        constants=one.constants,
        gradients=one.adapters,
        optimizer=one.optimizer,
        rest=one.batches + 24,  # step, divergence, learning rate, decay and a key
        files=[round(4 * exported * count) for count in trainable],
        files_exact=exported == 1,
        costs=costs,
        cpu=cpu,
        kept=one.adapters if c.eval.keep == "best" else 0,
        evaluated=_evaluated(c, race.stops[members[0].index]),
        notes=tuple(filter(None, (*base.traits.notes, stacks.made_whole(stacked, base)))),
        spread=spread,
        load=load,
        gathered=0 if load.copied else mesh_costs.gathered(base, spread.shape),
        eval_batch=c.eval.batch_size,
        states=states_of_base(stacked, base),
    )


def load_of(stacked: stacks.Stack, base, width: int) -> mesh_costs.Load:
    """What a step of a stack costs on a mesh, `width` members side by side."""
    n = len(stacked.members)
    trained = tree.nbytes(stacked.state.trainable) // n
    state = trained + (tree.nbytes((stacked.state.opt_state, stacked.constants)) // n)
    load = fitting.load_of(stacked.config, base, n)
    return load._replace(width=width, trained=trained, state=state)


def _evaluated(c, stops: Iterable[int]) -> tuple[int, int | None]:
    """`Plan.evaluated`: validation rows at every evaluation, from step 0 to the last, if the task
    has as many, and of every further task; test rows once. stops: `Race.stops` of a member."""
    at = {*range(0, c.train.steps, c.eval.every), *stops}
    measured = (c.task, *config.also(c).values())
    rows = sum(tasks.measured(of, c.eval.examples) for of in measured)
    return rows * len(at), tasks.measured(c.task, c.eval.test)


def _costs(
    stacked, base, batch, width: int, on_cpu: bool, spread: Spread
) -> tuple[list[Cost], Cost | None]:
    """(costs of one member and of `width`, ascending; the cost of a CPU's width, or None)."""
    c, n = stacked.config, len(stacked.members)
    widened = "bfloat16" in (c.dtype, c.operands, c.param_dtype) and not c.quant
    tokens = c.train.batch_size // c.train.accumulate * layouts.row_tokens(c.train, base)
    most = c.train.width or layouts.good_width(tokens, base, "cpu")
    slow = [(layouts.even_width(most, n), widened)] if on_cpu else []
    wide = [(w, False) for w in sorted({1, width})]
    measured = compiled.measure(stacked, base, batch, dict.fromkeys([*wide, *slow]), spread)
    state = stacked.state
    touched = 2 * tree.nbytes((state.trainable, state.opt_state, state.trainable)) // n

    def cost(key, more):
        at = measured[key]
        return Cost(key[0], at.temporaries + more, at.half, at.full, at.moved + key[0] * touched)

    decoded = compiled.widest_decoded(
        base.params, c.dtype
    )  # whole, except on a CPU, which decodes tiles
    decoded //= spread.shape.tensor
    return [cost(key, decoded) for key in wide], cost(slow[0], 0) if slow else None


def _name(stacked, base) -> str:
    """A description of a group: "lora on gpt2-nano, 8 x 128 tokens a step"."""
    c = stacked.config
    tokens = f"x {layouts.row_tokens(c.train, base)} tokens"
    rows = tokens if tasks.kind_of(c.task).reads == "tokens" else "arrays"
    parts = f" in {c.train.accumulate} parts" * (c.train.accumulate > 1)
    return f"{stacked.methods[0].name} on {c.base}, {c.train.batch_size} {rows} a step{parts}"


def _exported(stacked, base) -> float:
    """How many numbers a member exports (`adapters.save`) for each number that it trains: 1 for
    LoRA, more if some factors are not trained or a start is subtracted from the base. Methods
    without factors also write dW and a copy for PEFT, which is not counted."""
    method = stacked.methods[0]
    state = one_member((stacked.state.trainable, stacked.constants))
    if method.factors is None:
        return tree.count(state) / tree.count(state[0])
    factors = jax.eval_shape(lambda *s: method.factors(*s, base.params, base.sites), *state)
    parts = {path: (a, b, *m) for path, (a, b, _, *m) in factors.items()}
    whole = {path: x for path, x in tree.flatten(state[0]).items() if path.endswith("/w")}
    return (tree.count(parts) + tree.count(whole)) / tree.count(state[0])
