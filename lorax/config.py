"""The config of a run: every key with its default, and the members that its sweep spells out.

A config file is a script whose `get_config(arg)` takes `default()`, changes what its study changes
and returns it. Nothing here imports JAX: a mistake is found before anything heavy starts.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from lorax import catalogue, outside
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

    c.task = ConfigDict()
    # restaurants | e2e | text | glue | instruct | wikisql | samsum; images: mnist | digits; planted
    c.task.name = "restaurants"
    c.task.path = config_dict.placeholder(str)  # file or folder, for tasks that read one
    c.task.subset = config_dict.placeholder(str)  # glue: cola sst2 mrpc qnli qqp rte mnli stsb
    c.task.template = config_dict.placeholder(str)  # instruct: a Jinja template of a chat
    c.task.packing = False  # several examples in a row, which do not see each other
    # Rows of like length in a batch, which is cut to the nearest quarter of the longest row
    c.task.group_by_length = False
    c.task.n_train = config_dict.placeholder(int)  # first n training examples; None: all
    c.task.seed = 0  # of the data itself, where it is generated
    c.task.shuffle = False  # images: their pixels in a random order, one for all
    # planted: rank of the update to be found, or one for each kernel; None: full
    c.task.rank = config_dict.FieldReference(None, field_type=object)
    c.task.spectrum = "flat"  # planted: of the update; or "linear", "geometric" (halves)
    c.task.strength = 1.0  # planted: norm of the update over that of its kernel
    c.task.noise = 0.0  # planted: deviation of the targets' noise over that of what is planted
    c.task.inputs = config_dict.placeholder(int)  # planted: dimension that inputs span; None: all
    c.task.examples = 4096  # planted: for training

    c.method = ConfigDict()
    c.method.name = "lora"  # see lorax.catalogue, also for what follows; a key that it does not
    # have is left alone, and None is the method's own default
    for name, key in catalogue.keys().items():
        c.method[name] = _field(key)

    c.train = ConfigDict()
    c.train.steps = 200
    c.train.batch_size = 16  # sequences a step
    c.train.seq_len = 128  # tokens a sequence
    c.train.accumulate = 1  # parts in which a batch is worked off, gradients added
    c.train.lr = 2e-3
    c.train.schedule = "linear"  # to zero; or "cosine", "constant"
    c.train.warmup = 10  # steps
    c.train.optimizer = "adamw"  # or "sgd"
    c.train.b1 = 0.9  # sgd: momentum
    c.train.b2 = 0.999
    c.train.eps = 1e-8
    c.train.weight_decay = 0.0
    c.train.label_smoothing = 0.0  # share of the target spread over all classes
    c.train.clip = 1.0  # global gradient norm of a member; 0: off
    # Activations that the backward pass makes again: none | full (all of a layer's) | dots (all but
    # what products give)
    c.train.remat = config_dict.FieldReference("none", field_type=object)
    # "optimizer": its state lies in the host's memory but for the update, at one step a call
    c.train.offload = config_dict.placeholder(str)
    c.train.parallel = "auto"  # over devices: members | batch | pmap | none
    c.train.width = 0  # members side by side in the program; 0: chosen
    c.train.memory_gb = 0.0  # limit for one program; 0: what the device has

    c.eval = ConfigDict()
    c.eval.every = 50  # steps; checkpoints are written at the same points
    c.eval.batch_size = 32
    c.eval.examples = 256
    c.eval.generate = 0  # prompts that each member completes in the end, scored as text; 0: none
    c.eval.beams = 1  # 1: the likeliest token
    c.eval.new_tokens = 64
    c.eval.length_penalty = 1.0
    c.eval.no_repeat_ngram = 0

    c.analysis = ConfigDict()
    c.analysis.report = True
    # Spectrum and leading directions of every update at each evaluation: analysis/trajectory.csv
    c.analysis.trajectory = False
    # Evaluation rows on which the residual stream after each layer of a trained model is compared
    # with the base's, by linear CKA: analysis/cka.csv; 0: none
    c.analysis.cka = 0
    # Layers of the base that the report sets the updates against, evenly spread; None: all
    c.analysis.layers = config_dict.placeholder(int)

    # The smallest dimension that is nearly as good as full fine-tuning, over sweep.dim
    c.search = ConfigDict()
    c.search.threshold = 0.0  # share of full fine-tuning to be reached: 0.9 for d90; 0: no search
    c.search.metric = "loss"  # or a score of the task, such as accuracy
    c.search.baseline_lr = ()  # learning rates that full fine-tuning tries; (): the sweep's
    c.search.seeds = ()  # of full fine-tuning, LoRA and refinement; (): the sweep's
    c.search.points = 4  # dimensions that a round of refinement puts between two of the last
    c.search.rounds = 1  # of refinement, after the sweep itself
    c.search.lora_ranks = ()  # LoRA to compare with, at every learning rate of the sweep

    c.sweep = ConfigDict()
    for axis in axes():
        c.sweep[axis] = ()
    c.sweep.zip = ()  # (("rank", "targets"),) moves along both at once
    return c.lock()


def _field(key: catalogue.Key):
    """What a key of a method holds in a ConfigDict, which then takes values of its type alone."""
    if key.words:
        return config_dict.FieldReference(key.default, field_type=object)
    return config_dict.placeholder(key.kind) if key.default is None else key.default


def axes() -> dict[str, str]:
    """{sweep axis: the key that it sets}, the one that turns fastest last."""
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
    "train.memory_gb",
)


class Member(NamedTuple):
    """A point of a sweep. name: "rank=4,seed=1"; point: {axis: value}; config: its own."""

    index: int
    name: str
    point: dict
    config: ConfigDict


def members(config: ConfigDict) -> list[Member]:
    """The product of the sweep's axes (tied ones move together), the last axis fastest.

    In a search they are followed by what it compares with, `search.seeds` of each: full fine-tuning
    at its learning rates, then LoRA. Methods, and conditions that differ in a hyperparameter of
    theirs alone, share these. `more_members` are those of later rounds.

    Raises ValueError that names the key for an empty or malformed axis, a value of the wrong type,
    and a value out of range.
    """
    _check_keys(config)
    _spell(config)
    sweep = config.sweep
    swept = {axis: _axis(config, axis) for axis in axes() if sweep[axis] != ()}
    if "n_train" in swept and config.task.packing:
        raise ValueError("sweep.n_train: rows that are packed (task.packing) can't be counted off")
    ties = [tuple(tie) for tie in sweep.zip if isinstance(tie, tuple | list)]
    if len(ties) != len(sweep.zip) or any(len(tie) < 2 for tie in ties):
        raise ValueError(f'sweep.zip: {sweep.zip} given, a tuple of ties like (("rank", "alpha"),)')
    for tie in ties:
        for axis in tie:
            if axis not in swept:
                raise ValueError(
                    f"sweep.zip: {axis!r} is no axis of this sweep; there is {', '.join(swept)}"
                )
        if len({len(swept[axis]) for axis in tie}) != 1:
            sizes = ", ".join(f"{axis} {len(swept[axis])}" for axis in tie)
            raise ValueError(f"sweep.zip: {tie} must have as many values each; there are {sizes}")
    tied = [axis for tie in ties for axis in tie]
    if len(tied) != len(set(tied)):
        raise ValueError(f"sweep.zip: an axis is tied twice in {sweep.zip}")
    blocks = [tie for tie in ties] + [(axis,) for axis in swept if axis not in tied]
    order = list(axes())
    blocks.sort(key=lambda block: order.index(block[0]))
    values = [list(zip(*(swept[axis] for axis in block), strict=True)) for block in blocks]
    for block, rows in zip(blocks, values, strict=True):
        if len(set(rows)) != len(rows):
            shown = rows if len(block) > 1 else tuple(row[0] for row in rows)
            raise ValueError(f"sweep.{' and '.join(block)}: a value stands twice in {shown}")
    _check_search(config, swept, tied)
    found = []
    for index, chosen in enumerate(itertools.product(*values)):
        point = {
            axis: value
            for block, tuple_ in zip(blocks, chosen, strict=True)
            for axis, value in zip(block, tuple_, strict=True)
        }
        found.append(_member(config, index, point))
    if config.search.threshold:
        for point in _compared(config, found):
            found.append(_member(config, len(found), point))
    return found


def _member(config, index: int, point: dict) -> Member:
    """The member at {axis: value}; ValueError for a value out of range."""
    point = {axis: point[axis] for axis in axes() if axis in point}
    own = ConfigDict(config.to_dict())
    for section in ("sweep", "search"):  # what only the run as a whole has
        if section in own:
            del own[section]
    for axis, value in point.items():
        section, _, key = axes()[axis].rpartition(".")
        with own.ignore_type():  # `_axis` has looked; a rank may be a number or a word
            (own[section] if section else own)[key] = value
    _check_values(own)
    name = ",".join(f"{axis}={_show(value)}" for axis, value in point.items()) or "only"
    return Member(index, name, point, own.lock())


# ------------------------------------------------------------------------------------------ search

REFINED_LRS = 2  # learning rates at which a dimension between two others is tried


def shared_axes(names) -> tuple[str, ...]:
    """Those of the axes in which full fine-tuning differs as well: not the hyperparameters of a
    method, but layers; neither learning rate nor seed, of which a search has its own."""
    others = {axis for axis, key in axes().items() if not key.startswith("method.")} | {"layers"}
    return tuple(name for name in names if name in others - {"lr", "seed"})


def search_seeds(config: ConfigDict) -> tuple[int, ...]:
    """The seeds of what a search trains beside its first dimensions."""
    return tuple(config.search.seeds or config.sweep.seed or (config.seed,))


def _compared(config, swept: list[Member]) -> list[dict]:
    """The points of full fine-tuning and LoRA that a search compares with."""
    search, lrs = config.search, config.sweep.lr or (config.train.lr,)
    conditions, points = [], []
    for member in swept:
        condition = {axis: member.point[axis] for axis in shared_axes(member.point)}
        if condition not in conditions:
            conditions.append(condition)
    settings = [{"method": "full", "lr": float(lr)} for lr in search.baseline_lr or lrs]
    settings += [
        {"method": "lora", "rank": rank, "lr": float(lr)}
        for rank in search.lora_ranks
        for lr in lrs
    ]
    for setting, condition in itertools.product(settings, conditions):
        points += [condition | setting | {"seed": seed} for seed in search_seeds(config)]
    return points


def more_members(config: ConfigDict, members: list[Member], asked: list[dict]) -> list[Member]:
    """The members of a search's next round, counted on from those there are.

    asked: {"like": number of a member, axis: value of those in which the new one differs} each, as
    `lorax.analysis.intrinsic.refine` gives them. What has been trained is not trained again.
    """
    key = lambda member: json.dumps(member.config.to_dict(), sort_keys=True)
    known, found = {key(member) for member in members}, []
    for wanted in asked:
        changes = {axis: value for axis, value in wanted.items() if axis != "like"}
        point = members[wanted["like"]].point | changes
        member = _member(config, len(members) + len(found), point)
        if key(member) not in known:
            known.add(key(member))
            found.append(member)
    return found


def most_members(config: ConfigDict, members: list[Member]) -> int:
    """As many as one round of a search's refinement can add: to tell how long it may take."""
    fixed = lambda p: {
        axis: value for axis, value in p.items() if axis not in ("dim", "lr", "seed")
    }
    conditions = {str(fixed(member.point)) for member in members if "dim" in member.point}
    each = (config.search.points + 2) * REFINED_LRS * len(search_seeds(config))  # and both ends
    return each * len(conditions)


def _check_search(config, swept: dict, tied: list[str]) -> None:
    """Raises ValueError for a key of config.search that is out of range or does not fit."""
    search = config.search

    def need(field, ok, right):
        if not ok:
            raise ValueError(f"search.{field}: {search[field]!r} given, {right}")

    def all_are(field, kind, ok, right):
        number = lambda v: isinstance(v, kind) and not isinstance(v, bool)
        need(field, all(number(v) and ok(v) for v in search[field]), right)

    need("threshold", 0 <= search.threshold <= 1, "must be in [0, 1]: 0.9 for d90, 0 for no search")
    need("points", 1 <= search.points < 2**31, "must be at least 1, and less than 2**31")
    need("rounds", 0 <= search.rounds < 2**31, "must not be negative, and less than 2**31")
    all_are(
        "baseline_lr",
        int | float,
        lambda v: 0 <= v <= FLOAT32_MAX,
        "must be a tuple of learning rates",
    )
    all_are("seeds", int, lambda v: 0 <= v < 2**31, "must be a tuple of integers in [0, 2**31)")
    all_are("lora_ranks", int, lambda v: v >= 1, "must be a tuple of integers of at least 1")
    for field in ("baseline_lr", "seeds", "lora_ranks"):
        need(field, len(set(search[field])) == len(search[field]), "a value stands twice")
    if not search.threshold:
        return
    dims = swept.get("dim", ())
    need("threshold", len(dims) > 1, f"needs a sweep.dim of at least two values, not {dims}")
    need("threshold", None not in dims, f"needs a sweep.dim of numbers alone, not {dims}")
    for axis in ("dim", "seed"):
        if axis in tied:
            raise ValueError(f"sweep.zip: {axis} is tied, but a search (search.threshold) moves it")
    for name in swept.get("method", (config.method.name,)):
        rows = catalogue.ROWS
        right = ", ".join(of for of, row in rows.items() if "dim" in row.varies)
        without = name in rows and "dim" not in rows[name].varies
        need("threshold", not without, f"but method {name!r} has no dim; {right} have")
    seeds = swept.get("seed", (config.seed,))
    if search.seeds:
        need("seeds", set(seeds) <= set(search.seeds), f"must hold the sweep's own, {seeds}")


def group_key(member: Member) -> str:
    """Members with the same key can share one compiled program: all that differs is data."""
    c = member.config.to_dict()
    row = catalogue.ROWS.get(c["method"]["name"], catalogue.Row("", "", ()))
    c["splits"] = [[key, c["method"][key] in values] for key, values in row.splits.items()]
    for name in row.varies:
        del c["method"][name]
    for section, name in (("train", "lr"), ("train", "weight_decay"), ("task", "n_train")):
        del c[section][name]
    del c["seed"]
    return json.dumps(c, sort_keys=True)


def grouped(members: Iterable[Member]) -> list[list[Member]]:
    """Members that share a program (`group_key`), in the order in which the groups are trained."""
    parts = itertools.groupby(sorted(members, key=group_key), key=group_key)
    return sorted((list(part) for _, part in parts), key=lambda part: part[0].index)


FLOAT32_MAX, FLOAT32_MIN = 3.4028234e38, 1.1754944e-38  # the smallest of full precision
BELOW_1 = 1 - 2**-24  # the largest
REMAT = ("none", "full", "dots")  # see `lorax.models.layers.over_layers`


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


# Axes of which None is a value as well, with the type of the others; and see `catalogue.Key`.
OPTIONAL = {"quant": str, "n_train": int, "inputs": int, "planted_rank": int | tuple}


def _axis(config, axis) -> tuple:
    values = config.sweep[axis]
    if not isinstance(values, tuple | list):
        raise ValueError(f"sweep.{axis}: a tuple of values is expected, {values!r} given")
    section, _, name = axes()[axis].rpartition(".")
    key = catalogue.keys().get(name) if section == "method" else None
    if axis == "targets":
        values = tuple((v,) if isinstance(v, str) else v for v in values)
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    now = type((config[section] if section else config)[name])
    kind = key.kind if key else OPTIONAL.get(axis, now)
    optional = key.default is None if key else axis in OPTIONAL
    for value in values:
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        fits = fits or (value is None and optional) or (key is not None and value in key.words)
        if not fits or (isinstance(value, bool) and kind is not bool):
            name = getattr(kind, "__name__", kind)
            raise ValueError(
                f"sweep.{axis}: values of type {name} are expected, {value!r} given "
                f'(on the command line: --config.sweep.{axis}="(first, second)")'
            )
    as_float = lambda v: v if v is None else float(v)
    return tuple(map(as_float, values)) if kind is float else tuple(values)


def check_key(key: str) -> None:
    """Raises ValueError, with the nearest that there is, where no config has the key "train.lr"."""
    if key not in _keys():
        raise ValueError(f"config has no key {key!r}{nearest(key, _keys())}")


def _check_keys(config) -> None:
    """Every key of the default, and no other."""
    have = _flat(config)
    for key in have:
        check_key(key)
    for key in _keys():
        if key not in have:
            raise ValueError(f"config lacks the key {key!r}; start from lorax.config.default()")


def _spell(config, prefix: str = "") -> None:
    """Put the name "FILE.py:function" in place of every function in a config."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _spell(value, f"{prefix}{key}.")
        elif (spelled := outside.spell(value, prefix + key)) != value:
            with config.ignore_type():
                config[key] = spelled


def _usual() -> dict:
    """{"train.lr": its default} of every key, made anew where a method was registered since."""
    return _usual_with(tuple(catalogue.keys()))


@functools.cache
def _usual_with(keys: tuple[str, ...]) -> dict:
    return _flat(default())


def _keys() -> tuple[str, ...]:
    return tuple(_usual())


def _flat(config, prefix="") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_values(c) -> None:
    def need(field, value, ok, right):
        if not ok:
            raise ValueError(f"{field}: {value!r} given, {right}")

    def one_of(field, value, known):
        right = f"must be one of {', '.join(known)}{nearest(str(value), known)}"
        need(field, value, value in known, right)

    text = isinstance(c.base, str) and c.base != ""
    need("base", c.base, text, "must be the name of a base, or a function that returns a module")
    for name in ("steps", "batch_size", "seq_len", "accumulate"):
        need(f"train.{name}", c.train[name], c.train[name] >= 1, "must be at least 1")
    for name in ("every", "batch_size", "examples"):
        need(f"eval.{name}", c.eval[name], c.eval[name] >= 1, "must be at least 1")
    for name in ("warmup", "width", "memory_gb", "weight_decay", "clip", "lr"):
        need(f"train.{name}", c.train[name], c.train[name] >= 0, "must not be negative")
    # A gradient that is always zero, as that of padding is, would be divided by it.
    need("train.eps", c.train.eps, c.train.eps >= FLOAT32_MIN, f"must be at least {FLOAT32_MIN}")
    for name in ("b1", "b2"):
        need(f"train.{name}", c.train[name], 0 <= c.train[name] <= BELOW_1, "must be in [0, 1)")
    for name in ("generate", "no_repeat_ngram"):
        need(f"eval.{name}", c.eval[name], c.eval[name] >= 0, "must not be negative")
    need("analysis.cka", c.analysis.cka, c.analysis.cka >= 0, "must not be negative")
    few = c.analysis.layers
    need("analysis.layers", few, few is None or few >= 0, "must not be negative, or None for all")
    for name in ("beams", "new_tokens"):
        need(f"eval.{name}", c.eval[name], c.eval[name] >= 1, "must be at least 1")
    smoothing = c.train.label_smoothing
    need("train.label_smoothing", smoothing, 0 <= smoothing <= BELOW_1, "must be in [0, 1)")
    for key, seed in (("seed", c.seed), ("task.seed", c.task.seed)):
        need(key, seed, 0 <= seed < 2**31, "must be in [0, 2**31)")
    dropout = c.method.dropout
    need("method.dropout", dropout, 0 <= dropout <= BELOW_1, "must be in [0, 1)")
    batches = c.method.batches
    need("method.batches", batches, batches is None or batches >= 1, "must be at least 1 or None")
    rank, budget = c.method.rank, c.method.budget
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    need("method.rank", rank, whole or rank == "auto", 'must be at least 1, or "auto"')
    need("method.budget", budget, budget is None or budget >= 1, "must be at least 1 or None")
    n_train = c.task.n_train
    need("task.n_train", n_train, n_train is None or n_train >= 1, "must be at least 1 or None")
    need(
        "train.accumulate",
        c.train.accumulate,
        c.train.batch_size % c.train.accumulate == 0,
        f"must divide train.batch_size, {c.train.batch_size}",
    )
    for field in ("dtype", "param_dtype", "operands"):
        one_of(field, c[field], ("float32", "bfloat16"))
    if c.quant is not None:
        one_of("quant", c.quant, ("nf4", "fp4", "int8"))
    remat = c.train.remat
    meant = f'; did you mean "{"full" if remat else "none"}"?' if isinstance(remat, bool) else ""
    right = f"must be one of {', '.join(REMAT)}{meant or nearest(str(remat), REMAT)}"
    need("train.remat", remat, isinstance(remat, str) and remat in REMAT, right)
    offload, pmap = c.train.offload, c.train.parallel == "pmap"
    need("train.offload", offload, offload in (None, "optimizer"), "must be optimizer or None")
    need("train.offload", offload, not (offload and pmap), 'needs a train.parallel but "pmap"')
    one_of("train.schedule", c.train.schedule, ("linear", "cosine", "constant"))
    one_of("train.optimizer", c.train.optimizer, ("adamw", "sgd"))
    one_of("train.parallel", c.train.parallel, ("auto", "members", "batch", "pmap", "none"))
    for key, value in _flat(c).items():
        if isinstance(value, bool) and type(_usual()[key]) in (int, float):
            need(key, value, False, "must be a number")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                need(key, value, abs(number) <= FLOAT32_MAX, "must be finite (in float32)")
            elif isinstance(number, int) and key != "method.budget":
                need(key, value, abs(number) < 2**31, "must be less than 2**31")
