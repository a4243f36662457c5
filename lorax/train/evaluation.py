"""Evaluates members on validation and test rows, and keeps what becomes of each test row.

Both splits are evaluated by one program (`batches.splits`). Members are evaluated on test rows
after the last step; what their files and metrics have for step 0 are the numbers of the base, which
all members share.

With `eval.also` every evaluation measures the members on further tasks too, and on the validation
rows of their own task how far they are from the base: KL(base || member), in nats a target. The
base is the same frozen parameters without an adapter. Its hidden states of these rows are computed
once for all members and steps (`states_of_base`), from which its logits are made again for a few
tokens at a time.
"""

from typing import NamedTuple

import jax
import numpy as np

from lorax import divided, gather, hosts, losses, rundir, tree
from lorax.files import atomically, remove
from lorax.interop.tensors import read_npz
from lorax.tasks import Task, scores
from lorax.train.batches import Evaluated

# Bytes up to which the base's states of the validation rows are kept on each device. The limit is
# one of shapes alone, so that a run that is continued elsewhere computes the same.
MOST_STATES = 512e6


class Measured(NamedTuple):
    """An evaluation of M members. losses, scores: (M,) and {metric: (M,)} float32."""

    losses: np.ndarray
    scores: dict[str, np.ndarray]


def evaluate(programs, arguments, m: int, task: Task, split: str, on: Evaluated):
    """(`Measured` of the first m members on the rows `on` of a split, `losses.Rows` with leaves
    (m, rows, ...), or None if the task has no test rows).

    arguments: parameters, constants and trainables on the devices.
    """
    labels = task.evaluated[split].get("label")
    if task.test is None:
        means, outputs = programs.evaluate(*arguments, on.batches)
        scored = {}
        if outputs is not None:
            scored = scores.of_members(task, _flat(outputs, m, on.rows), labels)
        return Measured(hosts.whole(means)[:m], scored), None
    rows = programs.rows(*arguments, on.batches, np.int32(on.n))
    rows = jax.tree.map(lambda x: _flat(x, m, on.rows), rows)
    return _measured(rows, task, labels), rows


def evaluate_rows(program, arguments, m: int, task: Task, on: Evaluated) -> Measured:
    """`Measured` of the first m members on the rows `on` of a further task, or of members that are
    changed. program: `Programs.also_rows` or `Programs.truncated_rows`."""
    rows = program(*arguments, on.batches, np.int32(on.n))
    rows = jax.tree.map(lambda x: _flat(x, m, on.rows), rows)
    return _measured(rows, task, task.eval.get("label"))


def compare(programs, arguments, m: int, task: Task, on: Evaluated, states):
    """(`Measured` of the first m members on the validation rows `on`, their KL(base || member) (m,)
    float32, in nats a target). states: as for `step.compared_rows`."""
    rows = programs.compared_rows(*arguments, on.batches, np.int32(on.n), states)
    rows = jax.tree.map(lambda x: _flat(x, m, on.rows), rows)
    return _measured(rows, task, task.eval.get("label")), _mean(rows.kl, rows)


def kept_states(base_states, params, batches, n: int) -> int:
    """Bytes of the base's states of the first n batches that a run which compares members with the
    base keeps on each device; 0 if they are larger than `MOST_STATES`. base_states: as in
    `Programs`. params, batches: arrays or shapes."""
    size = tree.nbytes(jax.eval_shape(lambda *given: base_states(*given, n), params, batches))
    return size if size <= MOST_STATES else 0


def states_of_base(programs, params, on: Evaluated):
    """`step.base_states` of the rows `on`, on the devices of the members; None if they are not kept
    (`kept_states`)."""
    if not kept_states(programs.base_states, params, on.batches, on.n):
        return None
    of_rows = lambda *arguments: programs.base_states(*arguments, on.n)
    return programs.place_rows(_by_base(of_rows, params, on.batches))


def of_base(programs, params, task: Task, on: Evaluated) -> tuple[Measured, losses.Rows]:
    """`evaluate` of the base on the test rows `on`, as a single member. params: on the devices."""
    n = np.int32(on.n)
    rows = _by_base(lambda *arguments: programs.base_rows(*arguments, n), params, on.batches)
    rows = jax.tree.map(lambda x: _flat(x[None], 1, on.rows), rows)
    return _measured(rows, task, task.test.get("label")), rows


def _by_base(program, *arguments):
    """program(parameters of the base, batches), both on the devices."""
    mesh = gather.mesh_of(arguments[0])
    if mesh is None:  # each device has all of the base, and one is enough
        arguments = jax.tree.map(lambda x: x.addressable_shards[0].data, arguments)
    with divided.on(mesh):
        return program(*arguments)


def of_each(base: tuple[Measured, losses.Rows], m: int) -> tuple[Measured, losses.Rows]:
    """`of_base` as the evaluation of m members."""
    return jax.tree.map(lambda x: np.repeat(x, m, axis=0), base)


def _measured(rows: losses.Rows, task: Task, labels) -> Measured:
    """Means over rows, leaves (M, rows, ...). labels: (rows, ...), or None."""
    scored = {} if rows.outputs is None else scores.of_members(task, rows.outputs, labels)
    if scores.has_token_accuracy(task):
        scored[scores.TOKEN_ACCURACY] = _mean(rows.right, rows)
    return Measured(_mean(rows.loss, rows), scored)


def _mean(x, rows: losses.Rows) -> np.ndarray:
    """(M,) float32, the mean over targets of sums over the targets of rows, (M, rows)."""
    weight = rows.weight.sum(axis=1, dtype=np.float64)
    return (x.sum(axis=1, dtype=np.float64) / weight).astype(np.float32)


def _flat(x, m: int, rows: int) -> np.ndarray:
    """(m, rows, ...) of an evaluation's (M, N, B, ...)."""
    return hosts.whole(x)[:m].reshape(m, -1, *x.shape[3:])[:, :rows]


# ------------------------------------------------------------------------------ files of test rows


def write_start(workdir, members, rows: losses.Rows) -> None:
    """Write the files of the members' test rows at step 0, before they are trained."""
    for i, member in enumerate(members):
        arrays = {"start": rows.loss[i], "weight": rows.weight[i]}
        if rows.right is not None:
            arrays["start_score"] = rows.right[i]
        _write(rundir.rows(workdir, member.index), arrays)


def write_end(workdir, members, rows: losses.Rows, diverged: np.ndarray) -> None:
    """Add the numbers after training to the files. diverged: (M,) bool; a member that diverged has
    no file."""
    if not hosts.first():  # which has the files to add to
        return
    for i, member in enumerate(members):
        file = rundir.rows(workdir, member.index)
        if diverged[i]:
            remove(file)
            continue
        arrays = read_npz(file) | {"loss": rows.loss[i]}
        if rows.right is not None:
            arrays["score"] = rows.right[i]
        _write(file, arrays)


def _write(file, arrays: dict[str, np.ndarray]) -> None:
    """Write float32 arrays as an .npz file."""
    arrays = {name: np.asarray(x, np.float32) for name, x in sorted(arrays.items())}

    def write(temporary):
        with open(temporary, "wb") as out:  # a name without .npz would get it added
            np.savez(out, **arrays)

    atomically(file, write)
