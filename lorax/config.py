"""The config of a run: every key with its default, and the members that its sweep lists.

A config file is a script whose `get_config(arg)` takes `default()`, changes what its study changes
and returns it. Nothing here imports JAX: a mistake is found before anything heavy starts.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from lorax import catalogue, outside, ranges
from lorax.errors import nearest


def default() -> ConfigDict:
    """A locked ConfigDict with every key and its default."""
    c = ConfigDict()
    # Shipped name, Hugging Face directory or Hub id, with the prefix "random:" for random weights;
    # or your own function that returns a Linen module, also as "FILE.py:function" (docs/models.md)
    c.base = config_dict.FieldReference("gpt2-nano", field_type=object)
    c.dtype = "float32"  # of the base's computation
    c.param_dtype = "float32"  # in which the base is stored
    c.operands = "float32"  # dtype in products with frozen weights; "bfloat16" sums in float32
    c.quant = config_dict.placeholder(str)  # quantises the frozen linear weights: nf4, fp4, int8
    c.double_quant = True  # quantises the quantisation's scales too
    c.seed = 0  # of a member's initial values, its dropout and the order of its training rows
    c.track = ("tensorboard",)  # who follows the run: tensorboard, wandb, trackio (docs/runs.md)
    c.seeds = _seeds()
    c.task = _task()
    # Tasks to train one after the other in place of `task`; every member goes on from its own
    # merged model: (("e2e", {"name": "e2e", "path": ZIP}), ("plays", {...})), docs/forgetting.md
    c.sequence = ()
    c.method = _method()
    c.train = _train()
    c.eval = _eval()
    c.analysis = _analysis()
    c.search = _search()
    c.sweep = _sweep()
    c.halving = _halving()
    return c.lock()


def _seeds() -> ConfigDict:
    """Seeds that move one thing each, where `seed` moves the start and the order together."""
    c = ConfigDict()
    c.start = config_dict.placeholder(int)  # of a member's initial values; None: `seed`
    # Of the order of the training rows and of dropout; None: `seed`. An initialisation that reads
    # training batches (such as eva) follows the order too
    c.order = config_dict.placeholder(int)
    # Draws the `task.n_train` training rows at random among all; None: the first ones. Validation
    # and test rows stay: they and their split follow `task.seed`, as all generated data do
    c.data = config_dict.placeholder(int)
    return c


def _task() -> ConfigDict:
    """The data."""
    c = ConfigDict()
    # restaurants | e2e | text | glue | instruct | wikisql | samsum; random_strings; images: mnist |
    # digits, or diffusion, to denoise them; planted; or your own function (docs/tasks.md), on the
    # command line FILE.py:function
    c.name = config_dict.FieldReference("restaurants", field_type=object)
    c.path = config_dict.placeholder(str)  # file or folder, for tasks that read one
    # glue: cola sst2 mrpc qnli qqp rte mnli stsb; instruct: a configuration of a Hub data set
    c.subset = config_dict.placeholder(str)
    # instruct: a Jinja chat template or a file of one, for all records; None: the base's own, for
    # conversations; "plain": none
    c.template = config_dict.placeholder(str)
    c.split = config_dict.placeholder(str)  # instruct: names of train,eval,test sets, e.g. "a,b"
    c.columns = config_dict.placeholder(str)  # instruct: renames fields, e.g. "question=prompt"
    c.packing = False  # packs several examples into a row; they don't attend to each other
    c.truncate = False  # cuts examples that are too long for a row, which are left out otherwise
    c.loss_on = "completions"  # or "all": trains on prompts too, and evaluates on completions still
    # Batches rows of similar length and trims each batch to a quarter, half, ... of the longest row
    c.group_by_length = False
    c.n_train = config_dict.placeholder(int)  # first n training examples; None: all
    c.seed = 0  # of generated data, for training and for evaluation
    c.shuffle = False  # images: shuffles the pixels, in the same random order for all images
    # planted: rank of the update to be found, or a tuple with one rank per kernel; None: full
    c.rank = config_dict.FieldReference(None, field_type=object)
    c.spectrum = "flat"  # planted: singular values; or "linear", "geometric" (each half the last)
    c.strength = 1.0  # planted: norm of the update over that of its kernel
    c.noise = 0.0  # planted: standard deviation of the noise over that of the signal
    c.inputs = config_dict.placeholder(int)  # planted: dimension that inputs span; None: all
    c.examples = 4096  # planted: training examples; random_strings: how many
    c.alphabet = 2048  # random_strings: different tokens in them; fewer if the base has fewer
    c.classes = ()  # diffusion: numbers of the classes of images to train on; (): all
    c.prediction = config_dict.placeholder(str)  # diffusion: epsilon | v; None: as the base's files
    c.min_snr = 0.0  # diffusion: gamma of Min-SNR weights, e.g. 5.0; 0: equal weights
    # diffusion: share of training rows without their class or caption, for `eval.guidance`
    c.class_dropout = 0.1
    # diffusion: folder of the text encoder that reads the captions of `task.path`; None: the
    # text_encoder/ beside the base's unet/
    c.text_encoder = config_dict.placeholder(str)
    return c


def _method() -> ConfigDict:
    """What is trained on the frozen base: see `lorax.catalogue`."""
    c = ConfigDict()
    c.name = "lora"
    # A method reads only the keys of its hyperparameters; None means the method's default
    for name, key in catalogue.keys().items():
        c[name] = _field(key)
    return c


def _train() -> ConfigDict:
    """Training."""
    c = ConfigDict()
    c.steps = 200
    # Passes over the training rows, whose number decides the steps; train.steps is then 0 or its
    # default. 0: train.steps
    c.epochs = 0.0
    # Of an epoch: "full", filled up with the next epoch's first rows; "short", of the rows left
    # over; or "drop", leaves them out
    c.last_batch = "full"
    c.batch_size = 16  # sequences per step
    c.seq_len = 128  # tokens per sequence
    c.accumulate = 1  # computes a batch in this many parts and adds their gradients
    c.lr = 2e-3
    c.schedule = "linear"  # to zero; or "cosine", "constant"
    c.warmup = 10  # steps
    # Share of the steps, rounded up; train.warmup is then 0 or its default. 0: train.warmup
    c.warmup_ratio = 0.0
    # sgd | adafactor | lion | muon | riemannian | lora-muon | schedule-free (docs/runs.md)
    c.optimizer = "adamw"
    # Of the optimisers that have them; None: the optimiser's own default (docs/runs.md)
    c.b1 = config_dict.placeholder(float)  # sgd, muon, lora-muon: momentum
    c.b2 = config_dict.placeholder(float)
    c.eps = config_dict.placeholder(float)
    c.damping = config_dict.placeholder(float)  # riemannian: added to the factors' Gram matrices
    c.weight_decay = 0.0
    c.label_smoothing = 0.0  # share of the target spread over all classes
    c.clip = 1.0  # largest gradient norm of a member; 0: off
    # Activations that the backward pass recomputes: none | full (all of a layer's) | dots (all but
    # the outputs of matrix products)
    c.remat = config_dict.FieldReference("none", field_type=object)
    # "optimizer": its state stays in the host's memory except during the update; one step per call
    c.offload = config_dict.placeholder(str)
    c.parallel = "auto"  # what is split over devices: members | batch | pmap | none
    # Mesh that the base is divided over, such as "fsdp=4,tensor=2" (docs/many_machines.md); "auto":
    # none if it fits on each device
    c.mesh = "auto"
    c.width = 0  # members computed side by side in a program; 0: automatic
    c.memory_gb = 0.0  # memory limit of one program; 0: what the device has
    return c


def _eval() -> ConfigDict:
    """Evaluation."""
    c = ConfigDict()
    c.every = 50  # steps; checkpoints are written at the same points
    c.batch_size = 32
    c.examples = 256  # validation rows of every evaluation
    # Test rows, measured before the first step and after the last, never in between; None: all; 0:
    # no test rows, and those of a task without test files count as validation rows
    c.test = config_dict.placeholder(int)
    # Further tasks that every evaluation measures too, and with them the KL from the base to the
    # member on this task's rows: (("stories", {"name": "text", "path": FILE}),), docs/forgetting.md
    c.also = ()
    c.keep = "last"  # step that is exported and tested; or "best": of the lowest validation loss
    c.generate = 0  # prompts that each member completes after training, to score the text; 0: none
    c.beams = 1  # of beam search; 1: greedy
    c.new_tokens = 64
    c.length_penalty = 1.0
    c.no_repeat_ngram = 0
    # Images of each of `task.classes`, or of 8 captions, that each member makes after training; 0:
    # none. Those of classes are scored
    c.samples = 0
    c.sample_steps = 50  # of DDIM
    # Prediction without class + this times what the class adds to it (classifier-free guidance)
    c.guidance = 1.0
    # Tasks of lm-evaluation-harness that each member does after training: names or YAML files
    c.harness = ()
    # Your own score, beside the task's: a function or "FILE.py:function" (docs/tasks.md)
    c.score = config_dict.FieldReference(None, field_type=object)
    return c


def _analysis() -> ConfigDict:
    """What is measured and drawn."""
    c = ConfigDict()
    c.report = True
    # Formats in which the report's figures are drawn as images as well: "png", "pdf"; `lorax.report
    # --figures=png,pdf` draws them later. TensorBoard and other trackers show the PNGs
    c.figures = ()
    # Spectrum and leading directions of every update at each evaluation: analysis/trajectory.csv
    c.trajectory = False
    # Share of every update's energy in W's leading and last singular directions, this many of each,
    # in trajectory.csv; 0: not measured. Needs analysis.trajectory
    c.subspaces = 0
    # How much of the span of a lies in the leading directions of the first full gradient, in
    # trajectory.csv. Needs analysis.trajectory; reads `method.batches` batches
    c.first_gradient = False
    # Evaluation rows for linear CKA between the trained model and the base, on the residual stream
    # after each layer: analysis/cka.csv; 0: none
    c.cka = 0
    # Loss of every member when all its updates keep only their k leading singular directions, for
    # k = 0, 1, 2, 4...: analysis/kept_rank.csv
    c.kept_ranks = False
    # Training batches over which the largest eigenvalue of every member's Hessian is measured, at
    # step 0 and after training: `sharpness` in members.csv; 0: not measured
    c.sharpness = 0
    # Number of layers, evenly spread, whose updates the report compares with the base; None: all
    c.layers = config_dict.placeholder(int)
    # Statistics of every update: your own functions, or "FILE.py:function" (docs/analyses.md)
    c.also = ()
    # The answer (docs/reports.md) is the cheapest setting that is as good as the best: that loses
    # at most this share of what the best improves on the base, or the margin if one is given
    c.delta = 0.01
    c.margin = config_dict.placeholder(float)  # in the metric's unit
    c.metric = "loss"  # that settings are compared by; or a score of the task, such as accuracy
    c.level = 0.95  # of intervals; the answer errs at most in 1 - level
    return c


def _search() -> ConfigDict:
    """The smallest dimension that is nearly as good as full fine-tuning, over sweep.dim."""
    c = ConfigDict()
    c.threshold = 0.0  # share of full fine-tuning's gain to reach: 0.9 for d90; 0: no search
    c.metric = "loss"  # or a score of the task, such as accuracy
    c.baseline_lr = ()  # learning rates of full fine-tuning; (): the sweep's
    c.seeds = ()  # of full fine-tuning, LoRA and refinement; (): the sweep's
    c.points = 4  # dimensions that a round of refinement tries inside the bracket
    c.rounds = 1  # rounds of refinement after the sweep
    c.lora_ranks = ()  # LoRA ranks to compare with, at every learning rate of the sweep
    return c


def _sweep() -> ConfigDict:
    """What is swept: a tuple of values per axis."""
    c = ConfigDict()
    for axis in axes():
        c[axis] = ()
    # Any other key: {"train.warmup": (0, 50)}
    c.axes = config_dict.FieldReference((), field_type=object)
    c.zip = ()  # (("rank", "targets"),) ties two axes so that they advance together
    # Learning rates at which full fine-tuning is trained beside the sweep, with the same seeds, as
    # the line to compare with; (): none
    c.full_lr = ()
    # "lr": at every point of the other axes only the best rate is trained to the end (halving)
    c.tune = config_dict.placeholder(str)
    return c


def _halving() -> ConfigDict:
    """How `sweep.tune` finds the best value of its axis: by successive halving."""
    c = ConfigDict()
    c.rungs = (0.125, 0.25)  # shares of train.steps at which the values are compared
    c.keep = 1 / 3  # share of a point's values that go on after each rung, rounded; at least one
    # The first seeds that race; the best value is then trained with the others. None: all race
    c.seeds = config_dict.placeholder(int)
    return c


def _field(key: catalogue.Key):
    """The ConfigDict field of a method's key; it accepts only values of the key's type."""
    if key.words:
        return config_dict.FieldReference(key.default, field_type=object)
    return config_dict.placeholder(key.kind) if key.default is None else key.default


def axes() -> dict[str, str]:
    """{sweep axis: the key that it sets}, the fastest axis last. `sweep.axes` may hold others."""
    first = {"method": "method.name", "base": "base", "quant": "quant"}
    return first | catalogue.axes() | LAST


#: The axes that vary faster than those of a method's hyperparameters.
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
    "draw_seed": "seeds.data",
    "order_seed": "seeds.order",
    "start_seed": "seeds.start",
    "seed": "seed",
}


def axis_of(key: str) -> str:
    """The name of a key's axis: "lr" for "train.lr", "std" for "method.std", or the key itself if
    it has no unique shorter name."""
    short = {key: axis for axis, key in axes().items()}
    last = key.removeprefix("method.")
    return short.get(key, key if last in _defaults() else last)


def key_of(axis: str) -> str:
    """The key that an axis sets; inverse of `axis_of`."""
    return axes().get(axis) or (axis if axis in _defaults() else f"method.{axis}")


#: Keys of config.sweep that are no axes.
NO_AXES = ("axes", "zip", "tune", "full_lr")


def swept(sweep: Mapping) -> dict[str, tuple]:
    """{axis: its values}, the slowest axis first. sweep: that section of a config or of a run's
    config.json."""
    short = {axis: values for axis, values in sweep.items() if axis not in NO_AXES}
    others = {axis_of(key): values for key, values in dict(sweep.get("axes") or {}).items()}
    order = sorted(short | others, key=_position)
    return {axis: values for axis in order if (values := (short | others)[axis])}


def shared_axes(names: Iterable[str]) -> tuple[str, ...]:
    """The axes that full fine-tuning is repeated along in a search: all except learning rate and
    seed, which a search chooses itself, and a method's hyperparameters other than layers."""
    is_shared = lambda axis: axis == "layers" or not key_of(axis).startswith("method.")
    return tuple(axis for axis in names if is_shared(axis) and axis not in ("lr", "seed"))


#: Keys that may change when a run is continued: they matter only once a member is trained, or limit
#: how much is computed at once. What was trained and measured before is kept.
REVISABLE = (
    "eval.generate",
    "eval.beams",
    "eval.new_tokens",
    "eval.length_penalty",
    "eval.no_repeat_ngram",
    "eval.samples",
    "eval.sample_steps",
    "eval.guidance",
    "eval.harness",
    "analysis.report",
    "analysis.figures",
    "analysis.cka",
    "analysis.kept_ranks",
    "analysis.sharpness",
    "analysis.layers",
    "analysis.also",
    "analysis.delta",
    "analysis.margin",
    "analysis.metric",
    "analysis.level",
    "train.memory_gb",
    "train.mesh",
    "track",
)


class Member(NamedTuple):
    """A point of a sweep. name: "rank=4,seed=1"; point: {axis: value}; config: the member's."""

    index: int
    name: str
    point: dict
    config: ConfigDict


def members(config: ConfigDict) -> list[Member]:
    """The product of the sweep's axes (tied ones advance together), the last axis fastest; then
    full fine-tuning at the rates of `sweep.full_lr`.

    A search trains further members: see `lorax.search.members`.

    Raises ValueError that names the key for an empty or malformed axis, a value of the wrong type,
    and a value out of range.
    """
    check_keys(config)
    _spell(config)
    _check_axes(config.sweep)
    axes = {axis: _values(config, axis, given) for axis, given in swept(config.sweep).items()}
    if "n_train" in axes and config.task.packing:
        raise ValueError("sweep.n_train: rows that are packed (task.packing) can't be counted off")
    if "steps" in axes and (config.train.epochs or "train.epochs" in axes):
        raise ValueError(f"sweep.steps: {axes['steps']} given, but train.epochs decides the steps")
    blocks = _tied(axes, config.sweep.zip)
    points = [dict(itertools.chain(*parts)) for parts in itertools.product(*blocks)]
    points += _full(config, points)
    return [member(config, index, point) for index, point in enumerate(points)]


def _full(config: ConfigDict, points: list[dict]) -> list[dict]:
    """The points of full fine-tuning: at every rate of `sweep.full_lr`, along every axis that is
    not about a method, the rate or a quantised base, which can't be trained in full."""
    rates = config.sweep.full_lr
    if not rates:
        return []
    if "full" in swept(config.sweep).get("method", (config.method.name,)):
        raise ValueError(f"sweep.full_lr: {rates} given, but the sweep trains method 'full' itself")
    if config.search.threshold:
        raise ValueError(f"sweep.full_lr: {rates} given; a search has search.baseline_lr for it")
    numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
    if not numbers or len(set(rates)) < len(rates):
        raise ValueError(f"sweep.full_lr: {rates} given, must be different learning rates")
    differs = lambda axis: axis in ("lr", "quant") or key_of(axis).startswith("method.")
    shared = conditions(points, [axis for axis in points[0] if not differs(axis)])
    whole = {"method": "full"} | ({"quant": None} if config.quant or config.sweep.quant else {})
    return [whole | {"lr": float(rate)} | point for rate in rates for point in shared]


def conditions(points: Iterable[dict], axes: Iterable[str]) -> list[dict]:
    """The points along these axes alone, each once, in their order."""
    found = []
    for point in points:
        condition = {axis: point[axis] for axis in axes}
        if condition not in found:
            found.append(condition)
    return found


def member(config: ConfigDict, index: int, point: dict) -> Member:
    """The member at {axis: value}; with `train.epochs` its steps are 0 until the rows are counted
    (`with_n_steps`). Raises ValueError for a value out of range."""
    point = {axis: point[axis] for axis in sorted(point, key=_position)}
    values = config.to_dict()
    for section in ("sweep", "search", "halving"):  # these belong to the run as a whole
        values.pop(section, None)
    for axis, value in point.items():  # `_values` has checked; a rank may be a number or a word
        section, _, name = key_of(axis).rpartition(".")
        (values[section] if section else values)[name] = value
    member_config = ConfigDict(values)
    ranges.check(flat(member_config), _defaults())
    also(member_config)  # raises on mistakes
    if member_config.train.epochs:
        member_config.train.steps = 0
    name = ",".join(f"{axis}={_show(value)}" for axis, value in point.items()) or "only"
    return Member(index, name, point, member_config.lock())


def also(settings: ConfigDict) -> dict[str, dict]:
    """{name: its `config.task`, with every key} of the further tasks of `eval.also`. settings: a
    member's config. Raises ValueError as `named_tasks` does."""
    return named_tasks(settings, "eval.also")


def named_tasks(settings: ConfigDict, field: str) -> dict[str, dict]:
    """{name: its `config.task`, with every key} of a field that names tasks.

    Raises ValueError, which begins with the field, for anything except pairs of a name and the keys
    of a task, a name that comes twice, a key that is none, and a value that it can't have.
    """
    found = {}
    for pair in flat(settings)[field]:
        if not _names_a_task(pair):
            right = 'pairs like ("stories", {"name": "text", "path": FILE})'
            raise ValueError(f"{field}: {pair!r} given, must be {right}")
        name, keys = pair
        if name in found:
            raise ValueError(f"{field}: {name!r} names two tasks; each needs its own name")
        try:
            found[name] = _named_task(settings, dict(keys))
        except ValueError as error:
            raise ValueError(f"{field}: {name}: {error}") from None
    return found


_SHORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # it becomes a part of columns' names


def _names_a_task(pair) -> bool:
    """Whether a value is a pair (name, {"name": task, key: value})."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    name, keys = pair
    named = isinstance(name, str) and _SHORT_NAME.fullmatch(name)
    return bool(named) and isinstance(keys, Mapping) and "name" in keys


def _named_task(settings: ConfigDict, keys: dict) -> dict:
    """The whole `config.task` with these keys. Raises ValueError."""
    task = _task()
    for key, value in keys.items():
        check_key(f"task.{key}")
        try:
            task[key] = tuple(value) if isinstance(value, list) else value
        except TypeError:
            kind = task.get_type(key).__name__
            raise ValueError(f"task.{key}: {value!r} given, must be of type {kind}") from None
    values = flat(settings) | {"seeds.data": None}
    ranges.check(values | flat(task, "task."), _defaults())
    return task.to_dict()


def with_n_steps(member: Member, steps: int) -> Member:
    """The member with as many steps as its `train.epochs` makes."""
    settings = member.config.copy_and_resolve_references()
    settings.train.steps = steps
    return member._replace(config=settings.lock())


def seed_of(settings: ConfigDict, what: str) -> int:
    """The seed of a member's "start" or "order": that of `config.seeds`, else `config.seed`.
    settings: the member's config."""
    return settings.seed if settings.seeds[what] is None else settings.seeds[what]


# -------------------------------------------------------------------------------------------- axes

#: Sections whose keys can't be swept, and why.
WHOLE = {
    "sweep": "it defines the sweep",
    "search": "a search is about the whole run",
    "halving": "halving is about the whole run",
    "analysis": "analysis and report are about the whole run",
    "track": "trackers follow the whole run",
    "sequence": "it makes several runs",
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
    """An axis' place in the order of all axes; those of `sweep.axes` precede the learning rate."""
    order = list(axes())
    return order.index(axis if axis in order else "lr") - 0.5 * (axis not in order)


def _tied(axes: dict[str, tuple], zip_: tuple) -> list[list[tuple]]:
    """The blocks of axes that advance together, slowest first. A block is a list of steps, a step a
    tuple of pairs (axis, value). Raises ValueError for a malformed tie and for repeated steps."""
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
            raise ValueError(f"sweep.{' and '.join(block)}: a value occurs twice in {shown}")
        blocks.append([tuple(zip(block, step, strict=True)) for step in steps])
    return blocks


def _values(config, axis: str, values) -> tuple:
    """The values of an axis in its key's type. Raises ValueError for a value of another type."""
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
    """(type of a key's values, whether None is allowed, words allowed in place of a value)."""
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
    """Members with the same key can share one compiled program: they differ only in data."""
    return json.dumps(_of_group(member), sort_keys=True)


def _of_group(member: Member) -> dict:
    """{key: value} of the settings that members of one program must share."""
    values = flat(member.config)
    row = catalogue.ROWS.get(values["method.name"], catalogue.Row("", "", ()))
    splits = {}
    for key, separate in row.splits.items():
        value = values[f"method.{key}"]
        splits[f"method.{key}"] = separate(value) if callable(separate) else value in separate
    data = {f"method.{name}" for name in row.varies}
    data |= {"train.lr", "train.weight_decay", "task.n_train"}
    data |= {"seed", "seeds.start", "seeds.order"}
    return {key: value for key, value in values.items() if key not in data} | splits


def grouped(members: Iterable[Member]) -> list[list[Member]]:
    """Groups of members that can share a program, in the order in which they run."""
    groups = {}
    for member in members:
        groups.setdefault(group_key(member), []).append(member)
    return sorted(groups.values(), key=lambda group: group[0].index)


def differences(groups: list[list[Member]]) -> list[str]:
    """The keys in which the groups differ; a method's own keys only among groups of that method."""
    values: dict[tuple, list] = {}
    for of_group in (_of_group(group[0]) for group in groups):
        for key, value in of_group.items():
            own = key.startswith("method.") and key != "method.name"
            values.setdefault((key, of_group["method.name"] if own else None), []).append(value)
    differing = (key for (key, _), found in values.items() if any(x != found[0] for x in found))
    return list(dict.fromkeys(differing))


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
    """Raises ValueError, which suggests the nearest key, if `key` ("train.lr") does not exist."""
    if key not in _defaults():
        raise ValueError(f"{where}config has no key {key!r}{nearest(str(key), _defaults())}")


def may_be_none(key: str) -> bool:
    """Whether None is a value of a key: those whose default it is."""
    return _defaults().get(key, "") is None


def check_keys(config) -> None:
    """Raises ValueError if a config lacks a key of the default or has an unknown one."""
    have = flat(config)
    for key in have:
        check_key(key)
    for key in _defaults():
        if key not in have:
            raise ValueError(f"config lacks the key {key!r}; start from lorax.config.default()")


def _spell(config, prefix: str = "") -> None:
    """Replace every function in a config by its name "FILE.py:function"."""
    for key, value in config.items():
        name = prefix + key
        if isinstance(value, ConfigDict):
            _spell(value, f"{name}.")
            continue
        spelled = outside.spell(value, name)
        if spelled != value:
            with config.ignore_type():
                config[key] = spelled


def _defaults() -> dict:
    """{"train.lr": its default} of every key, with the keys of all registered methods."""
    return _defaults_with(tuple(catalogue.keys()))


@functools.cache
def _defaults_with(keys: tuple[str, ...]) -> dict:
    return flat(default())


@functools.cache
def _optional() -> dict[str, type]:
    """{key: type of its values} of the keys whose default is None."""
    whole = default()
    sections = {"": whole} | {key: value for key, value in whole.items() if key in SECTIONS}
    return {
        f"{section}.{name}".lstrip("."): values.get_type(name)
        for section, values in sections.items()
        for name, value in values.items()
        if value is None
    }


SECTIONS = ("seeds", "task", "train", "eval", "analysis")


def flat(config, prefix: str = "") -> dict:
    """{"train.lr": value} of every key of a config."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
