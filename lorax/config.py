"""The config of a run: every key with its default, and the members that its sweep lists.

A config file is a script whose `get_config(arg)` takes `default()`, changes what its study changes
and returns it. Nothing here imports JAX: a mistake is found before anything heavy starts.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from lorax import catalogue, outside, ranges
from lorax.errors import nearest


def default() -> ConfigDict:
    """A locked ConfigDict with every key there is."""
    c = ConfigDict()
    # Shipped name, Hugging Face directory or Hub id; "random:" in front for random weights; or a
    # function of your own that returns a Linen module, also as "FILE.py:function" (docs/models.md)
    c.base = config_dict.FieldReference("gpt2-nano", field_type=object)
    c.dtype = "float32"  # of the base's computation
    c.param_dtype = "float32"  # in which the base is stored
    c.operands = "float32"  # of products with frozen weights; "bfloat16" still sums in float32
    c.quant = config_dict.placeholder(str)  # of the frozen linear weights: nf4, fp4, int8
    c.double_quant = True  # the quantisation's scales are quantised too
    c.seed = 0  # of the adapter's start, its dropout and the order of the data
    c.task = _task()
    c.method = _method()
    c.train = _train()
    c.eval = _eval()
    c.analysis = _analysis()
    c.search = _search()
    c.sweep = _sweep()
    return c.lock()


def _task() -> ConfigDict:
    """The data."""
    c = ConfigDict()
    # restaurants | e2e | text | glue | instruct | wikisql | samsum; images: mnist | digits; planted
    # or a function of your own (docs/tasks.md), on the command line FILE.py:function
    c.name = config_dict.FieldReference("restaurants", field_type=object)
    c.path = config_dict.placeholder(str)  # file or folder, for tasks that read one
    c.subset = config_dict.placeholder(str)  # glue: cola sst2 mrpc qnli qqp rte mnli stsb
    c.template = config_dict.placeholder(str)  # instruct: a Jinja template of a chat
    c.packing = False  # several examples in a row, which don't attend to each other
    # Rows of like length in a batch, which is cut to the nearest quarter of the longest row
    c.group_by_length = False
    c.n_train = config_dict.placeholder(int)  # first n training examples; None: all
    c.seed = 0  # of the data itself, where it is generated
    c.shuffle = False  # images: their pixels in a random order, one for all
    # planted: rank of the update to be found, or one for each kernel; None: full
    c.rank = config_dict.FieldReference(None, field_type=object)
    c.spectrum = "flat"  # planted: of the update; or "linear", "geometric" (halves)
    c.strength = 1.0  # planted: norm of the update over that of its kernel
    c.noise = 0.0  # planted: standard deviation of the noise over that of the signal
    c.inputs = config_dict.placeholder(int)  # planted: dimension that inputs span; None: all
    c.examples = 4096  # planted: for training
    return c


def _method() -> ConfigDict:
    """What is trained on the frozen base: see `lorax.catalogue`."""
    c = ConfigDict()
    c.name = "lora"
    # A method takes the keys that it has and no others; None is the method's own default
    for name, key in catalogue.keys().items():
        c[name] = _field(key)
    return c


def _train() -> ConfigDict:
    """Training."""
    c = ConfigDict()
    c.steps = 200
    c.batch_size = 16  # sequences a step
    c.seq_len = 128  # tokens a sequence
    c.accumulate = 1  # parts of a batch, computed one after the other; their gradients are added
    c.lr = 2e-3
    c.schedule = "linear"  # to zero; or "cosine", "constant"
    c.warmup = 10  # steps
    c.optimizer = "adamw"  # or "sgd"
    c.b1 = 0.9  # sgd: momentum
    c.b2 = 0.999
    c.eps = 1e-8
    c.weight_decay = 0.0
    c.label_smoothing = 0.0  # share of the target spread over all classes
    c.clip = 1.0  # global gradient norm of a member; 0: off
    # Activations that the backward pass recomputes: none | full (all of a layer's) | dots (all but
    # the outputs of matrix products)
    c.remat = config_dict.FieldReference("none", field_type=object)
    # "optimizer": its state stays in the host's memory except during the update; one step a call
    c.offload = config_dict.placeholder(str)
    c.parallel = "auto"  # over devices: members | batch | pmap | none
    c.width = 0  # members side by side in the program; 0: chosen
    c.memory_gb = 0.0  # limit for one program; 0: what the device has
    return c


def _eval() -> ConfigDict:
    """Evaluation."""
    c = ConfigDict()
    c.every = 50  # steps; checkpoints are written at the same points
    c.batch_size = 32
    c.examples = 256
    c.generate = 0  # prompts that each member completes after training, scored as text; 0: none
    c.beams = 1  # of beam search; 1: the likeliest token
    c.new_tokens = 64
    c.length_penalty = 1.0
    c.no_repeat_ngram = 0
    return c


def _analysis() -> ConfigDict:
    """What is measured and drawn."""
    c = ConfigDict()
    c.report = True
    # Spectrum and leading directions of every update at each evaluation: analysis/trajectory.csv
    c.trajectory = False
    # Evaluation rows on which the residual stream after each layer of a trained model is compared
    # with the base's, by linear CKA: analysis/cka.csv; 0: none
    c.cka = 0
    # Layers of the base that the report compares updates with, evenly spread; None: all
    c.layers = config_dict.placeholder(int)
    # Statistics of every update: functions of your own, or "FILE.py:function" (docs/analyses.md)
    c.also = ()
    return c


def _search() -> ConfigDict:
    """The smallest dimension that is nearly as good as full fine-tuning, over sweep.dim."""
    c = ConfigDict()
    c.threshold = 0.0  # share of full fine-tuning to be reached: 0.9 for d90; 0: no search
    c.metric = "loss"  # or a score of the task, such as accuracy
    c.baseline_lr = ()  # learning rates that full fine-tuning tries; (): the sweep's
    c.seeds = ()  # of full fine-tuning, LoRA and refinement; (): the sweep's
    c.points = 4  # dimensions that a round of refinement tries inside the bracket
    c.rounds = 1  # of refinement, after the sweep itself
    c.lora_ranks = ()  # LoRA to compare with, at every learning rate of the sweep
    return c


def _sweep() -> ConfigDict:
    """What is swept: a tuple of values per axis."""
    c = ConfigDict()
    for axis in axes():
        c[axis] = ()
    # Any other key: {"train.warmup": (0, 50)}
    c.axes = config_dict.FieldReference((), field_type=object)
    c.zip = ()  # (("rank", "targets"),) ties two axes so that they advance together
    return c


def _field(key: catalogue.Key):
    """What a key of a method holds in a ConfigDict, which then takes values of its type alone."""
    if key.words:
        return config_dict.FieldReference(key.default, field_type=object)
    return config_dict.placeholder(key.kind) if key.default is None else key.default


def axes() -> dict[str, str]:
    """{sweep axis: the key that it sets}, the one that turns fastest last; further ones are in
    `sweep.axes`."""
    first = {"method": "method.name", "base": "base", "quant": "quant"}
    return first | catalogue.axes() | LAST


#: The axes that turn faster than those of a method's hyperparameters.
LAST = {
    "lr": "train.lr",
    "weight_decay": "train.weight_decay",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "n_train": "task.n_train",
    "shuffle": "task.shuffle",
    "planted_rank": "task.rank",
    "noise": "task.noise",
    "inputs": "task.inputs",
    "data_seed": "task.seed",
    "seed": "seed",
}


def axis_of(key: str) -> str:
    """What the axis of a key is called: "lr" for "train.lr", "std" for "method.std", and the key
    itself where it has no shorter name that is unique."""
    short = {key: axis for axis, key in axes().items()}
    last = key.removeprefix("method.")
    return short.get(key, key if last in _defaults() else last)


def key_of(axis: str) -> str:
    """The key that an axis sets; inverse of `axis_of`."""
    return axes().get(axis) or (axis if axis in _defaults() else f"method.{axis}")


def swept(sweep: Mapping) -> dict[str, tuple]:
    """{axis: its values} of the section `sweep`, of a config or of a run's config.json; the slowest
    axis first."""
    short = {axis: values for axis, values in sweep.items() if axis not in ("axes", "zip")}
    others = {axis_of(key): values for key, values in dict(sweep.get("axes") or {}).items()}
    order = sorted(short | others, key=_position)
    return {axis: values for axis in order if (values := (short | others)[axis])}


def shared_axes(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the axes in which full fine-tuning differs as well: not the hyperparameters of a
    method, but layers; neither learning rate nor seed, of which a search has its own."""
    is_shared = lambda axis: axis == "layers" or not key_of(axis).startswith("method.")
    return tuple(axis for axis in names if is_shared(axis) and axis not in ("lr", "seed"))


#: Keys that a run may be continued with other values of: they are read when a member is trained, or
#: limit how much of it is at work at once. What was trained and measured until then stays as it is.
REVISABLE = (
    "eval.generate",
    "eval.beams",
    "eval.new_tokens",
    "eval.length_penalty",
    "eval.no_repeat_ngram",
    "analysis.report",
    "analysis.cka",
    "analysis.layers",
    "analysis.also",
    "train.memory_gb",
)


class Member(NamedTuple):
    """A point of a sweep. name: "rank=4,seed=1"; point: {axis: value}; config: its own."""

    index: int
    name: str
    point: dict
    config: ConfigDict


def members(config: ConfigDict) -> list[Member]:
    """The product of the sweep's axes (tied ones advance together), the last axis fastest.

    A search trains more than these: see `lorax.search.members`.

    Raises ValueError that names the key for an empty or malformed axis, a value of the wrong type,
    and a value out of range.
    """
    check_keys(config)
    _spell(config)
    _check_axes(config.sweep)
    axes = {axis: _values(config, axis, given) for axis, given in swept(config.sweep).items()}
    if "n_train" in axes and config.task.packing:
        raise ValueError("sweep.n_train: rows that are packed (task.packing) can't be counted off")
    blocks = _tied(axes, config.sweep.zip)
    points = [dict(itertools.chain(*parts)) for parts in itertools.product(*blocks)]
    return [member(config, index, point) for index, point in enumerate(points)]


def member(config: ConfigDict, index: int, point: dict) -> Member:
    """The member at {axis: value}. Raises ValueError for a value out of range."""
    point = {axis: point[axis] for axis in sorted(point, key=_position)}
    values = config.to_dict()
    for section in ("sweep", "search"):  # which only the run as a whole has
        values.pop(section, None)
    member_config = ConfigDict(values)
    for axis, value in point.items():
        section, _, name = key_of(axis).rpartition(".")
        with member_config.ignore_type():  # `_values` has looked; a rank may be a number or a word
            (member_config[section] if section else member_config)[name] = value
    ranges.check(flat(member_config), _defaults())
    name = ",".join(f"{axis}={_show(value)}" for axis, value in point.items()) or "only"
    return Member(index, name, point, member_config.lock())


# -------------------------------------------------------------------------------------------- axes

#: Sections of which no key can be swept, and why.
WHOLE = {
    "sweep": "it says what is swept",
    "search": "a search is of the whole run",
    "analysis": "analysis and report are of the whole run",
}


def _check_axes(sweep) -> None:
    """Raises ValueError for a key of `sweep.axes` that can't be swept there."""
    if not isinstance(sweep.axes, Mapping) and sweep.axes != ():
        right = 'must be a dictionary like {"train.warmup": (0, 50)}'
        line = """--config.sweep.axes="{'train.warmup': (0, 50)}\""""
        raise ValueError(f"sweep.axes: {sweep.axes!r} given, {right} (on the command line: {line})")
    for key, values in dict(sweep.axes).items():
        if key in axes() and key not in _defaults():
            raise ValueError(f"sweep.axes: {key!r} is an axis by itself: give sweep.{key}")
        check_key(key, "sweep.axes: ")
        if why := WHOLE.get(key.partition(".")[0]):
            raise ValueError(f"sweep.axes: {key} can't be swept: {why}")
        if (axis := axis_of(key)) in axes() and sweep[axis]:
            raise ValueError(f"sweep.axes: {key} is swept by sweep.{axis} as well")
        if not isinstance(values, tuple | list):
            raise ValueError(f"sweep.axes: {key}: {values!r} given, must be a tuple of values")


def _position(axis: str) -> float:
    """Where an axis stands among the others; those of `sweep.axes` before the learning rate."""
    order = list(axes())
    return order.index(axis if axis in order else "lr") - 0.5 * (axis not in order)


def _tied(axes: dict[str, tuple], zip_: tuple) -> list[list[tuple]]:
    """The blocks of axes that advance together, slowest first: for each of a block's steps the
    pairs (axis, value). Raises ValueError for a malformed tie, and for steps that are the same."""
    ties = [tuple(map(axis_of, tie)) for tie in zip_ if isinstance(tie, tuple | list)]
    if len(ties) != len(zip_) or any(len(tie) < 2 for tie in ties):
        raise ValueError(f'sweep.zip: {zip_} given, a tuple of ties like (("rank", "alpha"),)')
    for tie in ties:
        for axis in tie:
            if axis not in axes:
                raise ValueError(
                    f"sweep.zip: {axis!r} is no axis of this sweep; there is {', '.join(axes)}"
                )
        if len({len(axes[axis]) for axis in tie}) != 1:
            sizes = ", ".join(f"{axis} {len(axes[axis])}" for axis in tie)
            raise ValueError(f"sweep.zip: {tie} must have as many values each; there are {sizes}")
    tied = [axis for tie in ties for axis in tie]
    if len(tied) != len(set(tied)):
        raise ValueError(f"sweep.zip: an axis is tied twice in {zip_}")
    blocks = []
    free = [(axis,) for axis in axes if axis not in tied]
    for block in sorted(ties + free, key=lambda block: _position(block[0])):
        steps = list(zip(*(axes[axis] for axis in block), strict=True))
        if len(set(steps)) != len(steps):
            shown = steps if len(block) > 1 else tuple(step[0] for step in steps)
            raise ValueError(f"sweep.{' and '.join(block)}: a value stands twice in {shown}")
        blocks.append([tuple(zip(block, step, strict=True)) for step in steps])
    return blocks


def _values(config, axis: str, values) -> tuple:
    """The values of an axis, of the type of its key. Raises ValueError for one of another type."""
    if axis == "targets":
        values = tuple((v,) if isinstance(v, str) else v for v in values)
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    kind, optional, words = _kind(key_of(axis))
    for value in values:
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        fits = fits or (value is None and optional) or value in words
        if not fits or (isinstance(value, bool) and kind is not bool):
            field, line = f"sweep.{axis}", f'sweep.{axis}="(first, second)"'
            if axis not in axes() or not config.sweep[axis]:
                field = f"sweep.axes: {key_of(axis)}"
                line = f"""sweep.axes="{{'{key_of(axis)}': (first, second)}}\""""
            raise ValueError(
                f"{field}: values of type {getattr(kind, '__name__', kind)} are expected, "
                f"{value!r} given (on the command line: --config.{line})"
            )
    as_float = lambda v: v if v is None else float(v)
    return tuple(map(as_float, values)) if kind is float else values


def _kind(key: str) -> tuple[type, bool, tuple]:
    """(type of a key's values, whether None is a value as well, words that may stand for one)."""
    section, _, name = key.rpartition(".")
    if section == "method" and name != "name":
        of_method = catalogue.keys()[name]
        return of_method.kind, of_method.default is None, of_method.words
    if key == "task.rank":
        return int | tuple, True, ()
    value = _defaults()[key]
    return (type(value), False, ()) if value is not None else (_optional()[key], True, ())


# ------------------------------------------------------------------------------------------ groups


def group_key(member: Member) -> str:
    """Members with the same key can share one compiled program: all that differs is data."""
    return json.dumps(_of_group(member), sort_keys=True)


def _of_group(member: Member) -> dict:
    """{key: value} of what the members of one program have in common."""
    values = flat(member.config)
    row = catalogue.ROWS.get(values["method.name"], catalogue.Row("", "", ()))
    splits = {f"method.{key}": values[f"method.{key}"] in of for key, of in row.splits.items()}
    data = {f"method.{name}" for name in row.varies}
    data |= {"train.lr", "train.weight_decay", "task.n_train", "seed"}
    return {key: value for key, value in values.items() if key not in data} | splits


def grouped(members: Iterable[Member]) -> list[list[Member]]:
    """The members by the programs that they can share, in the order in which they run."""
    ordered = sorted(members, key=group_key)
    parts = [list(part) for _, part in itertools.groupby(ordered, key=group_key)]
    return sorted(parts, key=lambda part: part[0].index)


def differences(groups: list[list[Member]]) -> list[str]:
    """The keys that make several groups of the members."""
    each = [_of_group(group[0]) for group in groups]
    common = [key for key in each[0] if all(key in of for of in each)]
    return [key for key in common if any(of[key] != each[0][key] for of in each)]


# -------------------------------------------------------------------------------------------- keys


def digest(overrides: dict) -> str:
    """Ten hexadecimal digits that change with any key or value of the overrides."""
    text = json.dumps(overrides, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _show(value) -> str:
    return (
        "+".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def check_key(key: str, where: str = "") -> None:
    """Raises ValueError, with the nearest that there is, where no config has the key "train.lr"."""
    if key not in _defaults():
        raise ValueError(f"{where}config has no key {key!r}{nearest(str(key), _defaults())}")


def check_keys(config) -> None:
    """Raises ValueError where a config lacks a key of the default or has another one."""
    have = flat(config)
    for key in have:
        check_key(key)
    for key in _defaults():
        if key not in have:
            raise ValueError(f"config lacks the key {key!r}; start from lorax.config.default()")


def _spell(config, prefix: str = "") -> None:
    """Put the name "FILE.py:function" in place of every function in a config."""
    for key, value in config.items():
        name = prefix + key
        if isinstance(value, ConfigDict):
            _spell(value, f"{name}.")
            continue
        if isinstance(value, Mapping):  # sweep.axes
            spelled = {of: outside.spell(values, name) for of, values in value.items()}
        else:
            spelled = outside.spell(value, name)
        if spelled != value:
            with config.ignore_type():
                config[key] = spelled


def _defaults() -> dict:
    """{"train.lr": its default} of every key, made anew where a method was registered since."""
    return _defaults_with(tuple(catalogue.keys()))


@functools.cache
def _defaults_with(keys: tuple[str, ...]) -> dict:
    return flat(default())


@functools.cache
def _optional() -> dict[str, type]:
    """{key: type of its values} of those keys that have None for a default."""
    whole = default()
    sections = {"": whole} | {key: value for key, value in whole.items() if key in SECTIONS}
    return {
        f"{section}.{name}".lstrip("."): values.get_type(name)
        for section, values in sections.items()
        for name, value in values.items()
        if value is None
    }


SECTIONS = ("task", "train", "eval", "analysis")


def flat(config, prefix: str = "") -> dict:
    """{"train.lr": value} of every key of a config."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
