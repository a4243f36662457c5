"""Many members as one program: they are stacked on a leading axis M and share the frozen base.

Inside the program `width` members run side by side (vmapped: every product with a frozen weight
sees their rows as one batch), the rest one after the other under `lax.map`. Several devices each
take a part of the members, or of every batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import tree
from lorax.models import Base
from lorax.tasks import kinds
from lorax.train import step as train_step
from lorax.train import trajectory
from lorax.train.layouts import Layout
from lorax.train.stacks import Stack

HOST = "pinned_host"  # kind of memory that holds what is offloaded


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
        stacked.config.train,
        dropout=any(m.config.method.dropout > 0 for m in stacked.members),
        merge=layout.width == 1,
        halved=halved(stacked, base),
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


def halved(stacked: Stack, base: Base) -> dict:
    """The frozen kernels, where the config asks for bfloat16 operands."""
    if stacked.config.operands == "float32":
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
