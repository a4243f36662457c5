"""Initialisation, targets and ranks that are chosen from a member's first training batches."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather, methods, ops, sharding, tasks, tree
from lorax.config import seed_of
from lorax.methods import sensitivity, starts
from lorax.models import Base, unread

BATCHES = 8  # read for evidence, unless `method.batches` is set
AUTO = "auto"


def read(member, base: Base, task: tasks.Task, paths, kind: str, seen: dict) -> dict:
    """{path: {kind: array}} (`sensitivity.evidence`) from the member's own first batches,
    in shuffled order even if training groups rows by length.

    seen: cache of the evidence that earlier members have read; new evidence is added.
    """
    c, paths = member.config, tuple(paths)
    n, size = c.method.batches or BATCHES, c.train.batch_size
    rows = tasks.train_size(c.task, task)
    seed = seed_of(c, "order")
    key = (id(base), id(task), kind, seed, rows, n, size, paths)
    if key not in seen and kind == "residual":
        seen[key] = residual(base, c.base, paths)
    elif key not in seen:
        order = tasks.orders(rows, size, seed, range(n)).reshape(n, size)
        batches = {name: x[order] for name, x in task.train.items()}
        seen[key] = sensitivity.evidence(base, task.kind, batches, paths, (kind,))
    return seen[key]


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """The quantisation error of a kernel, (layers..., in, out) float32, a layer computed when it is
    read (`gather.layer`). plain, coded: the kernel before and after."""

    plain: object
    coded: object
    site: ops.Site

    @property
    def shape(self) -> tuple[int, ...]:
        axes, n_in, n_out = self.site.matrix_shape(self.coded.shape)
        return (*axes, n_in, n_out)

    def read(self, index: tuple[slice, ...]) -> jax.Array:
        """The error of one layer. index: a slice for each axis, of length 1 for those of layers."""
        layer = tuple(part.start for part in index[: self.site.stack])
        wide = lambda leaf: gather.matrix(leaf, self.site, layer).astype(jnp.float32)
        return wide(self.plain) - wide(self.coded)


def residual(base: Base, name: str, paths) -> dict:
    """{path: {"residual": `Residual`}}: the quantisation error of the base, the weights of
    `lorax.load(name)` minus the quantised ones. Raises ValueError if nothing is quantised."""
    mesh = gather.mesh_of(base.params)
    place = mesh and (lambda shapes, sites: sharding.shardings(shapes, sites, mesh))
    plain = tree.flatten(unread(name, place=place).params)
    residuals, coded = {}, tree.flatten(base.params)
    for path in paths:
        site = base.sites[path]
        if not ops.is_operator(coded[path]) or ops.is_operator(plain[path]):
            raise ValueError(
                f"method.init: 'loftq' starts from the quantisation error of {path}: set quant, "
                "and give a base that is not quantised yet"
            )
        residuals[path] = {"residual": Residual(plain[path], coded[path], site)}
    return residuals


def is_automatic(member, hp: Mapping) -> bool:
    """Whether targets or ranks are to be chosen from evidence: "auto:N" or rank "auto".

    Raises ValueError for a malformed word, a method with one rank for all its matrices, and
    rank "auto" without a budget.
    """
    name, auto = member.config.method.name, hp.get("rank") == AUTO
    if not auto and not _automatic(hp):
        return False
    if "ranks" not in methods.hyperparameters(name):
        field = "rank" if auto else "targets"
        able = [known for known in methods.METHODS if "ranks" in methods.hyperparameters(known)]
        raise ValueError(f"method.{field}: {name} can't leave it to evidence; {', '.join(able)} do")
    if auto and member.config.method.budget is None:
        raise ValueError("method.budget: needed with method.rank='auto', in trainable parameters")
    return True


def decide(member, hp: Mapping, base: Base, task: tasks.Task, seen: dict) -> tuple[dict, list]:
    """(hp with targets, rank and ranks filled in, the ranking as rows of analysis/sensitivity.csv).

    targets ("auto:N", words...): among all matrices that the words select (without words:
    all-linear) the N with the largest `sensitivity.Matrix.score`, as far as they fit in
    `method.budget`, a number of trainable parameters. Each layer's matrix counts separately.
    rank "auto": a rank for each matrix, such that together they use `method.budget`: takes the
    directions with the largest worth per parameter, from each matrix at most twice as many as if
    all had the same rank. That common rank sets the scale. The worth of a direction is a squared
    singular value of the gradient; with init "eva" a share of the inputs' variance, as in EVA. The
    ranking is then for rank 1.

    Raises ValueError for a budget that is too small.
    """
    n, budget, layers = _automatic(hp), member.config.method.budget, hp.get("layers")
    words = hp.get("targets") or methods.method(member.config.method.name).hp["targets"]
    words = tuple(w for w in words if not w.startswith(f"{AUTO}:")) or ("all-linear",)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    known = None if hp["rank"] == AUTO else hp["rank"]
    adaptable = methods.adapted_matrices(base.params, base.sites, words, layers, known)
    active = {
        (path, i) for path, (_, on) in adaptable.items() for i in np.ndindex(on.shape) if on[i]
    }
    cost = {m: sum(adaptable[m[0]][0].matrix_shape(shapes[m[0]])[1:]) for m in sorted(active)}

    gradient = read(member, base, task, adaptable, "gradient", seen)
    rank = known or _even(budget, list(cost.values()), n)
    ranking = [
        m
        for m in sensitivity.rank_matrices(gradient, rank if known else 1)
        if (m.path, m.index) in active
    ]
    chosen = dict.fromkeys(cost, rank)
    if n:
        try:
            chosen = sensitivity.choose(ranking, rank if known else 1, n, budget)
        except ValueError:
            least = min(m.parameters for m in ranking)
            raise ValueError(f"method.budget: {budget} given, one matrix takes {least}") from None
    if known is None:
        worth = _worth(member, hp, base, task, adaptable, gradient, seen)
        worth = {m: worth[m] for m, r in chosen.items() if r}
        chosen |= starts.allot(worth, cost, budget, most=round(starts.RHO * rank))
    everything = {(m, i): 0 for m, (_, on) in adaptable.items() for i in np.ndindex(on.shape)}
    ranks = starts.by_path(everything | chosen)
    decided = dict(hp) | {"rank": rank, "ranks": ranks}
    decided["targets"] = tuple(f"re:{re.escape(path)}" for path in ranks)
    return decided, _rows(ranking, chosen, base)


def _even(budget: int, costs: list[int], n: int) -> int:
    """The common rank at which n matrices of mean cost, or all (n = 0), use up the budget."""
    least = min(n or len(costs), len(costs)) * sum(costs) / len(costs)
    if budget < least:
        raise ValueError(f"method.budget: {budget} given, rank 1 takes {least:.0f}")
    return int(budget // least)


def _worth(member, hp, base, task, adaptable, gradient, seen) -> dict:
    if hp.get("init") == "eva":
        return starts.explained(read(member, base, task, adaptable, "moments", seen))
    return sensitivity.spectra(gradient)


def _automatic(hp: Mapping) -> int:
    """N of the word "auto:N" among the targets, 0 without it."""
    words = [w for w in hp.get("targets", ()) if w.partition(":")[0] == AUTO]
    if not words:
        return 0
    number = words[0].partition(":")[2]
    if len(words) > 1 or not number.isdigit() or int(number) < 1:
        raise ValueError(
            f"method.targets: {', '.join(words)} given; 'auto:6' takes the 6 matrices that "
            "matter most, 'auto:6' with 'attention' the 6 among those of attention"
        )
    return int(number)


def _rows(ranking, chosen, base: Base) -> list[dict]:
    names = {}
    for path in {m.path for m in ranking}:
        for name, index in base.layers_of(path).items():
            names[path, index] = name
    return [
        {
            "path": names[m.path, m.index],
            "energy": m.energy,
            "share": m.share,
            "score": m.score,
            "rank": int(chosen[m.path, m.index]),
        }
        for m in ranking
    ]
