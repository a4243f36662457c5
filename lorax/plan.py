"""What a config would take, before it takes it: parameters, bytes, FLOPs, time, members that fit.

    python -m lorax.plan --config=configs/gpt2_rank_sweep.py
    python -m lorax.plan --config=configs/gpt2_rank_sweep.py --config.base=random:gpt3-175b \\
        --config.param_dtype=bfloat16 --config.dtype=bfloat16 --config.train.remat=full
    python -m lorax.plan --config=FILE --device=h200,cpu
    python -m lorax.plan --table --markdown

Nothing is allocated: shapes go through `jax.eval_shape`, and the training step is compiled ahead of
time, for one member and for a group's members side by side, to see what buffers it needs. A base is
read from its config.json alone; "random:NAME" takes an architecture of lorax/models/shapes.py.

Exact numbers follow from shapes. Estimated ones: temporaries, activations among them, are those
that XLA lays out for a CPU (bfloat16 weights are not widened ahead, as it does only there); FLOPs
are those of matrix products, bytes moved what these read and write and what the optimiser touches;
rows are taken to be `train.seq_len` long. Time is a roofline: no device runs faster than that.

--table compares the field's models instead: trainable parameters by rank, and full fine-tuning
against LoRA and QLoRA. --markdown prints tables as Markdown.
"""

import bisect
import functools
import math
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from lorax import __version__, command_line, config, memory, search
from lorax.callable import make_callable
from lorax.command_line import FLAGS
from lorax.errors import fail, nearest

flags.DEFINE_string(
    "device", "h200,a100,tpu-v5p,cpu", "Devices to plan for, by name.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "table", False, "Compare the field's models; needs no --config.", flag_values=FLAGS
)
flags.DEFINE_bool("markdown", False, "Print tables as Markdown.", flag_values=FLAGS)


class Device(NamedTuple):
    """memory: bytes. half, full: FLOP/s of products of bfloat16 and of float32 as JAX multiplies
    them by default. bandwidth: of the memory, bytes/s. source: of these figures."""

    memory: float
    half: float
    full: float
    bandwidth: float
    source: str


_CORES = os.cpu_count() or 1
#: Peaks by the makers' data sheets, for dense matrices (the H100's and H200's give twice that, for
#: sparse ones).
DEVICES = {
    "h200": Device(
        141e9, 1979e12 / 2, 989e12 / 2, 4.8e12, "NVIDIA H200 SXM data sheet; float32 as TF32"
    ),
    "h100": Device(
        80e9, 1979e12 / 2, 989e12 / 2, 3.35e12, "NVIDIA H100 SXM data sheet; float32 as TF32"
    ),
    "a100": Device(
        80e9, 312e12, 156e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet; float32 as TF32"
    ),
    "tpu-v5p": Device(
        95e9, 459e12, 459e12, 2.765e12, "cloud.google.com/tpu/docs/v5p; float32 as bfloat16"
    ),
    "tpu-v5e": Device(
        16e9, 197e12, 197e12, 0.819e12, "cloud.google.com/tpu/docs/v5e; float32 as bfloat16"
    ),
    # 2.4 GHz, two 256-bit fused multiply-adds a cycle, and a 96th of twelve channels of DDR5-4800.
    "cpu": Device(
        0,  # this machine's, see `memory_of`
        _CORES * 2.4e9 * 64,
        _CORES * 2.4e9 * 32,
        _CORES * 460.8e9 / 96,
        f"AMD EPYC 9654 data sheet, {_CORES} of its 96 cores",
    ),
}
SHARE = 0.9  # of an accelerator's memory that a program may take, as `fitting.memory_limit`


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
            print(f"lorax {__version__}: the field's models, from their shapes", flush=True)
            _show(tables(), FLAGS.markdown)
            return 0
        settings, members, _ = command_line.read(argv)
        devices = FLAGS.device.split(",")
        check_devices(devices)
        print(f"lorax {__version__}: {command_line.summary(settings, members)}", flush=True)
        memory.check()
        for index, group in enumerate(config.grouped(members)):
            _show(describe(index, plan(group, devices), devices), FLAGS.markdown)
    except Exception as error:  # a config script may raise anything: one line to its author
        return fail(error)
    return 0


def check_devices(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not in `DEVICES`."""
    for name in names:
        if name not in DEVICES:
            raise ValueError(
                f"--device: {name!r} is not one of {', '.join(DEVICES)}{nearest(name, DEVICES)}"
            )


def plan_config(settings: ConfigDict, devices: str | Iterable[str] = ("cpu",)):
    """What a config would take: a pandas DataFrame with a row per group of members and device.

    group, method, base, members, parameters (of the base), trainable_params (of the largest
    member); in bytes weights (shared), adapters, optimizer, gradients and activations of one member
    and peak of all members side by side; then device and the fields of `OnDevice`. Activations,
    peak and what is on a device are estimated, the rest is exact.

    Raises ValueError or FileNotFoundError for a mistake in the config or a device.
    """
    import pandas as pd

    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    check_devices(devices)
    rows = []
    for index, members in enumerate(config.grouped(search.members(settings))):
        p, c = plan(members, devices), members[0].config
        one, wide = p.at(1), p.at(p.width)
        group = {"group": index, "method": c.method.name, "base": c.base, "members": p.members}
        group |= {"parameters": p.parameters, "trainable_params": max(p.trainable)}
        group |= {"weights": p.weights, "adapters": p.adapters, "optimizer": p.optimizer}
        group |= {"gradients": p.gradients, "peak": p.peak(p.members, wide)}
        group |= {"activations": int(max(one.temporaries - p.gradients, 0))}
        rows += [group | {"device": name} | on_device(p, name)._asdict() for name in devices]
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------- one group's plan


class Cost(NamedTuple):
    """Of `width` members side by side. temporaries: bytes of the program beside its arguments.
    half, full: FLOPs of one step in products of bfloat16 and of float32. moved: bytes a step."""

    width: int
    temporaries: float
    half: float
    full: float
    moved: float


class Plan(NamedTuple):
    """What one group takes, in bytes; of one member where not said otherwise.

    members: how many. width: of them side by side. name: what the group is. parameters: of the
    base. trainable: of each member, padding not counted. weights: of the base, shared. adapters,
    constants, gradients, optimizer: padded as in the sweep. rest: counters, learning rate, batches
    of one call. offload: whether the optimiser's state lies in the host's memory. files: arrays of
    each member's export. costs: by width, ascending. cpu: that of the width that a CPU takes, or
    None where none was asked for.
    """

    members: int
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

    @property
    def state(self) -> int:
        """Bytes of what training changes, and a checkpoint holds, of one member."""
        return self.adapters + self.optimizer

    @property
    def resident(self) -> int:
        """Bytes of that on the device while gradients are taken."""
        return self.adapters + (0 if self.offload else self.optimizer)

    def at(self, width: int) -> Cost:
        """The cost of a width: as compiled, or on the line through the two nearest that were; in
        proportion where one alone was."""
        known = self.costs
        i = min(max(bisect.bisect([c.width for c in known], width), 1), len(known) - 1)
        a, b = known[i - 1 : i + 1] if i else (Cost(0, 0, 0, 0, 0), known[0])
        t = (width - a.width) / (b.width - a.width)
        return Cost(width, *((1 - t) * x + t * y for x, y in zip(a[1:], b[1:], strict=True)))

    def peak(self, members: int, cost: Cost) -> int:
        """Bytes of a program of so many members, `cost.width` of them side by side."""
        each = self.resident + self.constants + self.rest
        total = self.weights + members * each + cost.temporaries
        if cost.width < members:  # the loop keeps what it has made, and those at work
            total += cost.width * each
            made = (members - cost.width) * self.gradients
            total += made if self.offload else members * self.state
        if self.offload:  # the update is a program of its own
            own = self.state + self.constants + self.gradients
            total = max(total, self.weights + members * own)
        return math.ceil(total)

    def most(self, memory: float, side_by_side: bool) -> int:
        """Members that fit into so many bytes, side by side or one after the other."""
        fits = lambda n: self.peak(n, self.at(n if side_by_side else 1)) <= memory
        low, high = 0, 1
        while fits(high) and high < 1 << 20:
            low, high = high, 2 * high
        return bisect.bisect_left(range(low + 1, high), True, key=lambda n: not fits(n)) + low


def plan(members, devices: Iterable[str] = ()) -> Plan:
    """Plan one group of members. devices: names in `DEVICES`; only "cpu" makes a difference, in
    what is compiled. Raises ValueError or FileNotFoundError for what a user can mend."""
    from lorax import tasks, tree
    from lorax.train import layouts

    c, n = members[0].config, len(members)
    base, stacked = shapes(members)
    batch = rows(c, base)
    one = lambda t: tree.nbytes(t) // n
    gradients, state = one(stacked.state.trainable), stacked.state
    widest = lambda most: max(w for w in range(1, min(most, n) + 1) if n % w == 0)
    width = widest(c.train.width or n)
    wide = "bfloat16" in (c.dtype, c.operands, c.param_dtype) and not c.quant
    widths, slow = {1, width}, []
    length = layouts.row_tokens(c.train, base)
    if "cpu" in devices:
        tokens = c.train.batch_size // c.train.accumulate * length
        slow = [widest(c.train.width or layouts.good_width(tokens, base, "cpu"))]
    wanted = [(w, False) for w in widths] + [(w, wide) for w in slow]
    found = _compiled(stacked, base, batch, dict.fromkeys(wanted))
    touched = 2 * (one((state.trainable, state.opt_state)) + gradients)
    decoded = _widest(base.params, c.dtype)  # whole but on a CPU, where it goes by tiles

    def cost(w, widened, more=0):
        temporaries, half, full, moved = found[w, widened]
        return Cost(w, temporaries + more, half, full, moved + w * touched)

    trainable = [method.count(base.params, base.sites) for method in stacked.methods]
    exported = _exported(stacked, base)
    rest = tree.nbytes(batch) + 24  # step, divergence, learning rate, decay and a key
    return Plan(
        members=n,
        width=width,
        name=f"{stacked.methods[0].name} on {c.base}, {c.train.batch_size} "
        + (f"x {length} tokens" if tasks.kind_of(c.task).reads == "tokens" else "arrays")
        + " a step"
        + f" in {c.train.accumulate} parts" * (c.train.accumulate > 1),
        remat=c.train.remat,
        offload=bool(c.train.offload),
        parameters=tree.count(base.params),
        trainable=trainable,
        weights=tree.nbytes(base.params),
        adapters=gradients,
        constants=one(stacked.constants),
        gradients=gradients,
        optimizer=one(state.opt_state),
        rest=rest,
        files=[round(4 * exported * count) for count in trainable],
        files_exact=exported == 1,
        costs=[cost(w, False, decoded) for w in sorted(widths)],
        cpu=cost(slow[0], wide) if slow else None,
    )


def shapes(members):
    """(`Base`, `stacks.Stack`) of a group, every array of both a `jax.ShapeDtypeStruct`."""
    import jax

    from lorax import tasks
    from lorax.models.load import skeleton
    from lorax.models.shapes import architecture
    from lorax.train import evidence, stacks

    c = members[0].config
    labels = tasks.outputs(c.task)
    head = {"head": "classification", "labels": labels} if labels else {}
    how = {"dtype": c.dtype, "param_dtype": c.param_dtype} | head
    how |= {} if c.train.remat == "none" else {"remat": c.train.remat}
    try:
        base = skeleton(c.base, **how)
    except FileNotFoundError as error:
        known = c.base.rpartition("/")[2]
        hint = f" To plan without its files: --config.base=random:{known}"
        raise FileNotFoundError(f"{error}{hint * bool(architecture(known))}") from None
    tasks.check_base(c.task, base, c.train.seq_len)
    base = _quantised(base, c.quant, c.double_quant) if c.quant else base
    for member in members:
        if evidence.is_automatic(member, stacks.hyperparameters(member, base)):
            raise ValueError(
                "method.rank, method.targets: 'auto' is decided by training batches, which a plan "
                "does not read; give a rank and targets"
            )
    built = stacks.build_methods(members, base)
    pad = stacks.padding(built, base)
    # All members have arrays of the same shapes.
    method, member, n = _with_constants_at_hand(built[0]), members[0], len(members)
    start = lambda params: stacks.start(member, method, base.replace(params=params), pad)
    many = lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype)
    arrays = jax.tree.map(many, jax.eval_shape(start, base.params))
    return base, stacks.Stack(tuple(members), tuple(built), *arrays)


def _exported(stacked, base) -> float:
    """How many numbers a member exports (`adapters.save`) for each that it trains: 1 for LoRA, more
    where factors were not trained or a start is taken off the base. What methods without factors
    leave as well, the changes dW of weights and a copy for PEFT, is not counted."""
    import jax

    from lorax import tree

    method = stacked.methods[0]
    state = jax.eval_shape(
        lambda t: jax.tree.map(lambda x: x[0], t), (stacked.state.trainable, stacked.constants)
    )
    if method.factors is None:
        return tree.count(state) / tree.count(state[0])
    factors = jax.eval_shape(lambda *s: method.factors(*s, base.params, base.sites), *state)
    parts = {path: (a, b, *m) for path, (a, b, _, *m) in factors.items()}
    whole = {path: x for path, x in tree.flatten(state[0]).items() if path.endswith("/w")}
    return (tree.count(parts) + tree.count(whole)) / tree.count(state[0])


def _with_constants_at_hand(method):
    """The method, with an optimiser that sees ones for constants: AdaLoRA's reads their values when
    it starts, and none says anything of a shape."""
    import jax
    import numpy as np

    ones = lambda x: np.broadcast_to(np.ones((), x.dtype), x.shape)
    return method._replace(
        optimizer=lambda inner, constants, train: method.optimizer(
            inner, jax.tree.map(ones, constants), train
        )
    )


def rows(c, base=None) -> dict:
    """The batches of one call of the training program, of one member: leaves (K, A, B, ...)."""
    from lorax import tasks
    from lorax.train.batches import steps_per_call

    k, parts = steps_per_call(c.eval.every, c.train.offload), c.train.accumulate
    lead = k, parts, c.train.batch_size // parts
    return tasks.batch_shapes(c.task, lead, c.train.seq_len, base)


#: Of the CPU's compiler: code not worth running, but the same buffers, in a third of the time.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
#: It would hoist float32 copies of all bfloat16 weights out of the loop over layers.
_NARROW = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def _compiled(stacked, base, batch, wanted) -> dict:
    """{(width, widened): (temporaries, FLOPs in half and full precision, bytes moved by products)}
    of the training program. widened: with copies that only a CPU makes of bfloat16 weights."""
    import jax

    from lorax import tasks, xla
    from lorax.train import step
    from lorax.train.members import over_members
    from lorax.train.programs import halved

    train, kind = stacked.members[0].config.train, tasks.kind_of(stacked.members[0].config.task)
    k = jax.tree.leaves(batch)[0].shape[0]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    put = lambda x, lead=(): jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=device)
    params = jax.tree.map(put, base.params)
    one = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), stacked[2:])
    lowered, works, compiled = {}, {}, {}
    with ThreadPoolExecutor(2) as pool:
        for width, widened in wanted:
            if width not in lowered:
                program = step.Program(
                    base.module,
                    stacked.methods[0],
                    base.sites,
                    train,
                    dropout=any(m.config.method.dropout > 0 for m in stacked.members),
                    merge=width == 1,
                    halved=halved(stacked, base),
                    kind=kind,
                )
                member = functools.partial(
                    _gradients if train.offload else step.train_steps, program
                )
                f = lambda params, *m, member=member, width=width: over_members(
                    lambda *one: member(params, *one), width
                )(*m)
                members = jax.tree.map(lambda x, w=width: put(x, (w,)), (*one, batch))
                donated = () if train.offload else 3
                traced = jax.jit(f, donate_argnums=donated).trace(params, *members)
                lowered[width], works[width] = traced.lower(), work(traced.jaxpr) / k
            options = xla.known(_QUICK if widened else _QUICK | _NARROW)
            compiled[width, widened] = pool.submit(lowered[width].compile, compiler_options=options)
    found = {}
    for (width, widened), job in compiled.items():
        m = job.result().memory_analysis()
        more = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        found[width, widened] = (more, *works[width])
    return found


def _gradients(program, params, constants, hyper, state, batches):
    """The program that takes gradients where the optimiser's state is not there."""
    import jax

    from lorax.train import step

    batch = jax.tree.map(lambda x: x[0], batches)
    return step.gradients(program, params, constants, hyper, state.trainable, state.step, batch)


def work(closed):
    """(3,) float64: FLOPs in products of 16-bit numbers, in others, and bytes that products read
    and write, of a `ClosedJaxpr` without what nothing reads. A loop counts as often as it turns."""
    from jax.interpreters import partial_eval

    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _work(live)


def _work(jaxpr):
    import jax
    import numpy as np

    total = np.zeros(3)
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        avals = [v.aval for v in (*equation.invars, *equation.outvars)]
        if name in ("dot_general", "conv_general_dilated"):
            out = equation.outvars[0].aval
            if name == "dot_general":
                (contracted, _), _ = given["dimension_numbers"]
                each = math.prod(avals[0].shape[i] for i in contracted)
            else:
                channels = given["dimension_numbers"].rhs_spec[0]
                each = avals[1].size // avals[1].shape[channels]
            half = avals[0].dtype.itemsize <= 2 and avals[1].dtype.itemsize <= 2
            total[0 if half else 1] += 2 * out.size * each
            total[2] += sum(aval.size * aval.dtype.itemsize for aval in avals)
        elif name == "cond":
            total += np.max([_work(branch.jaxpr) for branch in given["branches"]], axis=0)
        else:
            turns = given["length"] if name == "scan" else 1
            inner = [getattr(x, "jaxpr", x) for x in given.values()]
            total += turns * sum(_work(x) for x in inner if isinstance(x, jax.extend.core.Jaxpr))
    return total


def _quantised(base, kind: str, double: bool):
    """A base of shapes with its linear kernels, but heads, as `quant.quantize` holds them."""
    import jax

    from lorax import quant

    quantize = lambda params: quant.quantize(params, kind, double, sites=base.sites)
    return base.replace(params=jax.eval_shape(quantize, base.params))


def _widest(params, dtype: str) -> int:
    """Bytes of the largest quantised weight of one layer when it is decoded, 0 without any."""
    import numpy as np

    from lorax import quant, tree

    coded = [x for x in tree.flatten(params).values() if isinstance(x, quant.Quantised)]
    widest = max((leaf.n_in * leaf.n_out for leaf in coded), default=0)
    return widest * np.dtype(dtype).itemsize


# ----------------------------------------------------------------------------------------- to read


class Table(NamedTuple):
    """title, headings and rows of text, and what stands below."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def describe(index: int, p: Plan, devices: Iterable[str]) -> list[Table]:
    """The two tables of a group: what it takes, and how that goes on each device."""
    n, one, wide = p.members, p.at(1), p.at(p.width)
    exact, estimated = "exact", "estimated"
    export = exact if p.files_exact else estimated
    each = lambda x: (_bytes(x), _bytes(n * x))
    activations = lambda cost: _bytes(max(cost.temporaries - cost.width * p.gradients, 0))
    remat = {
        "none": "kept for the backward pass",
        "full": "made again in the backward pass",
        "dots": "made again but for products",
    }[p.remat]
    steps = (one, wide._replace(half=n / p.width * wide.half, full=n / p.width * wide.full))
    lines = [
        ("parameters of the base", f"{p.parameters:,}", "shared", exact),
        ("trainable parameters", _range(p.trainable, "{:,}"), f"{sum(p.trainable):,}", exact),
        ("weights", _bytes(p.weights), "shared", exact),
        ("adapters, padded alike", *each(p.adapters), exact),
        ("constants of the method", *each(p.constants), exact),
        (f"optimiser state{', in the host memory' * p.offload}", *each(p.optimizer), exact),
        ("batches and counters", *each(p.rest), exact),
        ("gradients", _bytes(p.gradients), _bytes(p.width * p.gradients), exact),
        (f"activations, {remat}", activations(one), activations(wide), estimated),
        ("peak of training", _bytes(p.peak(1, one)), _bytes(p.peak(n, wide)), estimated),
        ("exported arrays", _range(p.files, _bytes), _bytes(sum(p.files)), export),
        ("checkpoint", *each(p.state), exact),
        ("FLOPs a step", *(_si(c.half + c.full) for c in steps), estimated),
        ("bytes moved a step", _bytes(one.moved), _bytes(n / p.width * wide.moved), estimated),
    ]
    title = f"Group {index}: {n} member{'s' * (n > 1)}, {p.name}"
    headings = ("", "one member", f"all {n}, {p.width} side by side", "")
    if n == 1:
        headings, lines = ("", "one member", ""), [(a, b, d) for a, b, _, d in lines]
    reached = [_on_device(p, name) for name in devices]
    columns = ("device", "memory to use", "fit side by side", "fit one at a time", "compute")
    columns += ("memory traffic", "a step of all members, at least")
    note = f"All estimated. Memory to use: {SHARE:.0%} of an accelerator's, 80% of what is free "
    note += "on this machine. Peaks: "
    note += "; ".join(f"{name}: {DEVICES[name].source}" for name in devices) + "."
    what = Table(title, headings, lines)
    return [what, Table(f"Group {index} on devices", columns, reached, note)]


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
    """What fits on a device, and how long a step of all members takes there at least."""
    device, memory, cost, extra = DEVICES[name], memory_of(name), None, 0
    if name == "cpu" and p.cpu is not None:
        cost = p.cpu
        extra = cost.temporaries - p.at(cost.width).temporaries
    most = [p.most(memory - extra, side_by_side) for side_by_side in (True, False)]
    cost = cost or p.at(max(1, min(p.width, most[0])))
    turns = p.members / cost.width
    compute = turns * (cost.half / device.half + cost.full / device.full)
    return OnDevice(memory, *most, compute, turns * cost.moved / device.bandwidth)


def _on_device(p: Plan, name: str) -> tuple[str, ...]:
    """A device's row in words."""
    on = on_device(p, name)
    compute, moving = on.compute_seconds, on.moving_seconds
    least = f"{_seconds(max(compute, moving))} ({'compute' if compute > moving else 'memory'})"
    most = on.fit_side_by_side, on.fit_one_at_a_time
    fit = [f"{x:,}" if most[1] else "none" for x in most]
    end = least if most[1] else "does not fit"
    return name, _bytes(on.memory), *fit, _seconds(compute), _seconds(moving), end


def memory_of(name: str) -> float:
    """Bytes that a program may take on a device: of a CPU 80 % of what is free."""
    from lorax.train import fitting

    if name != "cpu":
        return SHARE * DEVICES[name].memory
    import jax

    default = config.default().train
    return fitting.memory_limit(default, jax.local_devices(backend="cpu")[:1]).bytes


def _range(values, show) -> str:
    show = show.format if isinstance(show, str) else show
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _short(x: int) -> str:
    """A number of parameters as the field writes it: 6.74B."""
    return _si(x).replace(" ", "").replace("G", "B")


def _si(x: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 T."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{x / size:.{4 if x >= 999.5 * size else 3}g} {prefix}{unit}"
    return f"{x:.3g} {unit}".strip()


def _bytes(x: float) -> str:
    return _si(x, "B")


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{1e3 * x:.3g} ms"


def _show(found: Iterable[Table], markdown: bool) -> None:
    if markdown:
        for t in found:
            lines = [t.headings, ["---"] + ["---:"] * (len(t.headings) - 1), *t.rows]
            print(f"\n**{_cell(t.title)}**\n")
            print("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
            print(f"\n{t.note}" * bool(t.note), flush=True)
        return
    from rich import box, table

    from lorax.console import console

    screen = console(width=None if sys.stdout.isatty() else 140)
    for t in found:
        drawn = table.Table(title=t.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(t.headings):
            drawn.add_column(name, justify="right" if i else "left")
        for row in t.rows:
            drawn.add_row(*row)
        screen.print(drawn)
        if t.note:
            screen.print(t.note)


def _cell(text: str) -> str:
    """Text in a table of Markdown, to which a bar ends the cell."""
    return text.replace("|", "\\|")


# ------------------------------------------------------------------------------- the field's tables

RANKS = (1, 2, 4, 8, 16, 64, 256)
SIZES = {"7B": "llama-7b", "13B": "llama-13b", "70B": "llama2-70b", "180B": "falcon-180b"}
ADAPTED = ("llama-7b", "llama-13b", "llama2-70b", "falcon-7b", "falcon-40b", "falcon-180b")
_QV = ("q", "v")
#: architecture -> [(name, rank, targets, quantised)], beside full fine-tuning
COMPARED = {
    "gpt3-175b": [("LoRA", 1, _QV, False), ("LoRA", 4, _QV, False)],
    **dict.fromkeys(
        ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "falcon-40b"),
        [("LoRA", 8, _QV, False), ("QLoRA", 64, ("all-linear",), True)],
    ),
    **dict.fromkeys(("roberta-base", "roberta-large"), [("LoRA", 8, _QV, False)]),
    "deberta-v2-xxlarge": [("LoRA", 16, _QV, False)],
}


def tables() -> Iterable[Table]:
    """The comparisons of the field, one after the other as they are found."""
    from lorax import methods, tree

    share = lambda part, whole: f"{_short(part)} {100 * part / whole:.2g}%"
    ranks = tuple(f"r = {r}" for r in RANKS)
    matrices, adapted = [], []
    for size, name in SIZES.items():
        d = _skeleton(name).params["embed"]["embedding"].shape[1]
        each = [share(2 * d * r, d * d) for r in RANKS]
        matrices.append((f"{size}, d = {d:,}", *each))
    yield Table("LoRA of one d x d matrix: trainable, of its parameters", ("", *ranks), matrices)

    for name in ADAPTED:
        base = _skeleton(name)
        whole = tree.count(base.params)
        for targets in (_QV, ("all-linear",)):
            count = lambda r, t=targets, b=base: methods.method("lora", rank=r, targets=t).count(
                b.params, b.sites
            )
            shown = (_fitting(count, r) for r in RANKS)
            each = ["-" if x is None else share(x, whole) for x in shown]
            adapted.append((f"{name}, {'+'.join(targets)}", *each))
    yield Table("LoRA: trainable, of all parameters", ("", *ranks), adapted)

    headings = ("", "trainable", "weights", "gradients", "Adam, 32 bits", "total")
    headings += ("Adam, 16 bits", "total", "checkpoint")
    lines = []
    for name in COMPARED:
        for label, row in compare(name).items():
            shown = [_bytes(x) for x in row[1:]]
            lines.append((label, f"{row.trainable:,}", *shown))
    note = "All exact, without activations. Weights, gradients and checkpoints are in 16 bits, "
    note += (
        "QLoRA's frozen weights in NF4 with double quantisation. The LoRA paper says 1.2 TB for "
    )
    note += "GPT-3 and not what is in it; the closest here is Adam in 16 bits, 1.27 TiB. QLoRA's "
    note += "780 GB for LLaMA 65B are those with Adam in 32 bits."
    yield Table("Full fine-tuning, LoRA and QLoRA", headings, lines, note)


class Training(NamedTuple):
    """Bytes of training without activations, in the order of the table; trainable: a number."""

    trainable: int
    weights: int
    gradients: int
    adam32: int
    total32: int
    adam16: int
    total16: int
    checkpoint: int


def compare(name: str) -> dict[str, Training]:
    """{what is trained: its bytes} of an architecture, everything but QLoRA's weights in 16 bits
    and Adam's two moments in 32 or 16."""
    from lorax import methods, tree

    base = _skeleton(name)
    whole = tree.count(base.params)
    rows = {f"{name}, full": (whole, 2 * whole)}
    for kind, rank, targets, packed in COMPARED[name]:
        method = methods.method("lora", rank=rank, targets=targets)
        weights = tree.nbytes(_quantised(base, "nf4", True).params) if packed else 2 * whole
        label = f"{name}, {kind} r = {rank}, {'+'.join(targets)}"
        n = method.count(base.params, base.sites)
        rows[label] = n, weights + 2 * n
    return {
        label: Training(n, w, 2 * n, 8 * n, w + 10 * n, 4 * n, w + 6 * n, 2 * n)
        for label, (n, w) in rows.items()
    }


def _fitting(count, rank):
    """count(rank), or None where a matrix is too small for the rank."""
    try:
        return count(rank)
    except ValueError:
        return None


def _skeleton(name: str):
    from lorax.models.load import skeleton

    return skeleton(f"random:{name}", param_dtype="bfloat16")


make_callable(__name__, plan_config)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
