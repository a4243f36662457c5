"""The compiled programs of a stack: train, evaluate, and the spectra of the updates."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import hosts, ops, sharding, tree, xla
from lorax.methods import truncated
from lorax.models import Base
from lorax.tasks import kinds
from lorax.train import offload, step, trajectory
from lorax.train.evaluation import kept_states
from lorax.train.layouts import Layout
from lorax.train.members import Placement, filled, over_devices, over_members
from lorax.train.shapes import Shapes, Training, described, shapes
from lorax.train.stacks import Stack


class Programs(NamedTuple):
    """Programs for one shape of stack and one layout; `place*` moves host trees to the devices.

    train(params, constants, hyper, state, batches) -> (state, metrics (M, K)); donates the state.
    evaluate(params, constants, trainable, batches) -> (losses (M,), scores (M, N, B, k) or None).
    rows(params, constants, trainable, batches, n) -> `losses.Rows` of the first n batches, leaves
    (M, N, B, ...). A run needs one of the two; the other is compiled if it is called.
    also_rows(...) -> the same as `rows`, of batches of any shape; compiled on their first call.
    truncated_rows(...) -> the same as `rows`, of members whose updates are the factors of
    `lorax.methods.truncated`; compiled on the first call.
    compared_rows(params, constants, trainable, batches, n, states) -> `rows` with the KL from the
    base, compiled on the first call. states: of `base_states`, or None.
    hessian(params, constants, trainable, batches, vectors) -> the products of the members' Hessians
    with vectors, trees like trainable, over the batches of `place_batches`; compiled on the first
    call.
    base_rows(params, batches, n) -> the same of the base without any member, leaves (N, B, ...), on
    one device; compiled on the first call.
    base_states(params, batches, n) -> `step.base_states`; compiled on the first call.
    learned(state) -> the trainable parameters to evaluate and export; see `step.learned`.
    spectra(params, constants, trainable, compared) -> {path: `trajectory.Spectrum`} of the members
    that `compared` has, leaves (n, ...) on the host; compiled on the first call.
    place_base(params), place(stacked tree), place_state(a stack's state), place_batches(batches),
    place_rows(batches to evaluate, leaves (N, B, ...)).
    needed((M, K, A, B)) -> the part of batches that this process's devices need; None for all.
    narrow(width): compile train for batches cut to `width` columns (`tasks.widths`) in advance;
    otherwise the first call compiles.
    bytes: memory of one call to train on one device: arguments + temporaries + outputs - aliases,
    and what `eval.keep` "best" and the KL of `eval.also` keep; 0 if not known in advance
    (`train.parallel` "pmap").
    """

    train: Callable
    evaluate: Callable
    rows: Callable
    also_rows: Callable
    truncated_rows: Callable
    compared_rows: Callable
    hessian: Callable
    base_rows: Callable
    base_states: Callable
    learned: Callable
    spectra: Callable
    place_base: Callable
    place: Callable
    place_state: Callable
    needed: Callable
    place_batches: Callable
    place_rows: Callable
    narrow: Callable
    layout: Layout
    bytes: int


def compile_programs(
    stacked: Stack,
    base: Base,
    layout: Layout,
    batches,
    eval_batches,
    kind: kinds.Kind,
    compared: int = 0,
) -> Programs:
    """Compile for `layout.size` members, from shapes alone; nothing is allocated.

    batches: a task's rows as `jax.ShapeDtypeStruct` (K, A, B, ...), of one member.
    eval_batches: the same (N, B, ...), shared by all members. kind: of these rows. With test rows
    (`eval.test` is not 0) `rows` is compiled, without them `evaluate`. compared: on how many of the
    eval_batches members are compared with the base, whose states of them count as memory.
    """
    program = program_of(stacked, base, layout.width, kind)
    known = shapes(stacked, base, layout, batches, kind)
    evaluate = evaluation(program, layout.width, step.evaluate)
    evaluate = over_devices(evaluate, layout, (None, 0, 0, None))
    rows = evaluation(program, layout.width, step.evaluate_rows)
    rows = over_devices(rows, layout, (None, 0, 0, None, None))
    jitted_rows = rows if layout.mode == "pmap" else jax.jit(rows)
    if layout.mode == "pmap":
        train = over_devices(training(program, layout.width), layout, (None, 0, 0, 0, 0), donate=3)
        trained = Training(train, narrow=lambda width: None, place=lambda state: state, bytes=0)
    else:
        compiled = offload.compile_training if program.train.offload else compile_training
        evaluate, rows = jax.jit(evaluate), jitted_rows
        given = described(eval_batches, known.place.of_rows(eval_batches))
        arguments = known.params, known.constants, known.state.trainable, given
        tests = stacked.config.eval.test != 0
        n = (described(jnp.int32(0), known.place.shared),) if tests else ()
        lowered = (rows if tests else evaluate).lower(*arguments, *n)
        with ThreadPoolExecutor(1) as beside:  # XLA compiles without Python's lock
            evaluates = beside.submit(lowered.compile)
            if hosts.are_many():  # all of them compile in one order
                evaluates.result()
            trained = compiled(program, layout, known)
        evaluate, rows = (evaluate, evaluates.result()) if tests else (evaluates.result(), rows)
    beside = kept_bytes(known, stacked.config.eval.keep)
    beside += states_bytes(program, known.params, eval_batches, compared) if compared else 0

    def place(tree):
        return hosts.place(filled(tree, layout.size), known.place.of_members(tree))

    return Programs(
        train=trained.train,
        evaluate=evaluate,
        rows=rows,
        also_rows=jitted_rows,
        **when_called(program, layout),
        base_rows=jax.jit(functools.partial(step.base_rows, program)),
        base_states=jax.jit(functools.partial(step.base_states, program), static_argnums=2),
        learned=functools.partial(learned, program.train, known.place),
        spectra=trajectory.decomposer(program.method, program.sites),
        place_base=lambda params: hosts.place(params, known.place.base),
        place=place,
        place_state=lambda state: trained.place(place(state)),
        needed=functools.partial(needed, layout.size, known.place.batches),
        place_batches=lambda rows: hosts.place(filled(rows, layout.size), known.place.batches),
        place_rows=lambda rows: hosts.place(rows, known.place.of_rows(rows)),
        narrow=trained.narrow,
        layout=layout,
        bytes=trained.bytes and trained.bytes + beside,
    )


def when_called(program: step.Program, layout: Layout) -> dict[str, Callable]:
    """The programs that only some runs call, by their names in `Programs`."""
    of_truncated = program._replace(method=truncated.of(program.method))
    compared = evaluation(program, layout.width, step.compared_rows)
    rows = evaluation(of_truncated, layout.width, step.evaluate_rows)
    made = {
        "compared_rows": over_devices(compared, layout, (None, 0, 0, None, None, None)),
        "truncated_rows": over_devices(rows, layout, (None, 0, 0, None, None)),
        "hessian": over_devices(hessians(program, layout.width), layout, (None, 0, 0, 0, 0)),
    }
    return made if layout.mode == "pmap" else {name: jax.jit(f) for name, f in made.items()}


def needed(size: int, sharding, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """The part of batches of shape (M, K, A, B) that this process's devices need, filled up to
    `size` members; None for all of it."""
    if not hosts.are_many():
        return None
    members, *rows = hosts.part((size, *shape[1:]), sharding)
    last = shape[0] - 1  # of whom the members that fill up are copies
    return slice(min(members.start, last), min(members.stop, last + 1)), *rows


def kept_bytes(known: Shapes, keep: str) -> int:
    """Bytes on one device of the trainable parameters of the best step; 0 unless they are kept."""
    return sharding.device_bytes(known.state.trainable) if keep == "best" else 0


def states_bytes(program: step.Program, params, eval_batches, n: int) -> int:
    """`evaluation.kept_states` of the first n batches to evaluate, by this program."""
    return kept_states(functools.partial(step.base_states, program), params, eval_batches, n)


def program_of(stacked: Stack, base: Base, width: int, kind: kinds.Kind) -> step.Program:
    """The static part of a stack's computation when `width` members run side by side."""
    return step.Program(
        module=base.module,
        method=stacked.methods[0],
        sites=base.sites,
        train=stacked.config.train,
        dropout=any(member.config.method.dropout > 0 for member in stacked.members),
        merge=width == 1,
        halved=halved(stacked, base),
        kind=kind,
    )


def halved(stacked: Stack, base: Base) -> dict:
    """{path: Site} of the frozen kernels that multiply in bfloat16, if the config asks for it: all
    in whose place the method puts no array of its own."""
    if stacked.config.operands == "float32":
        return {}
    method = stacked.methods[0]

    def replaced(trainable, constants, params):
        before = tree.flatten(params)
        after = tree.flatten(method.bind(trainable, constants, params, None, base.sites))
        kept = lambda path: ops.is_operator(after[path]) or after[path] is before[path]
        return {path: after[path] for path in base.sites if not kept(path)}

    constants, _, state = stacked.one
    own = jax.eval_shape(replaced, state.trainable, constants, base.params)
    return {path: site for path, site in base.sites.items() if path not in own}


def training(program: step.Program, width: int) -> Callable:
    """f(params, constants, hyper, state, batches) -> (state, metrics), for all members."""

    def train(params, *members):
        of_member = lambda *member: step.train_steps(program, params, *member)
        return over_members(of_member, width)(*members)

    return train


def evaluation(program: step.Program, width: int, of_member: Callable) -> Callable:
    """f(params, constants, trainable, *batches) -> what `of_member`, which is `step.evaluate`,
    `step.evaluate_rows` or `step.compared_rows`, returns; for all members."""

    def evaluate(params, constants, trainable, *batches):
        of_one = lambda *member: of_member(program, params, *member, *batches)
        return over_members(of_one, width)(constants, trainable)

    return evaluate


def hessians(program: step.Program, width: int) -> Callable:
    """f(params, constants, trainable, batches, vectors) -> `step.hessian_product` of all members,
    batches being those of training, leaves (M, K, A, B, ...)."""
    program = program._replace(merge=False)

    def of_one(params, constants, trainable, batches, vector):
        parts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
        return step.hessian_product(program, params, constants, trainable, parts, vector)

    def of_all(params, *members):
        return over_members(functools.partial(of_one, params), width)(*members)

    return of_all


def learned(train, place: Placement, state: step.MemberState) -> dict:
    """`step.learned` of all members, on the devices."""
    if train.optimizer != "schedule-free":
        return state.trainable
    shardings = place.of_members(state)
    state = jax.device_put(state, shardings)  # with `train.offload` the average is on the host
    average = jax.jit(lambda s: step.learned(train, s), out_shardings=shardings.trainable)
    return average(state)


def jitted(program: step.Program, layout: Layout, known: Shapes):
    """`training` for the devices of a layout, not compiled yet."""
    shardings = jax.tree.map(lambda x: x.sharding, known.state)
    train = over_devices(training(program, layout.width), layout, (None, 0, 0, 0, 0))
    return jax.jit(train, donate_argnums=3, out_shardings=(shardings, known.place.members))


def compile_training(program: step.Program, layout: Layout, known: Shapes) -> Training:
    """`training` compiled for shapes, with everything on the devices."""
    train = jitted(program, layout, known)

    @functools.cache
    def compiled(width):
        members = known.constants, known.hyper, known.state, known.batches(width)
        return train.lower(known.params, *members).compile()

    call = lambda *arguments: compiled(known.width_of(arguments[-1]))(*arguments)
    bytes_ = xla.program_bytes(compiled(known.widest))
    return Training(call, narrow=compiled, place=lambda state: state, bytes=bytes_)
