"""The methods, one row each, and the config keys of their hyperparameters. This doesn't import JAX.

A row says where a method's function is, which hyperparameters it takes, and which of them may
differ between members of one compiled program. `lorax.config` makes the keys of `config.method` and
the axes of `config.sweep` from the rows, including those that a user's file registers:

    @methods.register("peanut", varies=("rank", "gain", "targets", "layers"))
    def peanut(rank: int = 8, gain: float = 1.0, targets=("q", "v"), layers=None):
        ...  # returns a `lorax.methods.Method`

adds --config.method.gain and config.sweep.gain, and a column `gain` to the tables of a run.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lorax import outside
from lorax.errors import nearest


class Key(NamedTuple):
    """A key of `config.method`: the type of its values, the default (None: the method's default),
    one line of help, and words that are valid in place of a value."""

    kind: type
    default: object = None
    help: str = ""
    words: tuple[str, ...] = ()


class Row(NamedTuple):
    """A method.

    where: the function from hyperparameters to the `Method`, or its "module:name".
    hyperparameters: their names. varies: keys of `config.method` that may differ between members of
    one program because they change only data or padding; any other difference needs another
    program. splits: {key in `varies`: values that need a separate program, or a function: members
    with values for which it returns something else need separate ones}. peft: PEFT's name for
    the method, None if PEFT lacks it. keys: the keys of `config.method` that the method adds. pair:
    whether it trains two factors path/a and path/b of each matrix, whose product times the constant
    path/s is the update, as `train.optimizer` "riemannian" and "lora-muon" need.
    """

    name: str
    where: Callable | str
    hyperparameters: tuple[str, ...]
    varies: tuple[str, ...] = ()
    splits: Mapping[str, tuple | Callable] = types.MappingProxyType({})
    peft: str | None = None
    keys: Mapping[str, Key] = types.MappingProxyType({})
    pair: bool = False

    @property
    def function(self) -> Callable:
        """The method's function, imported if need be."""
        if callable(self.where):
            return self.where
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def file(self) -> str | None:
        """The file that registered the method, None for a method of lorax."""
        return None if isinstance(self.where, str) else inspect.getsourcefile(self.where)


#: The keys of `config.method`, except those that users' methods add.
KEYS = {
    "rank": Key(int, 8, "of the update", words=("auto",)),  # "auto": by evidence
    "alpha": Key(float, 16.0, "sets the scale s together with the rank"),
    "scaling": Key(str, "lora", "lora: s = alpha / r; rslora: alpha / sqrt(r); fixed: alpha"),
    "init": Key(
        str,
        "kaiming",
        "of a: kaiming, gaussian, orthonormal; of b: init-b; of both: both, both-kept, orthogonal; "
        "or computed from the base: pissa, pissa-fast, milora, olora, loftq; or from the first "
        "training batches: eva, corda, corda-kpm, lora-ga, lora-ga-paper, lora-one",
    ),
    "targets": Key(
        tuple,
        None,
        "q k v o up gate down embed head, attention mlp conv all-linear, re:REGEX; auto:N: the N "
        "highest-ranked by the first batches, among those that the other words select",
    ),
    "budget": Key(int, None, "number of trainable parameters, for auto"),
    "layers": Key(tuple, None, "layer indices; None: all"),
    "dropout": Key(float, 0.0, "on the adapter's input"),
    "full": Key(
        tuple, (), "parameters trained in full: classifier biases norms, words of targets, re:REGEX"
    ),
    "dtype": Key(str, "float32", "of the trained parameters"),
    "parameters": Key(tuple, None, "full: which parameters are trained"),
    "feedforward": Key(tuple, None, "ia3: targets whose input is scaled"),
    "ratio": Key(float, None, "lora+: learning rate of b over that of a"),
    "target_rank": Key(int, None, "adalora: mean rank at the end"),
    "tinit": Key(int, None, "adalora: steps before the budget shrinks"),
    "tfinal": Key(int, None, "adalora: steps after it has shrunk"),
    "every": Key(int, None, "adalora: steps between two prunings"),
    "beta1": Key(float, None, "adalora: decay of the mean sensitivity"),
    "beta2": Key(float, None, "adalora: decay of its deviation"),
    "orthogonal": Key(float, None, "adalora: weight of the penalty"),
    "factor": Key(int, None, "lokr: size of the first factor"),
    "decompose_both": Key(bool, None, "lokr: the first factor is a product as well"),
    "d_initial": Key(float, None, "vera: initial scale of a's columns"),
    "projection_seed": Key(
        int, None, "vera, randlora, tinylora: seed of what is random and frozen"
    ),
    "mini_rank": Key(int, None, "miss: outputs that do not share"),
    "numbers": Key(int, None, "tinylora: trained numbers of a group of matrices"),
    "tying": Key(float, None, "tinylora: 0: each matrix is a group, 1: all are one"),
    "mask": Key(str, None, "shira: which entries are trained, random | magnitude"),
    "std": Key(float, None, "prefix, prompt, lora-xs, fourierft: deviation of the initial values"),
    "tokens": Key(int, None, "prefix, prompt, llama-adapter: number of virtual tokens"),
    "dim": Key(int, None, "subspace, said, lora-subspace: the dimension d"),
    "projection": Key(str, None, "subspace: fastfood | sparse | dense"),
    "granularity": Key(
        str, None, "subspace: one P for everything or one per tensor, global | tensor"
    ),
    "scales": Key(str, None, "said: one trained scale per layer | tensor"),
    "activation": Key(str, None, "houlsby, pfeiffer: activation function"),
    "block_size": Key(int, None, "oft: rows of a block that is turned by itself"),
    "neumann": Key(int, None, "oft: terms of the rotation's series; 0: the exact rotation"),
    "frequencies": Key(int, None, "fourierft: trained numbers of a matrix"),
    "spectral_scale": Key(float, None, "fourierft: the scale of the update"),
    "places_seed": Key(int, None, "fourierft: seed of the frequencies that are trained"),
    "blocks": Key(int, None, "gralora: parts k of a matrix's inputs and of its outputs"),
    "batches": Key(int, None, "training batches that the initialisation reads; None: 8"),
}
#: The keys that are axes of a sweep, in order; keys of users' methods come after them.
SWEPT = ("targets", "layers", "init", "scaling", "alpha", "rank", "target_rank", "tokens", "dim")
SWEPT += ("blocks", "block_size", "frequencies", "numbers", "tying", "mini_rank", "mask")
SWEPT += ("projection", "granularity", "dropout")
#: Names that a hyperparameter can't have: a member's other fields, and axes that set other keys.
RESERVED = (
    "member",
    "name",
    "group",
    "method",
    "setting",
    "status",
    "zip",
    "axes",
    "tune",
    "scale",
)
RESERVED += ("base", "quant", "lr", "weight_decay", "steps", "batch_size", "n_train", "shuffle")
RESERVED += ("planted_rank", "noise", "inputs", "data_seed", "seed", "trainable_params")
RESERVED += ("draw_seed", "order_seed", "start_seed")

#: Initialisations whose product a0 b0 is subtracted from the base: two more factors per matrix.
TAKEN_OFF = ("both", "pissa", "pissa-fast", "milora", "olora", "eva", "corda", "corda-kpm")
TAKEN_OFF += ("lora-ga", "lora-ga-paper")


def _lora(name, function, takes, peft="LORA", pair=True):
    varies = ("rank", "alpha", "scaling", "init", "targets", "layers", "dropout", "ratio")
    varies += ("budget", "batches")
    return Row(
        name, f"lorax.methods.lora:{function}", takes, varies, {"init": TAKEN_OFF}, peft, pair=pair
    )


def _odd_part(size: int | None) -> int:
    """The largest odd divisor: of two block sizes that share it, one divides the other."""
    size = size or 1
    return size // (size & -size)


_LORA = ("rank", "alpha", "scaling", "init", "targets", "layers", "dropout", "ranks")
_LOHA = ("rank", "alpha", "scaling", "targets", "layers", "dropout")
_LOKR = ("rank", "alpha", "scaling", "factor", "decompose_both", "targets", "layers", "dropout")
_ADALORA = ("rank", "alpha", "target_rank", "targets", "layers", "dropout")
_ADALORA += ("tinit", "tfinal", "every", "orthogonal", "beta1", "beta2")
_VERA = ("rank", "d_initial", "projection_seed", "targets", "layers", "dropout")
_LORA_XS = ("rank", "alpha", "scaling", "std", "targets", "layers", "dropout")
_TINYLORA = ("rank", "numbers", "tying", "projection_seed", "targets", "layers", "dropout")
_HIRA = ("rank", "targets", "layers", "dropout")
_SHIRA = ("rank", "mask", "targets", "layers")
_MISS = ("rank", "mini_rank", "targets", "layers", "dropout")
_WHOLE = ("parameters", "layers", "full")
_BOTTLENECK = ("rank", "activation", "targets", "layers")
_SUBSPACE = ("dim", "projection", "granularity")
_FACTORS = ("rank", "alpha", "scaling", "init", "targets")
_OFT = ("block_size", "neumann", "targets", "layers")
_FOURIERFT = ("frequencies", "spectral_scale", "places_seed", "std", "targets", "layers")
_HRA = ("rank", "targets", "layers")
_RANDLORA = ("rank", "alpha", "scaling", "projection_seed", "targets", "layers", "dropout")
_GRALORA = ("rank", "alpha", "scaling", "blocks", "targets", "layers", "dropout")

#: name -> row of every registered method.
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _lora("lora", "lora", _LORA),
        _lora("rslora", "rslora", tuple(key for key in _LORA if key != "scaling")),
        _lora("dora", "dora", _LORA),
        _lora("lora-fa", "lora_fa", _LORA, pair=False),
        _lora("lora+", "lora_plus", (*_LORA, "ratio")),
        _lora("frozen-b", "frozen_b", _LORA, pair=False),
        Row("lora-xs", "lorax.methods.lora_xs:lora_xs", _LORA_XS, _LORA_XS),
        Row("adalora", "lorax.methods.adalora:adalora", _ADALORA, _ADALORA, peft="ADALORA"),
        Row("loha", "lorax.methods.kronecker:loha", _LOHA, _LOHA, peft="LOHA"),
        Row("lokr", "lorax.methods.kronecker:lokr", _LOKR, _LOHA, peft="LOKR"),
        Row("vera", "lorax.methods.vera:vera", _VERA, _VERA, peft="VERA"),
        Row(
            "miss",
            "lorax.methods.miss:miss",
            _MISS,
            ("rank", "targets", "layers", "dropout"),
            peft="MISS",
        ),
        Row("tinylora", "lorax.methods.tinylora:tinylora", _TINYLORA, _TINYLORA[1:]),
        Row("hira", "lorax.methods.hira:hira", _HIRA, _HIRA, peft="HIRA"),
        Row("shira", "lorax.methods.shira:shira", _SHIRA, _SHIRA, peft="SHIRA"),
        Row("full", "lorax.methods.full:full", _WHOLE),
        Row("bitfit", "lorax.methods.full:bitfit", ("layers", "full")),
        Row("ln-tuning", "lorax.methods.full:ln_tuning", ("layers", "full"), peft="LN_TUNING"),
        Row(
            "ia3",
            "lorax.methods.scaling:ia3",
            ("targets", "feedforward", "layers"),
            ("targets", "layers"),
            peft="IA3",
        ),
        Row(
            "houlsby",
            "lorax.methods.bottleneck:houlsby",
            (*_BOTTLENECK, "full"),
            ("rank", "targets", "layers"),
        ),
        Row(
            "pfeiffer",
            "lorax.methods.bottleneck:pfeiffer",
            _BOTTLENECK,
            ("rank", "targets", "layers"),
        ),
        Row(
            "prefix",
            "lorax.methods.prefix:prefix",
            ("tokens", "std", "layers"),
            ("layers", "std"),
            peft="PREFIX_TUNING",
        ),
        Row(
            "prompt",
            "lorax.methods.prefix:prompt",
            ("tokens", "std"),
            ("std",),
            peft="PROMPT_TUNING",
        ),
        Row(
            "llama-adapter",
            "lorax.methods.prefix:llama_adapter",
            ("tokens", "layers"),
            ("layers",),
            peft="ADAPTION_PROMPT",
        ),
        Row("subspace", "lorax.methods.subspace:subspace", (*_SUBSPACE, *_WHOLE), ("dim",)),
        Row("said", "lorax.methods.subspace:said", (*_SUBSPACE, "scales", *_WHOLE), ("dim",)),
        Row(
            "lora-subspace",
            "lorax.methods.subspace:lora_subspace",
            (*_SUBSPACE, *_FACTORS),
            ("dim",),
        ),
        Row("gralora", "lorax.methods.gralora:gralora", _GRALORA, _LOHA, peft="GRALORA"),
        Row(
            "oft",
            "lorax.methods.oft:oft",
            _OFT,
            ("block_size", "targets", "layers"),
            {"block_size": _odd_part},
            peft="OFT",
        ),
        Row(
            "fourierft",
            "lorax.methods.fourierft:fourierft",
            _FOURIERFT,
            _FOURIERFT,
            peft="FOURIERFT",
        ),
        Row("hra", "lorax.methods.hra:hra", _HRA, _HRA, peft="HRA"),
        Row(
            "randlora", "lorax.methods.randlora:randlora", _RANDLORA, _RANDLORA[1:], peft="RANDLORA"
        ),
    )
}


def keys(without: str | None = None) -> dict[str, Key]:
    """{name: Key} of `config.method`, including the keys that users' methods add, except those of
    the method `without`."""
    rows = [row for row in ROWS.values() if row.name != without]
    return KEYS | {name: key for row in rows for name, key in row.keys.items()}


def axes() -> dict[str, str]:
    """{axis of a sweep: the key that it sets}, for the hyperparameters of methods."""
    added = [name for row in ROWS.values() for name in row.keys]
    return {name: f"method.{name}" for name in dict.fromkeys((*SWEPT, *added))}


def row(name: str) -> Row:
    """The row of a method. Raises ValueError for a name that is not registered."""
    if name not in ROWS:
        raise ValueError(
            f"method.name: {name!r} is not one of {', '.join(ROWS)}{nearest(name, ROWS)}"
        )
    return ROWS[name]


# ------------------------------------------------------------------------------- a user's method

TYPES = (bool, int, float, str, tuple)  # of a hyperparameter's values


def register(
    name: str,
    varies: tuple[str, ...] = (),
    splits: Mapping[str, tuple | Callable] | None = None,
    help: Mapping[str, str] | None = None,
    pair: bool = False,
) -> Callable[[Callable], Callable]:
    """Decorator that registers a function of hyperparameters as the method `name`.

    Every hyperparameter needs a default. One that is not in `KEYS` becomes a key of `config.method`
    (None means the function's default) and an axis of `config.sweep`. Its type comes from the
    annotation, or else from the default: int, float, bool, str or tuple.

    varies, splits, pair: see `Row`. A hyperparameter in `varies` must be stored in the trees of
    `State`: the functions of one member's `Method` are called with the trees of all members.
    help: {hyperparameter: one line}.

    A second registration of a name replaces the first. Raises ValueError that names method and
    hyperparameter for the name of one of lorax's methods, and for a hyperparameter whose name, type
    or default a key can't have.
    """

    def enter(function: Callable) -> Callable:
        if name in ROWS and isinstance(ROWS[name].where, str):
            raise ValueError(f"method {name!r}: lorax has one of this name; choose another")
        parameters = inspect.signature(function).parameters
        try:
            hints = typing.get_type_hints(function)
        except NameError as error:  # in an annotation
            raise ValueError(f"method {name!r}: {error}") from None
        kinds = {
            field: _kind(name, parameter, hints.get(field))
            for field, parameter in parameters.items()
        }
        for field in (*varies, *(splits or {}), *(help or {})):
            if field not in parameters:
                raise ValueError(
                    f"method {name!r}: has no hyperparameter {field!r}, only "
                    f"{', '.join(parameters)}{nearest(field, parameters)}"
                )
        known_keys = keys(without=name)
        for field, kind in kinds.items():
            known = known_keys.get(field, Key(kind)).kind
            if kind not in (None, known) and (kind, known) != (int, float):
                raise ValueError(
                    f"method {name!r}: {field} is {kind.__name__}, but config.method.{field} is "
                    f"{known.__name__}; choose another name or type"
                )
        lines = help or {}
        new = {f: Key(kind, None, lines.get(f, "")) for f, kind in kinds.items() if f not in KEYS}
        ROWS[name] = Row(
            name, function, tuple(parameters), varies, splits or {}, keys=new, pair=pair
        )
        return function

    return enter


def _kind(method: str, parameter: inspect.Parameter, hint) -> type | None:
    """The type of a hyperparameter's values; None if only `KEYS` says it."""
    field, default = parameter.name, parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ValueError(f"method {method!r}: *{field} is not a hyperparameter; name each of them")
    if default is parameter.empty:
        raise ValueError(f"method {method!r}: {field} has no default; give it one")
    if field in RESERVED:
        raise ValueError(f"method {method!r}: {field!r} is reserved by lorax; choose another name")
    if hint is None and default is not None:
        hint = next((kind for kind in TYPES if isinstance(default, kind)), type(default))
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(t) or t for t in (typing.get_args(hint) if union else (hint,))]
    kinds = [kind for kind in kinds if kind not in (None, types.NoneType)]
    if not kinds and field in KEYS:
        return None
    if len(kinds) != 1 or kinds[0] not in TYPES:
        known = ", ".join(kind.__name__ for kind in TYPES)
        raise ValueError(
            f"method {method!r}: {field} needs a type of {known}, as in {field}: float = 1.0"
        )
    return kinds[0]


def read(file: str) -> types.ModuleType:
    """Run a Python file, which registers its methods, and return its module.

    Raises FileNotFoundError, and ValueError where the file fails.
    """
    return outside.run_file(file, "--method")
