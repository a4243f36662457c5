"""`convert shrink`: an adapter that keeps the leading singular directions of its updates.

    s a b = u diag(sigma) v^T   ->   a = u_k sqrt(sigma_k), b = sqrt(sigma_k) v_k^T, s = 1

The first k directions are the best approximation of rank k (Eckart & Young 1936); what is lost is
the norm of the other singular values. Every layer has its own k. DoRA keeps its column lengths, and
parameters that were trained in full stay.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax import rundir, spectrum
from lorax.interop.adapter import Adapter, Factors
from lorax.interop.formats import Update
from lorax.xray import defects, keeping
from lorax.xray.measured import measure

if TYPE_CHECKING:
    from lorax.adapters import Trained  # which loads JAX

SVDs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # by layer: u, sigma, vt; float64


class Shrunk(NamedTuple):
    """adapter: the smaller one. ranks: {layer: (before, after)}. errors: {layer: norm of what is
    left out of dW over the norm of dW}; error: the same of all layers together. loss: (before,
    after) on validation rows, None if it was not asked for."""

    adapter: Adapter
    ranks: dict[str, tuple[int, int]]
    errors: dict[str, float]
    error: float
    loss: tuple[float, float] | None = None


def shrink(trained: "Trained", how) -> Shrunk:
    """The smaller adapter. how: has `energy`, `rank`, `error` and `loss`, one of them not None, and
    for `loss` `adapter`, the adapter's path, and `run`, a run directory or None.

    Raises ValueError for a number out of range, a method without factors, an adapter that changes
    nothing and a run whose rows can't be taken.
    """
    adapter = trained.adapter
    if adapter is None:
        raise ValueError(f"{trained.name} has no low-rank factors to shrink")
    check(how)
    if how.loss is not None:
        loss_of = _loss_of(trained, _run_of(how.adapter, how.run))
    layers = {layer: f for layer, f in adapter.factors.items() if f.a.shape[1]}
    svds = {layer: spectrum.factor_svd(f.a, f.b, f.s) for layer, f in layers.items()}
    if not any(sigma.any() for _, sigma, _ in svds.values()):
        raise ValueError(f"nothing to shrink: {adapter.idle() or 'every update is 0'}")
    losses = None
    if how.loss is not None:
        ranks, losses = within(svds, functools.partial(loss_of, svds), how.loss)
    else:
        shapes = {layer: (len(u), vt.shape[1]) for layer, (u, _, vt) in svds.items()}
        ranks = kept_ranks({layer: sigma for layer, (_, sigma, _) in svds.items()}, shapes, how)
    if adapter.has_lengths:  # PEFT has no DoRA of rank 0
        ranks = {layer: max(1, k) for layer, k in ranks.items()}
    return cut(adapter, svds, ranks)._replace(loss=losses)


def check(how) -> None:
    """Raises ValueError for a number of `how` that is out of range."""
    checked = {
        "energy": (0, 1, "a share, above 0 and at most 1"),
        "rank": (0, np.inf, "at least 1"),
        "error": (0, 1, "a relative error, above 0 and at most 1"),
        "loss": (0, np.inf, "nats, above 0"),
    }
    for name, (low, high, right) in checked.items():
        value = getattr(how, name, None)
        if value is not None and not low < value <= high:
            raise ValueError(f"--{name}: {value:g} given, must be {right}")


def kept_ranks(
    sigmas: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], how
) -> dict[str, int]:
    """{layer: how many directions to keep}; all that are not rounding if `how` has no number."""
    if how.energy is not None:
        energy_rank = lambda sigma: int(spectrum.energy_rank(sigma, how.energy))
        return {layer: energy_rank(sigma) for layer, sigma in sigmas.items()}
    if how.error is not None:
        return keeping.within(sigmas, how.error)
    most = np.inf if how.rank is None else how.rank
    numerical = lambda layer, sigma: int(spectrum.numerical_rank(sigma, shapes[layer]))
    return {layer: min(most, numerical(layer, sigma)) for layer, sigma in sigmas.items()}


def shrink_file(updates: Sequence[Update], how) -> Shrunk:
    """The smaller version of the updates in a file, without its base, a matrix at a time. how: as
    for `shrink`, without `loss`, and checked.

    Raises ValueError for numbers that are not finite, and if all is 0.
    """
    measured = {one.update.layer: one for one in measure(updates)}
    if bad := [layer for layer, one in measured.items() if one.bad]:
        raise ValueError(f"{defects.named(bad)}: NaN or infinite numbers")
    sigmas = {layer: one.sigma for layer, one in measured.items()}
    if not any(sigma.any() for sigma in sigmas.values()):
        raise ValueError("nothing to shrink: every update is 0")
    shapes = {layer: one.update.shape for layer, one in measured.items()}
    ranks = kept_ranks(sigmas, shapes, how)
    if any("DoRA" in update.kind for update in updates):  # PEFT has no DoRA of rank 0
        ranks = {layer: max(1, k) for layer, k in ranks.items()}
    factors = dict(_cut_each(updates, ranks))
    before = {layer: one.update.rank for layer, one in measured.items()}
    errors = {layer: keeping.error_of({layer: sigmas[layer]}, ranks) for layer in sigmas}
    changed = {layer: (before[layer], ranks[layer]) for layer in sigmas}
    return Shrunk(Adapter(factors, {}, {}), changed, errors, keeping.error_of(sigmas, ranks))


def smaller_updates(updates: Sequence[Update], factors: Mapping[str, Factors]) -> list[Update]:
    """The updates with these factors in their place, without those that have none. What is DoRA
    stays what it is, as its lengths are kept."""
    made = []
    for update in updates:
        if (one := factors.get(update.layer)) is not None:
            kind = update.kind if "DoRA" in update.kind else "LoRA"
            read = functools.partial(_itself, one)
            about = {"kind": kind, "rank": one.a.shape[1], "scale": one.s, "dtype": "F32"}
            made.append(update._replace(**about, source="of a smaller one", read=read))
    return made


def empty(updates: Sequence[Update]) -> list[Update]:
    """Smaller versions of the updates that are 0, to see if a format holds them."""
    factors = {}
    for update in updates:
        a, b = (
            np.zeros(shape, np.float32) for shape in ((update.shape[0], 1), (1, update.shape[1]))
        )
        m = np.ones(update.shape[1], np.float32) if update.kind == "DoRA" else None
        factors[update.layer] = Factors(a, b, 1.0, m)
    return smaller_updates(updates, factors)


def _itself(x):
    return x


def _cut_each(updates: Sequence[Update], ranks: Mapping[str, int]) -> Iterator[tuple[str, Factors]]:
    """(layer, its leading directions) of the layers that keep some."""
    for update in updates:
        if k := ranks[update.layer]:
            given = update.read()
            of_factors = isinstance(given, Factors)
            svd = spectrum.update_svd(tuple(given[:3]) if of_factors else given)
            yield update.layer, _factors(*svd, k, given.m if of_factors else None)


def cut(adapter: Adapter, svds: SVDs, ranks: Mapping[str, int]) -> Shrunk:
    """The adapter with so many directions of each layer; layers of rank 0 are left out."""
    factors = {k: f for k, f in adapter.factors.items() if not f.a.shape[1]}  # DoRA's lengths alone
    left, whole, errors, changed = 0.0, 0.0, {}, {}
    for layer, (u, sigma, vt) in svds.items():
        k, squares = ranks[layer], sigma**2
        if k:
            factors[layer] = _factors(u, sigma, vt, k, adapter.factors[layer].m)
        left, whole = left + squares[k:].sum(), whole + squares.sum()
        errors[layer] = float(np.sqrt(squares[k:].sum() / squares.sum())) if squares.any() else 0.0
        changed[layer] = adapter.factors[layer].a.shape[1], k
    in_order = {layer: factors[layer] for layer in adapter.factors if layer in factors}
    smaller = adapter._replace(factors=in_order)
    return Shrunk(smaller, changed, errors, float(np.sqrt(left / whole)))


def _factors(u, sigma, vt, k: int, m) -> Factors:
    half = np.sqrt(sigma[:k])
    a, b = u[:, :k] * half, half[:, None] * vt[:k]
    return Factors(a.astype(np.float32), b.astype(np.float32), 1.0, m)


def _rank(svd) -> int:
    u, sigma, vt = svd
    return int(spectrum.numerical_rank(sigma, (u.shape[0], vt.shape[1])))


def within(svds: SVDs, loss_of: Callable, margin: float) -> tuple[dict, tuple[float, float]]:
    """({layer: rank}, (loss before, after)) of the fewest directions, the largest of all, that lose
    at most `margin`; found by bisection, which takes the loss to fall with the directions.
    loss_of({layer: rank}) -> the loss."""
    sigmas = {layer: sigma for layer, (_, sigma, _) in svds.items()}
    few, many = 0, sum(map(_rank, svds.values()))
    ranks = keeping.largest(sigmas, many)
    before = after = loss_of(ranks)
    while many - few > 1:
        middle = (few + many) // 2
        tried = keeping.largest(sigmas, middle)
        loss = loss_of(tried)
        if loss - before <= margin:
            many, ranks, after = middle, tried, loss
        else:
            few = middle
    return ranks, (before, after)


def _run_of(adapter: str, run: str | None) -> Path:
    """The directory of the run whose validation rows are used. Raises ValueError without one."""
    directory = Path(run) if run else Path(adapter).resolve().parent.parent
    if not rundir.is_run(directory):
        if run:
            raise ValueError(f"--run: {run} is no run directory")
        raise ValueError(
            f"--loss: {adapter} lies in no run directory; name a run with its task by --run"
        )
    return directory


def _loss_of(trained: "Trained", run: Path) -> Callable:
    """f(svds, {layer: rank}) -> the loss on the run's validation rows with so many directions."""
    import jax

    from lorax import adapters, tasks
    from lorax.config import key_of, swept
    from lorax.train.batches import eval_batches

    config = rundir.read_config(run)["config"]
    moved = [key_of(axis) for axis in swept(config["sweep"])]
    moved = [key for key in moved if key.startswith("task.") and key != "task.n_train"]
    if moved:
        raise ValueError(f"--loss: {run} sweeps {', '.join(moved)}: its members differ in rows")
    base, evaluation = trained.base, config["eval"]
    sizes = config["train"]["seq_len"], evaluation["examples"]
    tasks.check_base(config["task"], base, sizes[0])
    task = tasks.build(config["task"], base.vocabulary, *sizes, base, test=evaluation["test"])
    batches = eval_batches(task, evaluation["batch_size"])

    @jax.jit
    def sums(params, batch):
        rows = task.kind.rows(base.module, params, batch)
        return rows.loss.sum(), rows.weight.sum()

    def loss_of(svds: SVDs, ranks: Mapping[str, int]) -> float:
        kept = {}
        for layer, (u, sigma, vt) in svds.items():  # of one shape for all ranks: compiled once
            kept_sigma = np.where(np.arange(len(sigma)) < ranks[layer], sigma, 0)
            m = trained.adapter.factors[layer].m
            kept[layer] = _factors(u, kept_sigma, vt, len(sigma), m)
        bound = adapters.bind(
            base, trained.adapter._replace(factors=trained.adapter.factors | kept)
        )
        every = range(len(jax.tree.leaves(batches)[0]))
        totals = [sums(bound, jax.tree.map(lambda x, i=i: x[i], batches)) for i in every]
        loss, weight = np.sum(np.array(totals, np.float64), axis=0)
        return float(loss / weight)

    return loss_of


def lines(found: Shrunk) -> list[str]:
    """A line for each layer, and for the loss."""
    said = [
        f"{layer}: rank {before} -> {after}, relative error {found.errors[layer]:.3g}"
        for layer, (before, after) in found.ranks.items()
    ]
    if found.loss is not None:
        before, after = found.loss
        said.append(f"validation loss {before:.5g} -> {after:.5g} ({after - before:+.2g})")
    if found.adapter.has_lengths:
        said.append("DoRA: the columns' lengths stay, and errors are those of the low-rank part")
    return said


def summary(found: Shrunk) -> str:
    """The sizes before and after, and the error of all layers together."""
    before, after = (sum(pair[i] for pair in found.ranks.values()) for i in (0, 1))
    return (
        f"{after} of {before} directions in {len(found.adapter.factors)} of {len(found.ranks)} "
        f"matrices; relative error {found.error:.3g} of all together"
    )
