"""What a config may hold, and the members that its sweep spells out."""

import importlib.util
import itertools
import json
import math
import pathlib
import re

import pytest

from lorax import config, scales, search

AXES = config.axes()
CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def swept(zip_=(), **axes):
    c = config.default()
    for axis, values in axes.items():
        c.sweep[axis] = values
    c.sweep.zip = zip_
    return c


def changed(**values):
    """A default config with keys like train__lr changed."""
    c = config.default()
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (c[section] if section else c)[name] = value
    return c


# ----------------------------------------------------------------------------------------- default


def test_default_is_locked_and_whole():
    c = config.default()
    assert c.is_locked and all(c[s].is_locked for s in ("task", "method", "train", "eval", "sweep"))
    for axis, key in AXES.items():
        section, _, name = key.rpartition(".")
        assert name in (c[section] if section else c) and c.sweep[axis] == ()
    with pytest.raises(AttributeError, match="locked"):
        c.train.learning_rate = 1.0
    with pytest.raises(AttributeError, match='Did you mean "steps"'):
        _ = c.train.stepss


@pytest.mark.parametrize(
    ("key", "value"),
    [("train__steps", "many"), ("train__steps", 1.5), ("sweep__rank", 4), ("method__layers", 3)],
)
def test_a_wrong_type_is_refused_on_assignment(key, value):
    with pytest.raises(TypeError, match=key.rpartition("__")[2]):
        changed(**{key: value})


# ----------------------------------------------------------------------------------------- members


def test_members_are_the_product_with_the_last_axis_fastest():
    members = config.members(swept(seed=(0, 1), lr=(1e-3, 2), rank=(1, 4)))
    points = [
        dict(zip(("rank", "lr", "seed"), p, strict=True))
        for p in itertools.product((1, 4), (1e-3, 2.0), (0, 1))
    ]
    assert [m.point for m in members] == points
    assert [m.index for m in members] == list(range(8))
    assert [m.name for m in members][:3] == [
        "rank=1,lr=0.001,seed=0",
        "rank=1,lr=0.001,seed=1",
        "rank=1,lr=2,seed=0",
    ]
    for m in members:
        c = m.config
        assert (c.method.rank, c.train.lr, c.seed) == tuple(m.point.values())
        assert isinstance(c.train.lr, float) and c.is_locked and "sweep" not in c
        assert c.method.alpha == 16.0 and c.train.steps == 200  # the rest is as it was


def test_no_sweep_is_one_member():
    (member,) = config.members(config.default())
    assert (member.index, member.name, member.point) == (0, "only", {})


@pytest.mark.parametrize(
    ("axis", "values", "names"),
    [
        ("targets", ("q", ("q", "v"), ["mlp"]), ["targets=q", "targets=q+v", "targets=mlp"]),
        ("layers", (None, (0, -1)), ["layers=None", "layers=0+-1"]),
        ("n_train", (None, 64), ["n_train=None", "n_train=64"]),
        ("dropout", (0, 0.1), ["dropout=0", "dropout=0.1"]),
        ("scaling", ("lora", "fixed"), ["scaling=lora", "scaling=fixed"]),
    ],
)
def test_names_of_members(axis, values, names):
    members = config.members(swept(**{axis: values}))
    assert [m.name for m in members] == names
    section, _, key = AXES[axis].rpartition(".")
    own = [m.config[section][key] for m in members]
    assert [m.point[axis] for m in members] == own
    assert all(isinstance(v, tuple) for v in own if axis == "targets")


def test_tied_axes_move_together():
    c = swept(rank=(1, 2, 4), alpha=(2, 4, 8), seed=(0, 1), zip_=(("alpha", "rank"),))
    names = [m.name for m in config.members(c)]
    assert names == [f"alpha={2 * r},rank={r},seed={s}" for r in (1, 2, 4) for s in (0, 1)]


def test_two_ties():
    tie = (("rank", "targets"), ("lr", "weight_decay"))
    c = swept(
        rank=(8, 4), targets=("q", "attention"), lr=(0.1, 0.2), weight_decay=(0.0, 0.1), zip_=tie
    )
    points = [tuple(m.point.values()) for m in config.members(c)]
    assert points == [
        (targets, rank, lr, decay)
        for targets, rank in ((("q",), 8), (("attention",), 4))
        for lr, decay in ((0.1, 0.0), (0.2, 0.1))
    ]


@pytest.mark.parametrize(
    ("axes", "zip_", "message"),
    [
        (dict(rank=(1, 1)), (), r"sweep.rank: a value occurs twice in \(1, 1\)"),
        (dict(lr=(1, 1.0)), (), "sweep.lr: a value occurs twice"),
        (dict(rank=(1, 2.5)), (), "sweep.rank: values of type int are expected, 2.5 given"),
        (dict(rank=("1",)), (), "expected, '1' given .*--config.sweep.rank=\""),
        (dict(rank=(True,)), (), "sweep.rank: values of type int are expected, True given"),
        (dict(rank=(None,)), (), "sweep.rank: values of type int are expected, None given"),
        (dict(seed=((0, 1),)), (), r"sweep.seed: values of type int are expected, \(0, 1\) given"),
        (dict(targets=(4,)), (), "sweep.targets: values of type tuple are expected, 4 given"),
        (dict(layers=(0, 1)), (), "sweep.layers: values of type tuple are expected, 0 given"),
        (dict(n_train=("all",)), (), "sweep.n_train: values of type int are expected, 'all' given"),
        (dict(lr=("fast",)), (), "sweep.lr: values of type float are expected, 'fast' given"),
        (dict(rank=(1, 2)), (("rank", "lr"),), "sweep.zip: 'lr' is no axis of this sweep.* rank"),
        (dict(rank=(1, 2), seed=(0,)), (("rank", "seed"),), "as many values.*rank 2, seed 1"),
        (dict(rank=(1,), seed=(0,)), (("rank", "seed"),) * 2, "sweep.zip: an axis is tied twice"),
        (dict(rank=(1,)), (("rank", "rank"),), "sweep.zip: an axis is tied twice"),
        (dict(rank=(1,), seed=(0,)), ("rank", "seed"), r"sweep.zip: .* a tuple of ties like \(\("),
        (dict(rank=(1,)), (("rank",),), "sweep.zip: .* a tuple of ties like"),
    ],
)
def test_a_malformed_sweep_is_one_clear_error(axes, zip_, message):
    with pytest.raises(ValueError, match=message):
        config.members(swept(zip_, **axes))


def test_groups_of_different_methods_differ_in_the_method():
    c = swept(rank=(1, 2), full_lr=(1e-3,))
    c.method.init = "pissa"  # full fine-tuning has no initialisation to compare
    groups = config.grouped(config.members(c))
    assert len(groups) == 2 and config.differences(groups) == ["method.name"]


def test_any_key_is_an_axis():
    c = swept(rank=(1, 2), seed=(0, 1))
    c.sweep.axes = {"train.warmup": (0, 50), "method.std": (0.5, 1), "train.b1": (0, 0.9)}
    c.sweep.zip = (("method.std", "train.b1"),)
    members = config.members(c)
    assert (
        len(members) == 16 and members[0].name == "rank=1,std=0.5,train.b1=0,train.warmup=0,seed=0"
    )
    assert members[-1].point == {
        "rank": 2, "train.warmup": 50, "std": 1.0, "train.b1": 0.9, "seed": 1
    }  # fmt: skip
    last = members[-1].config
    assert (last.train.warmup, last.method.std, last.train.b1) == (50, 1.0, 0.9)
    assert len(config.grouped(members)) == 4
    assert config.differences(config.grouped(members)) == ["method.std", "train.b1", "train.warmup"]
    stored = json.loads(c.to_json())["sweep"]
    assert list(config.swept(stored)) == ["rank", "train.warmup", "std", "train.b1", "seed"]


def test_full_fine_tuning_beside_a_sweep_has_the_seeds_and_no_axis_of_the_method():
    c = swept(rank=(1, 4), lr=(1e-2, 2e-2), layers=(None, (0,)), n_train=(8, 64), seed=(0, 1))
    c.sweep.full_lr = (1e-3, 2e-3)
    members = config.members(c)
    full = members[32:]
    assert len(members) == 40 and full[0].config.method.name == "full"
    assert full[0].name == "method=full,lr=0.001,n_train=8,seed=0"
    assert len({member.name for member in full}) == 8
    assert {member.config.train.lr for member in full} == {1e-3, 2e-3}
    c.quant = "nf4"
    assert {member.config.quant for member in config.members(c)[32:]} == {None}


@pytest.mark.parametrize(
    "change, rates, message",
    [
        (dict(method=("lora", "full")), (1e-3,), "the sweep trains method 'full' itself"),
        (dict(rank=(1,)), (1e-3, 1e-3), "must be different learning rates"),
        (dict(rank=(1,)), ("high",), "must be different learning rates"),
    ],
)
def test_full_fine_tuning_beside_a_sweep_is_refused(change, rates, message):
    c = swept(**change)
    c.sweep.full_lr = rates
    with pytest.raises(ValueError, match=f"sweep.full_lr: .*{message}"):
        config.members(c)


def test_a_key_with_a_short_name_is_the_same_axis():
    c = config.default()
    c.sweep.axes = {"train.lr": (1, 2), "quant": (None, "nf4"), "method.name": ("lora", "vera")}
    members = config.members(c)
    assert members[0].point == {"method": "lora", "quant": None, "lr": 1.0}
    assert members[0].name == "method=lora,quant=None,lr=1"


def test_every_key_of_a_member_can_be_swept_by_its_own_value():
    """Whatever its type: axis, key and type are found for each."""
    for key, value in config.flat(config.default()).items():
        if key.partition(".")[0] in config.WHOLE:
            continue
        c = config.default()
        c.sweep.axes = {key: (value,)}
        (member,) = config.members(c)
        assert config.key_of(*member.point) == key and list(member.point.values()) == [value]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"train.warmpu": (0,)}, "sweep.axes: config has no key 'train.warmpu'; did you mean 'tra"),
        ({"train.warmup": 5}, "sweep.axes: train.warmup: 5 given, must be a tuple of values"),
        ({"train.warmup": (0, 1.5)}, "sweep.axes: train.warmup: values of type int .* 1.5 given"),
        ({"train.warmup": ("0",)}, r"--config.sweep.axes=\"{'train.warmup': \(first, second\)}\""),
        ({"train.warmup": (0, -1)}, "train.warmup: -1 given, must not be negative"),
        ({"train.warmup": (1, 1)}, r"sweep.train.warmup: a value occurs twice in \(1, 1\)"),
        ({"train.schedule": ("linear", "linaer")}, "train.schedule: 'linaer' .*did you mean 'line"),
        ({"method.rank": (1, 2)}, "sweep.axes: method.rank is swept by sweep.rank as well"),
        ({"rank": (1, 2)}, "sweep.axes: 'rank' is an axis by itself: give sweep.rank"),
        ({"sweep.rank": ((1,),)}, "sweep.axes: sweep.rank can't be swept: it defines the sweep"),
        (
            {"search.points": (1,)},
            "sweep.axes: search.points can't be swept: a search is about the wh",
        ),
        ({"analysis.report": (True,)}, "analysis.report can't be swept: analysis and report are"),
        ((("train.warmup", (0,)),), r"sweep.axes: .* must be a dictionary like {\"train.warmup\""),
    ],
)
def test_a_key_that_can_not_be_swept_is_one_clear_error(axes, message):
    c = swept(rank=(1, 2))
    c.sweep.axes = axes
    with pytest.raises(ValueError, match=message):
        config.members(c)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({f"train__{k}": 0}, f"train.{k}: 0 given, must be at least 1")
            for k in ("steps", "batch_size", "seq_len", "accumulate")
        ],
        *[
            ({f"eval__{k}": 0}, f"eval.{k}: 0 given, must be at least 1")
            for k in ("every", "batch_size", "examples")
        ],
        *[
            ({f"train__{k}": -1}, f"train.{k}: -1.* given, must not be negative")
            for k in ("epochs", "warmup", "width", "memory_gb", "weight_decay", "clip", "lr")
        ],
        (dict(train__warmup_ratio=1.0), r"train.warmup_ratio: 1.0 given, must be in \[0, 1\)"),
        (dict(train__epochs=2, train__steps=9), "train.epochs: 2.0 given, and train.steps: 9 as"),
        (
            dict(train__warmup_ratio=0.1, train__warmup=5),
            "train.warmup_ratio: 0.1 given, and train.warmup: 5 as well; set one of them to 0",
        ),
        (dict(train__epochs=2, sweep__steps=(200,)), r"sweep.steps: \(200,\) given, but train.ep"),
        (dict(train__last_batch="shor"), "train.last_batch: 'shor' .*did you mean 'short'"),
        (dict(train__eps=0.0), "train.eps: 0.0 given, must be at least"),
        (dict(train__b2=0.99999999), r"train.b2: 0.99999999 given, must be in \[0, 1\)"),
        (dict(task__seed=-1), "task.seed: -1 given"),
        (dict(method__dropout=1.0), r"method.dropout: 1.0 given, must be in \[0, 1\)"),
        (dict(method__batches=0), "method.batches: 0 given, must be at least 1"),
        (dict(method__layers=(0, 2**31)), "method.layers: .* must be less than"),
        (dict(train__steps=True), "train.steps: True given, must be a number"),
        (dict(train__lr=math.nan), "train.lr: nan given"),
        (dict(train__b1=1.0), r"train.b1: 1.0 given, must be in \[0, 1\)"),
        (dict(train__b2=-0.1), "train.b2: -0.1 given"),
        (dict(seed=-1), "seed: -1 given"),
        (dict(seed=2**31), r"seed: 2147483648 given, must be in \[0, 2\*\*31\)"),
        (dict(task__n_train=0), "task.n_train: 0 given, must be at least 1"),
        (dict(train__accumulate=3), "train.accumulate: 3 given, must divide train.batch_size, 16"),
        (dict(dtype="float16"), "dtype: 'float16' given, must be one of .*did you mean 'bfloat16'"),
        (dict(train__schedule="linaer"), "train.schedule: 'linaer' .*did you mean 'linear'"),
        (dict(train__optimizer="schedule-free"), "train.schedule: 'linear' .* needs \"constant\""),
        (
            dict(
                train__optimizer="schedule-free", train__schedule="constant", method__name="adalora"
            ),
            "method.name: 'adalora' given, optimizer .* can't prune",
        ),
        (
            dict(track=("tensorbord",)),
            "track: .*tensorbord.* must be a tuple of names among tensorb",
        ),
        (dict(eval__harness=(1,)), r"eval.harness: \(1,\) given, must be a tuple of names"),
        (dict(train__optimizer="adam"), "train.optimizer: 'adam' .*did you mean 'adamw'"),
        (dict(train__remat="ful"), "train.remat: 'ful' .*none, full, dots; did you mean 'full'"),
        (dict(train__remat=True), 'train.remat: True given, .* did you mean "full"'),
        (dict(train__remat=False), 'train.remat: False given, .* did you mean "none"'),
        (dict(train__offload="adam"), "train.offload: 'adam' given, must be optimizer or None"),
        (
            dict(train__offload="optimizer", train__parallel="pmap"),
            "train.offload: .* other than .pmap",
        ),
        (dict(train__mesh="fsdp=x"), "train.mesh: 'fsdp=x' given, must be auto or sizes of member"),
        (dict(train__mesh="fsdp=2", train__parallel="batch"), "train.mesh: .*parallel .auto., not"),
        (dict(train__mesh="fsdp=3"), "train.mesh: .*its fsdp must divide the 16 sequences"),
        (dict(train__parallel="member"), "train.parallel: 'member' .*did you mean 'members'"),
    ],
)
def test_a_value_out_of_range_is_one_clear_error(values, message):
    with pytest.raises(ValueError, match=message):
        config.members(changed(**values))


FLOATS = [key for key, value in config.flat(config.default()).items() if type(value) is float]
FLOATS += [
    f"method.{name}" for name in ("ratio", "beta1", "beta2", "orthogonal", "d_initial", "std")
]
INTEGERS = [key for key, value in config.flat(config.default()).items() if type(value) is int]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39])
@pytest.mark.parametrize("key", FLOATS)
def test_every_number_is_finite(key, value):
    with pytest.raises(ValueError, match=rf"{key}: .* given"):
        search.members(changed(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize("key", INTEGERS)
def test_every_integer_has_room_in_32_bits(key):
    with pytest.raises(ValueError, match=rf"{key}: 2147483648 given"):
        search.members(changed(**{key.replace(".", "__"): 2**31}))


@pytest.mark.parametrize("axis", ["lr", "weight_decay", "alpha", "dropout", "noise"])
def test_every_number_of_an_axis_is_finite(axis):
    with pytest.raises(ValueError, match=rf"{AXES[axis]}: inf given, must be"):
        config.members(swept(**{axis: (0.1, math.inf)}))


def test_every_rate_of_a_search_is_finite():
    with pytest.raises(ValueError, match="search.baseline_lr: .inf,. given"):
        search.members(changed(search__baseline_lr=(math.inf,)))


@pytest.mark.parametrize("key", config.REVISABLE)
def test_what_may_change_later_is_a_key(key):
    config.check_key(key)


def test_values_of_a_sweep_are_checked_too():
    with pytest.raises(ValueError, match="train.lr: -1.0 given, must not be negative"):
        config.members(swept(lr=(1.0, -1.0)))


def test_keys_are_those_of_the_default():
    c = config.default().unlock()
    c.train.leanring_rate = 1.0
    with pytest.raises(ValueError, match="no key 'train.leanring_rate'"):
        config.members(c)
    c = config.default().unlock()
    c.train.warmpu = 3
    with pytest.raises(ValueError, match="'train.warmpu'; did you mean 'train.warmup'"):
        config.members(c)
    c = config.default().unlock()
    del c.train.steps
    with pytest.raises(ValueError, match="lacks the key 'train.steps'; start from"):
        config.members(c)


# ------------------------------------------------------------------------------------------ groups

SHARED = {
    "targets": ("q", "mlp"),
    "layers": (None, (0,)),
    "init": ("kaiming", "gaussian"),
    "scaling": ("lora", "fixed"),
    "alpha": (1.0, 2.0),
    "rank": (1, 2),
    "dropout": (0.0, 0.1),
    "lr": (0.1, 0.2),
    "weight_decay": (0.0, 0.1),
    "n_train": (None, 64),
    "seed": (0, 1),
    "start_seed": (0, 1),
    "order_seed": (None, 1),
}
SPLIT = {"method": ("lora", "vera"), "base": ("gpt2-nano", "gpt2"), "steps": (10, 20)}
SPLIT |= {"quant": ("nf4", "fp4"), "target_rank": (2, 3), "tokens": (4, 5)}
SPLIT |= {"dim": (10, 20), "projection": ("dense", "sparse"), "granularity": ("global", "tensor")}
SPLIT |= {"shuffle": (False, True), "planted_rank": (2, (1, 3)), "noise": (0.0, 0.1)}
SPLIT |= {"inputs": (2, 4), "data_seed": (0, 1), "draw_seed": (0, 1), "batch_size": (4, 8)}
SPLIT |= {"blocks": (2, 4), "block_size": (2, 4), "frequencies": (5, 6), "numbers": (2, 3)}
SPLIT |= {"tying": (0.0, 1.0), "mini_rank": (2, 4), "mask": ("random", "magnitude")}


def test_every_axis_either_shares_a_program_or_does_not():
    assert set(SHARED) | set(SPLIT) == set(AXES) and not set(SHARED) & set(SPLIT)


@pytest.mark.parametrize("axis", AXES)
def test_groups(axis):
    c = swept(**{axis: (SHARED | SPLIT)[axis]})
    c.task.n_train = 64  # draw_seed needs one
    keys = {config.group_key(m) for m in config.members(c)}
    assert len(keys) == (1 if axis in SHARED else 2)


def test_a_rank_is_a_number_or_left_to_evidence():
    names = [m.name for m in config.members(swept(rank=(4, "auto")))]
    assert names == ["rank=4", "rank=auto"]
    with pytest.raises(ValueError, match="sweep.rank: values of type int are expected, 'most'"):
        config.members(swept(rank=("most",)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(train__batch_size=8),
        dict(train__seq_len=64),
        dict(train__optimizer="sgd"),
        dict(train__clip=0.5),
        dict(dtype="bfloat16"),
        dict(task__seed=1),
        dict(task__group_by_length=True),
        dict(train__remat="full"),
        dict(train__offload="optimizer"),
        dict(task__name="e2e"),
    ],
)
def test_what_a_program_is_made_of_splits(changes):
    keys = {config.group_key(*config.members(c)) for c in (config.default(), changed(**changes))}
    assert len(keys) == 2


def test_digest_changes_with_any_value_and_with_nothing_else():
    variants = [
        changed(),
        changed(seed=1),
        changed(train__lr=0.1),
        changed(method__layers=(0,)),
        swept(rank=(1, 2)),
        swept(rank=(2, 1)),
    ]
    digests = [config.digest(c.to_dict()) for c in variants]
    assert len(set(digests)) == len(digests)
    assert digests[0] == config.digest(config.default().to_dict())
    assert re.fullmatch("[0-9a-f]{10}", digests[0])


# ------------------------------------------------------------------------------------------- files


def test_a_size_that_there_is_not_is_one_clear_error():
    with pytest.raises(ValueError, match="no such size; choose stories, minilm, .*; did you mean"):
        scales.scale("storys")


@pytest.mark.parametrize("name, base", [("random", "gpt2-nano"), ("smollm2-random", "M/smollm2")])
def test_a_size_has_its_control_of_random_weights(name, base, monkeypatch):
    """Models and data are found in the folders that the environment names."""
    monkeypatch.setenv("LORAX_MODELS", "M")
    monkeypatch.setenv("LORAX_DATA", "D")
    control = scales.scale(name)
    pretrained = scales.scale(name.removesuffix("random").rstrip("-") or None)
    assert control.base == f"random:{pretrained.base}" == f"random:{base}"
    control.base = pretrained.base
    assert control == pretrained
    assert control.task.path in (None, "D/e2e/e2e-dataset.zip")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_names_its_command_and_expands(file):
    """With no argument and with every one that its docstring shows."""
    spec = importlib.util.spec_from_file_location(f"configs_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"python -m lorax.run --config=configs/{file.name}" in module.__doc__
    shown = rf"--config=configs/{file.name}(?::([\w./-]+))?"
    arguments = {match[1] for match in re.finditer(shown, module.__doc__)}
    for argument in {None, *arguments}:
        members = search.members(module.get_config(argument))
        assert len({m.name for m in members}) == len(members) >= 1


def test_functions_in_a_config_become_their_names():
    c = config.default()
    own = c.base = test_functions_in_a_config_become_their_names
    c.sweep.base = ("gpt2-nano", own)
    points = [member.point["base"] for member in config.members(c)]
    assert points[0] == "gpt2-nano" and points[1].endswith("_config.py:" + own.__name__)
    assert c.to_dict()["base"] == points[1] == c.base
    c.base, c.sweep.base = 3, ()
    with pytest.raises(ValueError, match="base: 3 given, must be the name of a base, or a funct"):
        config.members(c)
