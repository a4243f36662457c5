"""The values that the keys of a config may have, checked before anything starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lorax import catalogue
from lorax.errors import nearest
from lorax.meshes import parse
from lorax.outside import is_name

FLOAT32_MAX, FLOAT32_MIN = 3.4028234e38, 1.1754944e-38  # the smallest of full precision
TRACKERS = ("tensorboard", "wandb", "trackio")
BELOW_1 = 1 - 2**-24  # the largest


class Rule(NamedTuple):
    """right: what a value must be, in words. fits(value): whether it is. keys: the keys with such
    values."""

    right: str
    fits: Callable[[Any], bool]
    keys: tuple[str, ...]


def _in(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _is_rank(value) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value == "auto" or (whole and value >= 1)


def _are_classes(value) -> bool:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    return isinstance(value, tuple) and all(map(whole, value)) and len({*value}) == len(value)


RULES = (
    Rule(
        "must be the name of a base, or a function that returns a module",
        lambda v: isinstance(v, str) and v != "",
        ("base",),
    ),
    Rule(
        "must be at least 1",
        lambda v: v >= 1,
        _in("train", "batch_size", "seq_len", "accumulate")
        + _in("eval", "every", "batch_size", "examples", "beams", "new_tokens", "sample_steps"),
    ),
    Rule(
        "must not be negative",
        lambda v: v >= 0,
        _in("train", "epochs", "warmup", "width", "memory_gb", "weight_decay", "clip", "lr")
        + _in("eval", "generate", "no_repeat_ngram", "samples", "guidance")
        + _in("task", "min_snr")
        + _in("analysis", "cka", "subspaces", "sharpness"),
    ),
    Rule(
        f"must be a tuple of names among {', '.join(TRACKERS)}",
        lambda v: isinstance(v, tuple) and set(v) <= {*TRACKERS},
        ("track",),
    ),
    Rule(
        'must be a tuple of formats among "png" and "pdf"',
        lambda v: isinstance(v, tuple) and set(v) <= {"png", "pdf"},
        ("analysis.figures",),
    ),
    Rule(
        "must be a tuple of names of tasks, or of YAML files",
        lambda v: isinstance(v, tuple) and all(isinstance(name, str) for name in v),
        ("eval.harness",),
    ),
    Rule(
        'must be a tuple of pairs like ("stories", {"name": "text", "path": FILE})',
        lambda v: isinstance(v, tuple),
        ("eval.also", "sequence"),
    ),
    Rule(
        "must be a tuple of different classes, whole numbers from 0 on, such as (8, 9)",
        _are_classes,
        ("task.classes",),
    ),
    Rule(
        'must be functions of an update, or "FILE.py:function"',
        lambda v: isinstance(v, tuple) and all(map(is_name, v)),
        ("analysis.also",),
    ),
    Rule(
        'must be a function of predictions and right answers, or "FILE.py:function"',
        lambda v: v is None or is_name(v),
        ("eval.score",),
    ),
    Rule(
        "must not be negative, or None for all",
        lambda v: v is None or v >= 0,
        ("analysis.layers", "eval.test"),
    ),
    # The always-zero gradient of padding is divided by them.
    Rule(
        f"must be at least {FLOAT32_MIN}, or None",
        lambda v: v is None or v >= FLOAT32_MIN,
        _in("train", "eps", "damping"),
    ),
    Rule(
        "must be in [0, 1)",
        lambda v: 0 <= v <= BELOW_1,
        _in("train", "label_smoothing", "warmup_ratio") + ("method.dropout", "task.class_dropout"),
    ),
    Rule(
        "must be in [0, 1), or None",
        lambda v: v is None or 0 <= v <= BELOW_1,
        _in("train", "b1", "b2"),
    ),
    Rule("must be in (0, 1)", lambda v: 0 < v < 1, _in("analysis", "delta", "level")),
    Rule("must be above 0, or None", lambda v: v is None or v > 0, ("analysis.margin",)),
    Rule("must be in [0, 2**31)", lambda v: 0 <= v < 2**31, ("seed", "task.seed")),
    Rule(
        "must be in [0, 2**31), or None",
        lambda v: v is None or 0 <= v < 2**31,
        _in("seeds", "start", "order", "data"),
    ),
    Rule(
        "must be at least 1 or None",
        lambda v: v is None or v >= 1,
        ("method.batches", "method.budget", "task.n_train"),
    ),
    Rule('must be at least 1, or "auto"', _is_rank, ("method.rank",)),
)
#: {key: the key that it takes the place of, which is then 0 or its default}.
INSTEAD = {"train.epochs": "train.steps", "train.warmup_ratio": "train.warmup"}
#: Keys whose values are one of a few words.
WORDS = {
    **dict.fromkeys(("dtype", "param_dtype", "operands"), ("float32", "bfloat16")),
    "quant": (None, "nf4", "fp4", "int8"),
    "task.loss_on": ("completions", "all"),
    "task.prediction": (None, "epsilon", "v"),
    "train.remat": ("none", "full", "dots"),  # see `lorax.models.layers.over_layers`
    "train.offload": (None, "optimizer"),
    "train.last_batch": ("full", "short", "drop"),
    "train.schedule": ("linear", "cosine", "constant"),
    "train.optimizer": ("adamw", "sgd", "adafactor", "lion", "muon", "riemannian", "lora-muon")
    + ("schedule-free",),
    "eval.keep": ("last", "best"),
    "train.parallel": ("auto", "members", "batch", "pmap", "none"),
}
#: Optimisers that train LoRA's a and b together (`lorax.train.factor_optim`).
PAIRED = ("riemannian", "lora-muon")


def check(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ValueError that names a key whose value is out of range, what was given and what would
    be right. values, defaults: {"train.lr": value} of every key of one member."""

    def need(key, fits, right):
        if not fits:
            raise ValueError(f"{key}: {values[key]!r} given, {right}")

    for rule in RULES:
        for key in rule.keys:
            need(key, rule.fits(values[key]), rule.right)
    for key, words in WORDS.items():
        value = values[key]
        if not isinstance(value, str | None) or value not in words:
            need(key, False, _must_be(key, value, words))
    for key, other in INSTEAD.items():
        alone = not values[key] or values[other] in (0, defaults[other])
        need(key, alone, f"and {other}: {values[other]} as well; set one of them to 0")
    need("train.steps", values["train.steps"] >= (not values["train.epochs"]), "must be at least 1")
    size, parts = values["train.batch_size"], values["train.accumulate"]
    need("train.accumulate", size % parts == 0, f"must divide train.batch_size, {size}")
    if values["seeds.data"] is not None:
        need("seeds.data", not values["task.packing"], "but packed rows (task.packing) stay as are")
        some = values["task.n_train"] is not None
        need("seeds.data", some, "needs a task.n_train, the number of training rows that it draws")
        planted = values["task.name"] == "planted"
        need("seeds.data", not planted, "but task 'planted' draws its rows by task.seed")
    for key in ("analysis.subspaces", "analysis.first_gradient"):
        followed = not values[key] or values["analysis.trajectory"]
        need(key, followed, "needs analysis.trajectory=True: it is measured at each of its points")
    alone = values["train.offload"] is None or values["train.parallel"] != "pmap"
    need("train.offload", alone, 'needs a train.parallel other than "pmap"')
    if values["train.mesh"] != "auto":
        mesh, rows = parse(values["train.mesh"]), size // parts
        alone = values["train.parallel"] == "auto"
        need(
            "train.mesh", alone, f'needs a train.parallel "auto", not "{values["train.parallel"]}"'
        )
        of_batch = "sequences of a batch (train.batch_size / train.accumulate)"
        need("train.mesh", rows % mesh.fsdp == 0, f"its fsdp must divide the {rows} {of_batch}")
    if values["train.optimizer"] == "schedule-free":
        constant, of = values["train.schedule"] == "constant", 'optimizer "schedule-free"'
        need("train.schedule", constant, f'{of} needs "constant": it averages in place of a decay')
        need("train.b1", values["train.b1"] != 0, f"{of} needs one above 0")
        adalora = values["method.name"] == "adalora"
        need("method.name", not adalora, f"{of} can't prune: the pruned values live on in averages")
    if values["train.optimizer"] in PAIRED:
        name, able = values["method.name"], [r.name for r in catalogue.ROWS.values() if r.pair]
        right = f"needs a method with LoRA's two factors, such as {', '.join(able)}; not {name}"
        need("train.optimizer", name in able, right)
    for key, value in values.items():
        if isinstance(value, bool):
            need(key, type(defaults[key]) not in (int, float), "must be a number")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                need(key, abs(number) <= FLOAT32_MAX, "must be finite (in float32)")
            elif isinstance(number, int) and key != "method.budget":
                need(key, abs(number) < 2**31, "must be less than 2**31")


def _must_be(key: str, value, words: tuple) -> str:
    known = [word for word in words if word is not None]
    if key == "train.remat" and isinstance(value, bool):
        near = f'; did you mean "{"full" if value else "none"}"?'
    else:
        near = nearest(str(value), known)
    if len(known) == 1:
        return f"must be {known[0]} or None"
    return f"must be one of {', '.join(known)}{near}"
