"""Training with the optimiser's state in host memory except during the update itself.

A step is two programs: the first computes the gradients; then the state is copied to the device,
the second updates it, and it is copied back, so that activations and state are never on a device at
the same time. QLoRA uses paging for this (arXiv:2305.14314, section 3, "Paged Optimizers"). The
copies are exact; two programs instead of one may differ in the last bit of rounding.
"""

import functools

import jax
import jax.numpy as jnp

from lorax import sharding, xla
from lorax.train import step
from lorax.train.layouts import Layout
from lorax.train.members import over_devices, over_members
from lorax.train.shapes import Shapes, Training

HOST = "pinned_host"  # memory kind that holds the state


def gradients(program: step.Program, width: int):
    """f(params, constants, hyper, trainable, step, batches) -> (losses (M,), gradients) of all
    members; batches of one step, leaves (M, 1, A, B, ...)."""

    def run(params, constants, hyper, trainable, at, batches):
        of_member = lambda *member: step.gradients(program, params, *member)
        only = jax.tree.map(lambda x: x[:, 0], batches)
        return over_members(of_member, width)(constants, hyper, trainable, at, only)

    return run


def jitted(program: step.Program, layout: Layout, shapes: Shapes):
    """`gradients` for the devices of a layout, not compiled yet."""
    take = over_devices(gradients(program, layout.width), layout, (None, 0, 0, 0, 0, 0))
    trainable = jax.tree.map(lambda x: x.sharding, shapes.state.trainable)
    return jax.jit(take, out_shardings=(shapes.place.members, trainable))


def compile_training(program: step.Program, layout: Layout, shapes: Shapes) -> Training:
    """The two programs as one `Training`; `place` puts the optimiser's state on the host."""
    params, constants, hyper, state = shapes.params, shapes.constants, shapes.hyper, shapes.state
    on_device = jax.tree.map(lambda x: x.sharding, state)
    host = jax.tree.map(lambda place: place.with_memory_kind(HOST), on_device.opt_state)
    members = shapes.place.members

    def update(*member):
        return over_members(lambda *m: step.update(program, *m), layout.width)(*member)

    take = jitted(program, layout, shapes)
    update = over_devices(update, layout, (0, 0, 0, 0, 0))
    update = jax.jit(update, donate_argnums=2, out_shardings=(on_device, members))
    value = jax.ShapeDtypeStruct((layout.size,), jnp.float32, sharding=members)
    update = update.lower(constants, hyper, state, value, state.trainable).compile()

    @functools.cache
    def compiled(width):
        arguments = constants, hyper, state.trainable, state.step, shapes.batches(width)
        return take.lower(params, *arguments).compile()

    def away(state):
        return state._replace(
            opt_state=jax.block_until_ready(jax.device_put(state.opt_state, host))
        )

    def train(params, constants, hyper, state, batches):
        run = compiled(shapes.width_of(batches))
        result = run(params, constants, hyper, state.trainable, state.step, batches)
        jax.block_until_ready(result)  # activations are freed before the state is copied
        here = state._replace(opt_state=jax.device_put(state.opt_state, on_device.opt_state))
        state, logs = update(constants, hyper, here, *result)
        return away(state), jax.tree.map(lambda x: x[:, None], logs)

    needs = xla.program_bytes(compiled(shapes.widest))
    needs = max(needs, sharding.device_bytes(params) + xla.program_bytes(update))
    return Training(train, narrow=compiled, place=away, bytes=needs)
