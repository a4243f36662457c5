"""From members to groups: loads bases and tasks, checks and initialises every member."""

import contextlib
import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import jax

from lorax import quant, sharding, tasks, tree
from lorax.config import Member, also, grouped, key_of, with_n_steps
from lorax.errors import nearest
from lorax.methods import prefix
from lorax.models import Base, load
from lorax.models.load import skeleton
from lorax.tasks import kinds, scores
from lorax.train import activations, benchmarks, evidence, fitting, pictures, stacks, texts


class Group(NamedTuple):
    """Members that share a compiled program, with their base and task.

    stack: those that are trained here, not drawn yet (`drawn`). members, methods: of all. pad: to
    the widest of these. rankings: {member: rows of `evidence.decide`}, for members whose targets or
    ranks it chose. also: {name: task} of `eval.also`, without test rows.
    """

    index: int
    base: Base
    task: tasks.Task
    stack: stacks.Stack
    members: tuple[Member, ...]
    methods: tuple[stacks.Method, ...]
    pad: stacks.Padding
    rankings: dict[int, list[dict]] = {}
    also: dict[str, tasks.Task] = {}

    @property
    def config(self):
        """The config of the first member; the others differ only in values passed as data."""
        return self.stack.config

    @property
    def compares(self) -> bool:
        """Whether evaluations have the KL from the base: with `eval.also`, if the model gives
        probabilities."""
        return bool(self.also) and kinds.has_probabilities(self.task.kind, self.task.eval)


def drawn(group: Group, stack: stacks.Stack) -> stacks.Stack:
    """Some members of a group with the arrays that they start from. stack: theirs, as shapes."""
    return stacks.stack(stack.members, stack.methods, group.base, group.pad, group.task)


class Loaded(NamedTuple):
    """Bases and tasks that are loaded already; the rounds of a run share them."""

    bases: dict[str, Base]
    tasks: dict[str, tasks.Task]


def groups(
    members: list[Member],
    say: Callable[[str], None],
    first: int = 0,
    loaded: Loaded | None = None,
) -> list[Group]:
    """Load bases and tasks, and check every member against its base; none of them is drawn yet.

    first: number of the first group. loaded: cache of bases and tasks; new ones are added to it.
    Members with `train.epochs` get their steps. Raises ValueError, FileNotFoundError or MemoryError
    for mistakes that a user can fix, before anything is trained.
    """
    loaded = loaded or Loaded({}, {})
    say = functools.cache(say)  # groups with the same base or task say the same about it
    members = with_steps(
        members, lambda c: _base(c, len(members), loaded.bases, say), loaded.tasks, say
    )
    made = [group_of(i, part, loaded, say) for i, part in enumerate(grouped(members), first)]
    for line in idle(made):
        say(line)
    return made


def with_steps(
    members: list[Member], base_of: Callable, built: dict[str, tasks.Task], say: Callable
) -> list[Member]:
    """The members with the steps that their `train.epochs` makes of the rows; others as they are.

    base_of(config) -> the base that the rows are built with. built: as `Loaded.tasks`.
    """
    known = {}
    for part in grouped(m for m in members if m.config.train.epochs):
        c = part[0].config
        base = base_of(c)
        tasks.check_base(c.task, base, c.train.seq_len)
        task = task_of(part, base, built, say)
        for member in part:
            rows, t = tasks.train_size(member.config.task, task), member.config.train
            steps = tasks.steps_of(t.epochs, rows, t.batch_size, t.last_batch)
            known[member.index] = with_n_steps(member, steps)
            say(
                f"train.epochs: {t.epochs:g} over {rows:,} rows in batches of {t.batch_size}: "
                f"{steps:,} steps"
            )
    return [known.get(member.index, member) for member in members]


def members_of(groups: list[Group]) -> list[Member]:
    """The members of groups, in the order of their numbers."""
    members = (member for group in groups for member in group.members)
    return sorted(members, key=lambda member: member.index)


def group_of(index: int, members: list[Member], loaded: Loaded, say: Callable) -> Group:
    """One group: load, check, and describe its members."""
    c = members[0].config
    base = _base(c, len(members), loaded.bases, say)
    tasks.check_base(c.task, base, c.train.seq_len)
    activations.check(base, c.analysis.cka)
    hps = {member.index: stacks.hyperparameters(member, base) for member in members}
    automatic = [m for m in members if evidence.is_automatic(m, hps[m.index])]
    stacks.build_methods([m for m in members if m not in automatic], base)  # raises on mistakes

    task = task_of(members, base, loaded.tasks, say)
    if c.train.label_smoothing and not kinds.has_probabilities(task.kind, task.eval):
        raise ValueError(
            f"train.label_smoothing: {c.train.label_smoothing:g} given, but task {c.task.name} has "
            "values, not classes; it must be 0"
        )
    also = also_of(c, task, base, loaded.tasks, say)
    if automatic:
        say(f"group {index}: choosing targets and ranks of {len(automatic)} members")
    rankings, seen = {}, {}
    for member in automatic:
        decided = evidence.decide(member, hps[member.index], base, task, seen)
        hps[member.index], rankings[member.index] = decided
    built = stacks.build_methods(members, base, hps)
    pad = stacks.padding(built, base)
    one = stacks.rehearse(members, built, base, pad, task, seen)
    stack = stacks.described(members, built, one)
    group = Group(index, base, task, stack, tuple(members), tuple(built), pad, rankings, also)

    if line := stacks.made_whole(group.stack, base):
        say(f"group {index}: {line}")
    # Catch errors that would otherwise show only after training.
    check_positions(group)
    if tasks.prompts(task, c.eval.generate):
        texts.check_texts(base, task, c.eval, virtual_tokens(group), say)
    pictures.check(base, task, c.eval, say)
    if c.eval.harness:
        benchmarks.check(base, c.eval.harness)
    if c.analysis.cka:
        constants, _, state = group.stack.one
        arguments = state.trainable, constants, task, c.analysis.cka, c.eval.batch_size
        activations.rehearse(base, built[0], *arguments)
    return group


def base_settings(c) -> dict:
    """The arguments of `load`, besides the name, for a config."""
    labels = tasks.outputs(c.task)
    settings = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    settings |= {"head": "classification", "labels": labels} if labels else {}
    # Not every family has a remat setting.
    return settings | ({} if c.train.remat == "none" else {"remat": c.train.remat})


def _base(c, n_members: int, bases: dict[str, Base], say: Callable) -> Base:
    """The base of a config, quantised if it says so, and divided over a mesh if it says so or if it
    would not fit on a device; from `bases`, or loaded and added to it. n_members: that train it."""
    key = _base_key(c)
    if key in bases:
        return bases[key]
    mesh = fitting.base_mesh(c, lambda: _described(c), n_members)
    place = mesh and functools.partial(sharding.shardings, mesh=mesh)
    coded = {"quant": c.quant, "double_quant": c.double_quant}
    base = load(c.base, **base_settings(c), place=place, **coded)
    if c.quant:
        placed = quant.placed(base.params, jax.local_devices()[0], c.dtype)
        base = base.replace(params=placed)
    bases[key] = base
    size = f"{tree.count(base.params):,} parameters, {tree.nbytes(base.params) / 1e6:.1f} MB"
    say(f"base {c.base}: {base.family}, {size}")
    if base.fresh:
        fresh = ", ".join(base.fresh)
        say(f"base {c.base}: no weights for {fresh}: initialised at random and trained")
    for note in base.traits.notes:
        say(f"base {c.base}: {note}")
    return base


def _described(c) -> Base:
    """The base of a config with the shapes of its parameters, quantised if it says so."""
    base = skeleton(c.base, **base_settings(c))
    if not c.quant:
        return base
    coded = functools.partial(_coded, c, base.sites)
    return base.replace(params=jax.eval_shape(coded, base.params))


def _coded(c, sites, params) -> dict:
    return quant.quantize(params, c.quant, c.double_quant, sites=sites)


def _base_key(c) -> str:
    return json.dumps([c.base, base_settings(c), c.quant, c.double_quant, c.train.mesh])


def task_of(members: list[Member], base: Base, built: dict[str, tasks.Task], say) -> tasks.Task:
    """The task of members that may differ in `task.n_train`; from `built`, or built and added."""
    c = members[0].config
    reads_text = tasks.kind_of(c.task).reads == "tokens"
    if reads_text and base.vocabulary is None:
        raise ValueError(f"base: {c.base} has no tokenizer.json, which task {c.task.name} needs")
    asked = [member.config.task.n_train for member in members]
    settings = c.task.to_dict() | {"n_train": None if None in asked else max(asked)}
    own, generates = c.eval.score, c.eval.generate > 0
    key = _rows_key(c, settings, reads_text, c.seeds.data, own, generates)
    if key not in built:
        arguments = base.vocabulary, c.train.seq_len, c.eval.examples, base
        task = tasks.build(settings, *arguments, c.seeds.data, c.eval.test)
        generates = bool(tasks.prompts(task, c.eval.generate))
        built[key] = scores.with_own(task, own, generates) if own else task
        say(f"task {built[key].note}")
        if c.eval.generate and not generates:
            say(f"eval.generate: task {c.task.name} has no prompts, so no texts are generated")
    for member in members:
        tasks.train_size(member.config.task, built[key])  # raises if there are too few
    return built[key]


def also_of(
    c, task: tasks.Task, base: Base, built: dict[str, tasks.Task], say
) -> dict[str, tasks.Task]:
    """{name: task} of `eval.also`, from `built`, or built and added; each has the validation rows
    that a run on it has, and no others. Raises ValueError or FileNotFoundError for one that a model
    of `task` can't be evaluated on."""
    found = {}
    for name, settings in also(c).items():
        with _naming(name):
            found[name] = _further(c, settings, task, base, built)
        say(f"eval.also {name}: {found[name].note}")
    if found and not kinds.has_probabilities(task.kind, task.eval):
        say(f"eval.also: no KL from the base: task {c.task.name} has values, not classes")
    return found


def check_also(c, base: Base) -> None:
    """Raises ValueError for a task of `eval.also` that a model of the run's own can't be evaluated
    on, as far as that shows before it is built."""
    for name, settings in also(c).items():
        with _naming(name):
            _check_further(c, settings, base)


@contextlib.contextmanager
def _naming(name: str):
    """Context whose errors say which task of `eval.also` they are about."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"eval.also: {name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"eval.also: {name}: {error}") from None


def _further(
    c, settings: dict, task: tasks.Task, base: Base, built: dict[str, tasks.Task]
) -> tasks.Task:
    """A task of `eval.also`. settings: its `config.task`."""
    name, kind = settings["name"], _check_further(c, settings, base)
    if settings["n_train"] is None and kind is not kinds.STRINGS:
        settings = settings | {"n_train": 1}  # none is read
    key = _rows_key(c, settings, task.kind.reads == "tokens", "also")
    if key not in built:
        arguments = base.vocabulary, c.train.seq_len, c.eval.examples, base
        built[key] = tasks.build(settings, *arguments, test=c.eval.test)._replace(test=None)
    further = built[key]
    if further.outputs != task.outputs:
        right = f"{further.outputs} outputs, and the model of {c.task.name!r} {task.outputs}"
        raise ValueError(f"task {name!r} has {right}")
    sets = (task.kind, task.eval), (further.kind, further.eval)
    if task.pictures and further.pictures.schedule != task.pictures.schedule:
        predicted = [x.pictures.schedule.prediction for x in (further, task)]
        raise ValueError(
            f"a model predicts {predicted[0]} for task {name!r}, and {predicted[1]} for the run's "
            "own; give both the same task.prediction"
        )
    if len({kinds.has_probabilities(*of_rows) for of_rows in sets}) > 1:
        raise ValueError(f"one of the tasks {name!r} and {c.task.name!r} has values, not classes")
    return further


def _check_further(c, settings: dict, base: Base) -> kinds.Kind:
    """The kind of a task of `eval.also`, which is not built. Raises ValueError if the model can't
    read its rows, or the run's program does not measure them. settings: its `config.task`."""
    kind, own = tasks.kind_of(settings), tasks.kind_of(c.task)
    reads = lambda kind: (kind.reads, kind.causal)
    if reads(kind) != reads(own) or tasks.outputs(settings) != tasks.outputs(c.task):
        raise ValueError(
            f"task {settings['name']!r} needs another kind of model than {c.task.name!r}: a task "
            "is evaluated with the model of the run's own"
        )
    if kind.name != own.name:  # texts, and random strings
        raise ValueError(
            f"task {settings['name']!r} is scored otherwise than {c.task.name!r}: a program scores "
            "random strings, or texts"
        )
    tasks.check_base(settings, base, c.train.seq_len)
    return kind


def _rows_key(c, settings: dict, reads_text: bool, *more) -> str:
    """What a task's rows depend on, and more, as text. settings: its `config.task`."""
    made_for = [c.base, c.train.seq_len] if reads_text else _base_key(c)
    about = [settings, made_for, c.eval.examples, c.eval.test, *more]
    return json.dumps(about, sort_keys=True)


def virtual_tokens(group: Group) -> int:
    """Number of positions that a group's method inserts before every text."""
    method, base = group.stack.methods[0], group.base
    constants, _, state = group.stack.one
    bind = lambda *trees: method.bind(*trees, sites=base.sites)
    bound = jax.eval_shape(bind, state.trainable, constants, base.params)
    return prefix.ahead(bound).tokens


def check_positions(group: Group) -> None:
    """Raises ValueError if virtual tokens leave a base too few positions for its texts."""
    c, most = group.config, group.base.positions
    kind, ahead = group.task.kind, virtual_tokens(group)
    columns = kinds.columns(kind, group.task.train)
    if most and columns and ahead:
        columns -= kind.ahead
        if columns + ahead > most:
            raise ValueError(
                f"method.tokens: {ahead} given, but texts of {columns} tokens (train.seq_len "
                f"{c.train.seq_len}) leave {max(most - columns, 0)} of the {most} positions of "
                f"{group.base.name}"
            )


def idle(groups: list[Group]) -> list[str]:
    """A line for each setting that makes training have no effect, with the members' names."""
    is_idle = {
        "train.lr: 0": lambda m, _: m.config.train.lr == 0,
        "method.alpha: 0": lambda _, method: method.hp.get("scale", method.hp.get("alpha")) == 0,
    }
    why = {"train.lr: 0": "nothing is learned", "method.alpha: 0": "the update is multiplied by 0"}
    lines = []
    for field, applies in is_idle.items():
        pairs = [pair for g in groups for pair in zip(g.members, g.methods, strict=True)]
        names = [member.name for member, method in pairs if applies(member, method)]
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            lines.append(f"{field} in member {', '.join(names[:3])}{others}: {why[field]}")
    return lines


def describe(group: Group) -> list[dict]:
    """The lines of members.jsonl for a group's members."""
    optimizer = tree.nbytes(group.stack.state.opt_state) // len(group.stack.members)
    pairs = zip(group.members, group.methods, strict=True)
    return [
        _settings(member, method, group)
        | {"train_examples": tasks.train_examples(member.config.task, group.task)}
        | dict(group.task.facts)
        | {"trainable_params": method.count(group.base.params, group.base.sites)}
        | {"optimizer_bytes": optimizer}
        for member, method in pairs
    ]


def _settings(member: Member, method, group: Group) -> dict:
    """The config part of a member's line; later keys replace earlier ones."""
    c = member.config
    line = {"member": member.index, "group": group.index, "name": member.name}
    line |= {"method": method.name, "rank": None, "scale": None} | method.hp
    if member.index in group.rankings:
        line |= {"targets": c.method.targets}
    line |= {"base": c.base, "quant": c.quant, "lr": c.train.lr}
    line |= {"weight_decay": c.train.weight_decay, "steps": c.train.steps, "seed": c.seed}
    line |= {"n_train": c.task.n_train}
    point = member.point.items()
    return line | {a: v for a, v in point if not key_of(a).startswith("method.")}


def check_metric(groups: list[Group], metric: str) -> None:
    """Raises ValueError if a group's task does not measure the metric of a search."""
    for group in groups:
        c, task = group.config, group.task
        names = ["loss", *scores.names(task, bool(tasks.prompts(task, c.eval.generate)))]
        if metric not in names:
            raise ValueError(
                f"search.metric: {metric!r} given, task {c.task.name} measures "
                f"{', '.join(names)}{nearest(metric, names)}"
            )
