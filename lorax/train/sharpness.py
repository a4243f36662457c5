"""Sharpness: the largest eigenvalue of the loss's Hessian over what a member trains.

The loss is the mean over the member's first training batches. Products of the Hessian with vectors
are gradients of the loss's derivative along them (`step.hessian_product`), of all members side by
side; `lorax.lanczos` needs ten to a hundred of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lorax import divided, gather, hosts, methods, tree
from lorax.lanczos import Largest, largest_eigenvalues
from lorax.models import Base
from lorax.train.batches import axes, train_batches
from lorax.train.part import Part

TOLERANCE, MOST = 1e-3, 100  # of the residual, relative to the value; products


def why_not(trainable) -> str:
    """Why the Hessians of members with these parameters are not measured, "" if they are."""
    if any(map(gather.is_divided, jax.tree.leaves(trainable))):
        return "parameters that are trained in full are divided over devices"
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(trainable)):
        return "method.dtype is not float32, in which an eigenvalue would be rounding"
    return ""


def measure(part: Part, trainable, batches: int, trained: list[int]) -> Largest:
    """Of the part's members at `trained`, over their first so many training batches. trainable: of
    all members, leaves (M, ...) on the host; those of members that diverged take no part."""
    stack, programs, m = part.stack, part.programs, len(part.stack.members)
    needed = programs.needed((m, *axes(stack.config.train, batches)))
    rows = train_batches(stack, part.group.task, 0, batches, needed)
    rows = programs.place_batches(rows)
    at = programs.place(trainable)
    own = flattened(masks(stack, part.group.base))
    mesh = gather.mesh_of(part.params)

    def product(vectors: np.ndarray) -> np.ndarray:
        every = np.zeros(own.shape, np.float32)
        every[trained] = vectors
        v = programs.place(like(every, trainable))
        with divided.on(mesh):
            moved = programs.hessian(part.params, part.constants, at, rows, v)
        return (own * flattened(jax.tree.map(lambda x: hosts.whole(x)[:m], moved)))[trained]

    start = own * np.random.default_rng(0).standard_normal(own.shape)
    return largest_eigenvalues(product, start[trained], TOLERANCE, MOST)


def masks(stack, base: Base) -> dict:
    """Trees like the stack's trainable with 1 where a member has a parameter of its own, 0 where it
    is padded. A padded pair of factors is a saddle of the loss, with eigenvalues of its own."""
    padded = {path: x.shape[1:] for path, x in tree.flatten(stack.state.trainable).items()}
    of_members = [_own(method, base, padded) for method in stack.methods]
    return tree.unflatten({path: np.stack([own[path] for own in of_members]) for path in padded})


def _own(method: methods.Method, base: Base, padded: dict) -> dict[str, np.ndarray]:
    shapes = {path: x.shape for path, x in tree.flatten(_described(method, base)).items()}
    active = {} if method.adapts is None else method.adapts(base.params, base.sites)
    masks = {}
    for path, room in padded.items():
        own = np.zeros(room, np.float32)
        if path in shapes:
            own[tuple(map(slice, shapes[path]))] = 1
        kernel, ranks = path.rpartition("/")[0], (method.hp.get("ranks") or {})
        if kernel in active:
            on = np.asarray(active[kernel][1], np.float32)
            own *= on.reshape(*on.shape, *(1,) * (own.ndim - on.ndim))
        if kernel in ranks and path.rpartition("/")[2] in "ab":
            rank = np.asarray(ranks[kernel])[..., None, None]
            along = -1 if path.endswith("/a") else -2
            order = np.arange(room[along]).reshape((-1, 1) if along == -2 else (1, -1))
            own *= order < rank
        masks[path] = own
    return masks


def _described(method: methods.Method, base: Base) -> dict:
    """The trainable tree of a member alone, as shapes."""
    if method.needs is not None:  # a start that reads no data has the same
        hp = methods.given(method.name, method.hp) | {"init": "kaiming"}
        method = methods.method(method.name, **hp)
    init = lambda params: method.init(jax.random.key(0), params, base.sites).trainable
    return jax.eval_shape(init, base.params)


def flattened(stacked) -> np.ndarray:
    """(M, P) of a tree with leaves (M, ...)."""
    flat = [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(stacked)]
    return np.concatenate(flat, axis=1)


def like(vectors: np.ndarray, stacked):
    """The tree like `stacked` of vectors (M, P); inverse of `flattened`."""
    shapes, treedef = jax.tree.flatten(stacked)
    ends = np.cumsum([x[0].size for x in shapes])
    parts = np.split(vectors, ends[:-1], axis=1)
    leaves = [part.reshape(x.shape) for part, x in zip(parts, shapes, strict=True)]
    return jax.tree.unflatten(treedef, leaves)
