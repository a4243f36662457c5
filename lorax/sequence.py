"""Tasks one after the other (`config.sequence`): train, merge, go on.

Every task has a run directory of its own, 1-NAME, 2-NAME... In the first one all members of the
sweep start from `config.base`. After each task every member is merged into the model that it began
with, and goes on from there alone: with its own base, rank, rate and seed. So from the second task
on each member is a group of its own. The frozen base is what members of a group share.

Every evaluation of every run measures all other tasks of the sequence too, as `eval.also` does:
those that are forgotten, and those still to come. So a task whose file is missing is refused before
the first one is trained. sequence.csv has the losses on every task after each.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lorax import config, hosts, rundir, search
from lorax.config import Member
from lorax.errors import reason
from lorax.together import End


def carry_out(settings: ConfigDict, workdir: Path, one: Callable[..., End]) -> End:
    """`train` for the command line; the `End` of the first run that does not come to its end."""
    ends = []

    def of_task(*arguments) -> bool:
        ends.append(one(*arguments))
        return ends[-1].code == 0

    try:
        train(settings, workdir, of_task)
    except (ValueError, OSError) as error:
        return End(2, reason(error), whole=False)
    if ends[-1].code == 0:
        print(f"Sequence     {workdir / rundir.SEQUENCE}")
    return ends[-1]


def train(settings: ConfigDict, workdir: Path, one: Callable) -> list:
    """Train the tasks of `config.sequence` in turn; what `one` returns for each.

    one(settings, members, run directory) trains a task, or continues it, or returns at once if it
    is finished; a result that is false ends the sequence. Members that diverged, or that tuning has
    stopped, do not go on. Raises ValueError for a sequence that can't be trained, before anything
    is.
    """
    _check(settings)
    made, at = [], None
    for number in range(len(settings.sequence)):
        of_task = stage(settings, number, at)
        members = search.members(of_task)
        made.append(one(of_task, members, folder(settings, workdir, number)))
        if not made[-1]:
            return made
        at = merged(members, folder(settings, workdir, number))
        if not at:
            print(f"{settings.sequence[number][0]}: no member is left to go on with")
            break
    from lorax.analysis import forgetting  # imports pandas, for which no refusal waits

    forgetting.sequence(workdir).to_csv(Path(workdir) / rundir.SEQUENCE, index=False)
    return made


def folder(settings: ConfigDict, workdir: Path, number: int) -> Path:
    """The run directory of a task, by its place in the sequence."""
    return Path(workdir) / f"{number + 1}-{settings.sequence[number][0]}"


def stage(
    settings: ConfigDict, number: int, at: list[tuple[Member, Path]] | None = None
) -> ConfigDict:
    """The config of the run on one task. at: the members that go on, and the folders of their
    merged models; None for the sweep itself, on `config.base`."""
    of_task = settings.copy_and_resolve_references()
    tasks = config.named_tasks(settings, "sequence")
    others = [pair for i, pair in enumerate(settings.sequence) if i != number]
    of_task.sequence = ()
    of_task.task.update(tasks[settings.sequence[number][0]])
    of_task.eval.also = (*settings.eval.also, *others)
    return of_task.lock() if at is None else _from_their_own(of_task, at)


def _from_their_own(of_task: ConfigDict, at: list[tuple[Member, Path]]) -> ConfigDict:
    """A config whose sweep is these members as they are, each on its own base."""
    points = [member.point for member, _ in at]
    axes = [axis for axis in dict.fromkeys(a for point in points for a in point) if axis != "base"]
    values = {
        axis: tuple(
            member.point.get(axis, config.flat(member.config)[config.key_of(axis)])
            for member, _ in at
        )
        for axis in axes
    }
    known = config.axes()
    of_task.sweep = config.default().sweep
    of_task.sweep.axes = {config.key_of(a): v for a, v in values.items() if a not in known}
    of_task.sweep.update({axis: v for axis, v in values.items() if axis in known})
    of_task.sweep.base = tuple(os.fspath(folder) for _, folder in at)
    of_task.sweep.zip = ((*axes, "base"),) if axes else ()
    return of_task.lock()


def merged(members: list[Member], directory: Path) -> list[tuple[Member, Path]]:
    """The finished members of a run, each with the folder of its merged model, which is written
    unless it is there."""
    results, found = rundir.read_status(directory).get("members", {}), []
    for member in members:
        if results.get(str(member.index), {}).get("status") != "finished":
            print(f"{directory.name}: {member.name} has no final model and does not go on")
            continue
        out = rundir.merged(directory, member.index)
        if not out.exists():
            _merge(member, rundir.adapter(directory, member.index), out)
        found.append((member, out.absolute()))
    return found


def _merge(member: Member, adapter: Path, out: Path) -> None:
    """Write a member's model with its update added, in `param_dtype`: rounding to fewer digits, as
    the files of a base may have, would lose small updates."""
    from lorax import adapters, models, tree  # import JAX

    trained = adapters.load(adapter, member.config.base)
    dtype = member.config.param_dtype
    dtypes = dict.fromkeys(tree.flatten(trained.base.params), dtype)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    models.save(temporary, trained.base.replace(params=trained.merge(dtypes).params), dtype)
    os.replace(temporary, out)


def _check(settings: ConfigDict) -> None:
    """Raises ValueError for a sequence that can't be trained."""
    config.named_tasks(settings, "sequence")
    if len(settings.sequence) < 2:
        raise ValueError(f"sequence: {settings.sequence} given, must name at least two tasks")
    if settings.search.threshold:
        raise ValueError("sequence: a search (search.threshold) has no members that could go on")
    if settings.quant or any(settings.sweep.quant):
        raise ValueError(
            "sequence: quant codes the base, which merging would decode; leave it None"
        )
    if hosts.are_many():
        raise ValueError("sequence: several processes train one run; start one process")
    for number in range(len(settings.sequence)):
        members = search.members(stage(settings, number))
    from lorax import methods  # imports JAX

    for member in {m.config.method.name: m for m in members}.values():
        name = member.config.method.name
        of = methods.method(name, **methods.given(name, member.config.method.to_dict()))
        if of.delta is None and of.factors is None:
            raise ValueError(
                f"sequence: method {name!r} does not change weights, so that no model "
                "can be merged to go on from"
            )
