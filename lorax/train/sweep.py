"""Many members as one program: they are stacked on a leading axis M and share the frozen base.

Inside the program `width` members run side by side (vmapped: every product with a frozen weight
sees their rows as one batch), the rest one after the other under `lax.map`. Several devices each
take a part of the members, or of every batch.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import catalogue, memory, methods, tasks, tree
from lorax.config import Member
from lorax.methods import Method
from lorax.models import Base
from lorax.tasks import kinds
from lorax.train import evidence, trajectory
from lorax.train import step as train_step

TOKEN_FEATURES = 200_000  # tokens x features that a CPU likes side by side (lorax.bench sweep)
CPU_COPIES = 128e6  # bytes of the base, one copy for each of a CPU's devices, that "auto" spends
STEPS_PER_CALL = 10
HOST = "pinned_host"  # kind of memory that holds what is offloaded


def split_cpu() -> None:
    """Make a CPU as many devices as it has cores, up to 8, unless XLA_FLAGS already says.

    Two members on a core each are faster than two cores on every small product of one. To be
    called before JAX's first computation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


class Stack(NamedTuple):
    """Members of one shape, each leaf with a leading member axis M.

    methods: of each member. constants, hyper: untrained. state: `MemberState` at step 0.
    """

    members: tuple[Member, ...]
    methods: tuple[Method, ...]
    constants: dict
    hyper: train_step.Hyper
    state: train_step.MemberState


def hyperparameters(member, base: Base) -> dict:
    """What the member's config gives its method: {name: value}, of those that the method has.

    In a sweep over methods a key is for those that have it; None is a method's own default.
    """
    hp = member.config.method.to_dict()
    known = methods.hyperparameters(hp["name"])
    if base.fresh:  # a head of random weights says nothing before it is trained
        hp["full"] = tuple(dict.fromkeys((*hp["full"], "classifier")))
    return {key: value for key, value in hp.items() if key in known and value is not None}


def build_methods(members, base: Base, decided: dict | None = None) -> list[Method]:
    """Each member's method, with targets, layers and rank checked against the base.

    decided: {member index: hyperparameters} of those that evidence chose (`lorax.train.evidence`).
    """
    built = []
    for member in members:
        hp = (decided or {}).get(member.index) or hyperparameters(member, base)
        method = methods.method(member.config.method.name, **hp)
        method.count(base.params, base.sites)  # raises on what does not fit
        built.append(method)
    return built


class Padding(NamedTuple):
    """What members of one program have arrays for: the matrices that any of them adapts, and the
    widest of them; None where the method makes no use of it."""

    targets: dict | None
    width: int | None


def padding(built: list[Method], base: Base) -> Padding:
    """The padding of members with these methods."""
    targets, width = None, None
    if built[0].adapts is not None:
        any_of_them = {path for m in built for path in m.adapts(base.params, base.sites)}
        targets = {path: site for path, site in base.sites.items() if path in any_of_them}
    if built[0].width is not None:
        width = max(method.width for method in built)
    return Padding(targets, width)


def start(member, method: Method, base: Base, pad: Padding, task=None, seen=None) -> tuple:
    """(constants, hyper, state) of one member at step 0, of which a `Stack` is made. It can be
    traced. task, seen: as for `stack`."""
    init_key, dropout_key = jax.random.split(jax.random.key(member.config.seed))
    found = None
    if method.needs is not None and task is not None:
        own = method.adapts(base.params, base.sites)
        found = evidence.read(member, base, task, own, method.needs, {} if seen is None else seen)
    trainable, fixed = method.init(init_key, base.params, base.sites, *pad, found)
    train = member.config.train
    hyper = train_step.Hyper(jnp.float32(train.lr), jnp.float32(train.weight_decay), dropout_key)
    return fixed, hyper, train_step.start(method, trainable, fixed, train, hyper)


def stack(
    members,
    built: list[Method],
    base: Base,
    task: tasks.Task | None = None,
    seen: dict | None = None,
) -> Stack:
    """Start every member, padded to the largest width (rank, or dimension of a subspace) and the
    union of the targets, and stack them.

    For LoRA and its like: zero rows of b with zero columns of a have zero gradients, so padding
    stays exactly zero under AdamW and weight decay, and a matrix that a member does not adapt is
    the same case. task, seen: for starts that read training batches (`lorax.train.evidence`); the
    others need none.
    """
    pad, seen = padding(built, base), {} if seen is None else seen
    pairs = zip(members, built, strict=True)
    started = [start(member, method, base, pad, task, seen) for member, method in pairs]
    if isinstance(catalogue.row(built[0].name).where, Callable):
        check_alike(built, base, started)
    together = lambda *leaves: jnp.stack(leaves)
    return Stack(tuple(members), tuple(built), *jax.tree.map(together, *started))


def check_alike(built: list[Method], base: Base, started: list[tuple]) -> None:
    """Raises ValueError where members that could share a program by their method's `varies` can't:
    their trees have other shapes, or other things are computed with them. For a user's method:
    lorax's own are known to hold to it."""
    seen = {}  # what members differ in from the first -> (shapes, what is computed)
    for method, (constants, _, state) in zip(built, started, strict=True):
        own = {key: value for key, value in method.hp.items() if value != built[0].hp.get(key)}
        if str(own) in seen:
            continue
        trees = state.trainable, constants
        named = tree.flatten(dict(zip(("trainable", "constants"), trees, strict=True)))
        shapes = {path: tuple(x.shape) for path, x in named.items()}
        first, does = next(iter(seen.values()), (shapes, None))
        problem = f"method {method.name!r}: members that differ in {', '.join(own)} can't share a "
        problem += "program, though it varies"
        for path in sorted(shapes.keys() | first.keys()):
            if shapes.get(path) != first.get(path):
                raise ValueError(
                    f"{problem}: {path} is {first.get(path)} and {shapes.get(path)}; `init` has to "
                    "pad to the width and have arrays for all targets that it is given"
                )
        bind = lambda *trees, of=method: of.bind(*trees, sites=base.sites)
        penalty = lambda *trees, of=method: of.penalty and of.penalty(*trees[:2])
        delta = lambda *trees, of=method: of.delta and of.delta(*trees, base.sites)
        what = "".join(_computation(f, *trees, base.params) for f in (bind, penalty, delta))
        if does not in (None, what):
            raise ValueError(
                f"{problem}: `bind`, `penalty` or `delta` takes them from elsewhere than the "
                "trees; put them into the constants, or leave them out of `varies`"
            )
        seen[str(own)] = shapes, what


def _computation(f, *trees) -> str:
    """What f computes, its constants and static fields included, the same for the same thing."""
    traced, shape = jax.make_jaxpr(f, return_shape=True)(*trees)
    text = f"{traced.jaxpr} {[*map(str, traced.consts)]} {jax.tree.structure(shape)}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


class Layout(NamedTuple):
    """How the member axis and the batches lie on the devices.

    mode: "none", "members", "batch" or "pmap". devices: as many as are used. size: members in one
    program, a multiple of the number of devices that share them. width: members side by side.
    """

    mode: str
    devices: tuple
    size: int
    width: int


def layout(n_members: int, train, base: Base, devices=None) -> Layout:
    """The layout that config.train asks for, or a good one ("auto", width 0).

    Raises ValueError where "batch" is asked for and the devices don't divide a batch.
    """
    devices = tuple(devices or jax.local_devices())
    mode, part = train.parallel, train.batch_size // train.accumulate
    if mode == "auto":
        copies = tree.nbytes(base.params) * len(devices)
        if len(devices) == 1 or (devices[0].platform == "cpu" and copies > CPU_COPIES):
            mode = "none"
        elif n_members >= len(devices):
            mode = "members"
        else:
            mode = "batch" if part % len(devices) == 0 else "none"
    if mode == "batch" and part % len(devices):
        raise ValueError(
            f"train.parallel: 'batch' over {len(devices)} devices, but a batch has {part} sequences"
        )
    if mode == "none":
        devices = devices[:1]
    shares = len(devices) if mode in ("members", "pmap") else 1
    each = math.ceil(n_members / shares)
    tokens = part * row_tokens(train, base)
    width = train.width or _good_width(tokens, base, devices[0].platform)
    # A divisor: 12 members at width 8 run as 6 and 6, and no remainder is compiled by itself.
    width = max(w for w in range(1, min(width, each) + 1) if each % w == 0)
    return Layout(mode, devices, each * shares, width)


def row_tokens(train, base: Base) -> int:
    """Tokens of a row, at most: an image is one, or as many as it has patches."""
    return train.seq_len if base.input_shape is None else base.traits.array_positions


def _good_width(tokens: int, base: Base, platform: str) -> int:
    """A CPU wants its working set in cache, an accelerator wants as many rows as there are."""
    if platform != "cpu":
        return 1 << 30
    features = min(leaf.shape[-1] for leaf in jax.tree.leaves(base.params) if leaf.ndim > 1)
    return max(1, min(8, TOKEN_FEATURES // (tokens * features)))


class Programs(NamedTuple):
    """Compiled for one shape of stack and one layout; host trees go in through `place*`.

    With `train.offload` the optimiser's state lies in the host's memory whenever no step updates
    it. A call is two programs: one takes the gradients; then the state comes to the device, the
    other updates, and the state goes back, so that activations and state are never on a device
    together. QLoRA pages for the same end (arXiv:2305.14314, section 3, "Paged Optimizers"). Moving
    changes no bit; two programs for one may round the last one otherwise.

    train(params, constants, hyper, state, batches) -> (state, metrics (M, K)); donates the state.
    evaluate(params, constants, trainable, batches) -> (losses (M,), scores (M, N, B, k) or None).
    spectra(params, constants, trainable, n) -> {path: `trajectory.Spectrum`} of the first n
    members, leaves (n, ...) on the host; compiled at its first call.
    place_base(params), place(stacked tree), place_state(a stack's state), place_batches(batches).
    narrow(width): compile train for batches cut to so many columns (`tasks.widths`); else the
    first call does.
    bytes: of one call to train on one device: arguments + temporaries + outputs - aliases.
    """

    train: Callable
    evaluate: Callable
    spectra: Callable
    place_base: Callable
    place: Callable
    place_state: Callable
    place_batches: Callable
    narrow: Callable
    layout: Layout
    bytes: int


def compile_programs(
    stacked: Stack,
    base: Base,
    layout: Layout,
    batches,
    eval_batches,
    kind: kinds.Kind = kinds.TEXTS,
) -> Programs:
    """Compile for `layout.size` members, from shapes alone; nothing is allocated.

    batches: a task's rows as `jax.ShapeDtypeStruct` (K, A, B, ...), of one member.
    eval_batches: the same (N, B, ...), shared by all members. kind: of these rows.
    """
    program = train_step.Program(
        base.module,
        stacked.methods[0],
        base.sites,
        stacked.members[0].config.train,
        dropout=any(m.config.method.dropout > 0 for m in stacked.members),
        merge=layout.width == 1,
        halved=_halved(stacked, base),
        kind=kind,
    )

    def train(params, *member):
        one = lambda *m: train_step.train_steps(program, params, *m)
        return over_members(one, layout.width)(*member)

    def evaluate(params, constants, trainable, batches):
        one = lambda *m: train_step.evaluate(program, params, *m, batches)
        return over_members(one, layout.width)(constants, trainable)

    def spectra(params, constants, trainable, i):
        member = jax.tree.map(lambda x: x[i], (constants, trainable))
        return trajectory.spectra(program.method, base.sites, params, *member)

    spectra = functools.partial(trajectory.of_members, jax.jit(spectra))
    mesh = Mesh(np.array(layout.devices), ("devices",))
    shared, apart = P(), P("devices") if layout.mode in ("members", "pmap") else P()
    by_batch = P(None, None, None, "devices") if layout.mode == "batch" else apart
    share = lambda f, specs: f
    if layout.mode == "members":
        share = lambda f, specs: jax.shard_map(
            f, mesh=mesh, in_specs=specs, out_specs=apart, check_vma=False
        )
    train = share(train, (shared, apart, apart, apart, apart))
    evaluate = share(evaluate, (shared, apart, apart, shared))
    if layout.mode == "pmap":
        train = _pmapped(train, layout.devices, (None, 0, 0, 0, 0), donate=3)
        evaluate = _pmapped(evaluate, layout.devices, (None, 0, 0, None))

    at = lambda spec: NamedSharding(mesh, spec)
    size, n = layout.size, len(stacked.members)
    every = np.minimum(np.arange(size), n - 1)  # copies of the last member fill up
    fill = lambda tree: jax.tree.map(lambda x: x[every], tree)
    place_base = lambda params: jax.device_put(params, at(shared))
    place = lambda tree: jax.device_put(fill(tree), at(apart))
    place_batches = lambda tree: jax.device_put(fill(tree), at(by_batch))
    if layout.mode == "pmap":
        narrow = lambda width: None  # it compiles by itself
        places = place_base, place, place, place_batches
        return Programs(train, evaluate, spectra, *places, narrow, layout, 0)

    def described(tree, spec, lead):
        """Shapes of a tree with the axes `lead` in front."""
        struct = lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=at(spec))
        return jax.tree.map(struct, tree)

    member = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), stacked[2:])
    constants, hyper, state = described(member, apart, (size,))
    params = described(base.params, shared, ())
    columns = kinds.columns(kind, batches)
    cut = lambda width: described(kinds.narrowed(kind, batches, width), by_batch, (size,))

    evaluate = (
        jax.jit(evaluate)
        .lower(params, constants, state.trainable, described(eval_batches, shared, ()))
        .compile()
    )
    places = place_base, place, place, place_batches
    if program.train.offload is None:
        train = jax.jit(train, donate_argnums=3)

        @functools.cache
        def compiled(width):
            return train.lower(params, constants, hyper, state, cut(width)).compile()

        call = lambda *given: compiled(kinds.columns(kind, given[-1]))(*given)
        bytes_ = program_bytes(compiled(columns))
        return Programs(call, evaluate, spectra, *places, compiled, layout, bytes_)

    # ----------------------------------------------------------- the optimiser's state, offloaded
    def gradients(params, constants, hyper, trainable, step, batches):
        one = lambda *m: train_step.gradients(program, params, *m)
        only = jax.tree.map(lambda x: x[:, 0], batches)  # one step a call
        return over_members(one, layout.width)(constants, hyper, trainable, step, only)

    def update(*member):
        one = lambda *m: train_step.update(program, *m)
        return over_members(one, layout.width)(*member)

    gradients = jax.jit(share(gradients, (shared, *[apart] * 5)), out_shardings=at(apart))
    value = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=at(apart))
    update = jax.jit(share(update, (apart,) * 5), donate_argnums=2, out_shardings=at(apart))
    update = update.lower(constants, hyper, state, value, state.trainable).compile()
    host = at(apart).with_memory_kind(HOST)
    away = lambda s: s._replace(opt_state=jax.block_until_ready(jax.device_put(s.opt_state, host)))

    @functools.cache
    def compiled(width):
        given = params, constants, hyper, state.trainable, state.step, cut(width)
        return gradients.lower(*given).compile()

    def call(params, constants, hyper, state, batches):
        take = compiled(kinds.columns(kind, batches))
        found = take(params, constants, hyper, state.trainable, state.step, batches)
        jax.block_until_ready(found)  # the activations are gone before the state comes
        here = state._replace(opt_state=jax.device_put(state.opt_state, at(apart)))
        state, logs = update(constants, hyper, here, *found)
        return away(state), jax.tree.map(lambda x: x[:, None], logs)

    places = place_base, place, lambda state: away(place(state)), place_batches
    needs = program_bytes(compiled(columns)), tree.nbytes(base.params) + program_bytes(update)
    return Programs(call, evaluate, spectra, *places, compiled, layout, max(needs))


def _halved(stacked: Stack, base: Base) -> dict:
    """The frozen kernels, where the config asks for bfloat16 operands."""
    if stacked.members[0].config.operands == "float32":
        return {}
    full = {p.removesuffix("/w") for p in tree.flatten(stacked.state.trainable) if p.endswith("/w")}
    return {path: site for path, site in base.sites.items() if path not in full}


def over_members(f, width: int):
    """f on each index of a leading axis: `width` at a time vmapped, the rest under `lax.map`."""
    if width == 1:
        return lambda *trees: jax.lax.map(lambda member: f(*member), trees)
    return lambda *trees: jax.lax.map(lambda member: f(*member), trees, batch_size=width)


def _pmapped(f, devices, in_axes, donate=()):
    n = len(devices)
    mapped = jax.pmap(f, in_axes=in_axes, devices=devices, donate_argnums=donate)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree)
    join = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    parts = lambda args: [
        split(a) if axis == 0 else a for a, axis in zip(args, in_axes, strict=True)
    ]
    return lambda *args: join(mapped(*parts(args)))


def program_bytes(compiled) -> int:
    """Peak bytes of a compiled program on one device, by the buffers that XLA laid out for it."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )


def memory_limit(train, devices) -> memory.Free:
    """Bytes that one program may take on each of its devices, and whose limit that is: at most
    `train.memory_gb`, or else most of what is free. A CPU's devices share its memory."""
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats:
        there, most = memory.Free(stats["bytes_limit"], "has the device"), 0.9
    else:
        there, most = memory.free(), 0.8
        there = there._replace(bytes=there.bytes // len(devices))
    own = memory.Free(int(train.memory_gb * 1e9), "are given by train.memory_gb")
    if own.bytes:
        return min(own, there)
    return there._replace(bytes=int(most * there.bytes))


def fit(
    stacked: Stack,
    base: Base,
    train,
    batches,
    eval_batches,
    devices=None,
    kind: kinds.Kind = kinds.TEXTS,
) -> Programs:
    """`compile_programs` for as many members at once as memory holds, found by asking the compiler.

    First the members side by side are halved, then the members in one program; the caller runs the
    rest in further calls of the same program. Raises MemoryError where not even one fits, and says
    what would.
    """
    n = len(stacked.members)
    while True:
        chosen = layout(n, train, base, devices)
        programs = compile_programs(stacked, base, chosen, batches, eval_batches, kind)
        limit = memory_limit(train, chosen.devices)
        if programs.bytes <= limit.bytes:
            return programs
        if chosen.width > 1:
            train = train.copy_and_resolve_references()
            train.width = chosen.width // 2
        elif n > 1:
            n = math.ceil(n / 2)
        else:
            ask = functools.partial(compile_programs, stacked, base, chosen)
            needs = lambda batches, ask=ask: ask(batches, eval_batches, kind).bytes
            raise MemoryError(
                f"one member needs {programs.bytes / 1e9:.2f} GB and {limit.bytes / 1e9:.2f} GB "
                f"{limit.limit}: {would_fit(train, batches, needs, limit.bytes, kind)}"
                + (", or set train.remat to full" if train.remat == "none" else "")
            )


def would_fit(
    train, batches, needs: Callable[[dict], int], limit: int, kind: kinds.Kind = kinds.TEXTS
) -> str:
    """What of a batch would fit, by asking the compiler: needs(shapes of batches) -> bytes.

    First the batch is worked off in more parts, up to a row at a time; then its rows are halved.
    """
    size = train.batch_size
    parts = [a for a in range(train.accumulate + 1, size + 1) if size % a == 0]

    def divided(a, width=None):
        parted = lambda x: jax.ShapeDtypeStruct((x.shape[0], a, size // a, *x.shape[3:]), x.dtype)
        return jax.tree.map(parted, kinds.narrowed(kind, batches, width))

    least = parts[-1] if parts else train.accumulate
    if parts and needs(divided(least)) <= limit:
        # The need falls as the parts get more.
        a = next(a for a in parts if a == least or needs(divided(a)) <= limit)
        return f"train.accumulate={a} would fit"
    length = (kinds.columns(kind, batches) or 0) - kind.ahead
    while length >= 16:
        length //= 2
        if needs(divided(least, length + kind.ahead)) <= limit:
            return f"train.seq_len={length} with train.accumulate={least} would fit"
    return "nor would a smaller batch fit; take a smaller base, or param_dtype=bfloat16"


def chunks(stacked: Stack, size: int) -> list[Stack]:
    """The stack in parts of at most `size` members."""
    part = lambda tree, i: jax.tree.map(lambda x: x[i : i + size], tree)
    return [
        Stack(stacked.members[i : i + size], stacked.methods[i : i + size], *part(stacked[2:], i))
        for i in range(0, len(stacked.members), size)
    ]


def steps_per_call(every: int, offload: str | None = None) -> int:
    """Optimiser steps in one call: the largest divisor of `eval.every` up to `STEPS_PER_CALL`, or
    one where something is offloaded between steps (`train.offload`).

    One call for several steps saves handing buffers over, which a small model notices.
    """
    return 1 if offload else max(k for k in range(1, STEPS_PER_CALL + 1) if every % k == 0)


def train_batches(stacked: Stack, task: tasks.Task, first: int, k: int) -> dict:
    """The batches of steps first .. first + k - 1: leaves (M, K, A, B, ...), on the host.

    Which rows a member sees is a function of its seed and the step alone. Rows that are grouped by
    length are cut to the narrowest of `tasks.widths` that holds the longest of them.
    """
    c, lengths = stacked.members[0].config.train, task.lengths
    shape = (k, c.accumulate, c.batch_size // c.accumulate)
    rows = []
    for member in stacked.members:
        n = tasks.train_size(member.config.task, task)
        own = None if lengths is None else lengths[:n]
        order = tasks.orders(n, c.batch_size, member.config.seed, range(first, first + k), own)
        rows.append(order.reshape(shape))
    rows, width = np.stack(rows), tasks.widths(task)[-1]
    if lengths is not None:
        width = min(w for w in tasks.widths(task) if w >= lengths[rows].max())
    return {name: x[rows] for name, x in kinds.narrowed(task.kind, task.train, width).items()}


def batch_shapes(train, task: tasks.Task, k: int) -> dict:
    """Shapes of one member's batches of k steps at their widest: leaves (K, A, B, ...)."""
    lead = k, train.accumulate, train.batch_size // train.accumulate
    return {
        name: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype) for name, x in task.train.items()
    }


def eval_batches(task: tasks.Task, batch_size: int) -> dict:
    """The evaluation rows as leaves (N, B, ...); rows without weight fill the last batch up."""
    rows = tasks.size(task.eval)
    size = min(batch_size, rows)
    fill = lambda x: np.pad(x, ((0, -rows % size), *((0, 0),) * (x.ndim - 1)))
    return {name: fill(x).reshape(-1, size, *x.shape[1:]) for name, x in task.eval.items()}
