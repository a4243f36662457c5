"""The catalogue of methods: what it says is what the functions take, and what a config has."""

import inspect
import json

import pytest

from lorax import catalogue, config, methods, resume
from lorax.files import write_json
from lorax.interop.peft import matrices, tokens
from lorax.methods import lora

DEFAULT = {  # as every run directory has them
    "name": "lora",
    "rank": 8,
    "alpha": 16.0,
    "scaling": "lora",
    "init": "kaiming",
    "dropout": 0.0,
    "full": [],
    "dtype": "float32",
}


@pytest.mark.parametrize("name", catalogue.ROWS)
def test_a_row_says_what_the_function_takes(name):
    row = catalogue.ROWS[name]
    taken = [*inspect.signature(row.function).parameters]
    if "hp" in taken:  # a variant of LoRA, which takes the rest
        fixed = {"rslora": "scaling"}.get(name)
        shared = [key for key in inspect.signature(lora.lora).parameters if key != fixed]
        taken = [*shared, *(key for key in taken if key != "hp")]
    assert row.hyperparameters == tuple(taken)
    keys = catalogue.keys()
    assert {*row.hyperparameters} - {"ranks"} <= {*keys}  # which evidence alone gives
    assert {*row.varies, *row.splits} <= {*keys} and {*row.splits} <= {*row.varies}
    assert row.file is None and not row.keys


def test_every_method_with_a_word_of_peft_is_written():
    said = {row.name for row in catalogue.ROWS.values() if row.peft not in (None, "LORA")}
    assert said == {*matrices.KINDS, *tokens.KINDS, "ln-tuning"}


def test_a_run_from_before_a_registration_continues(registry, tmp_path):
    """Keys that the run's config did not have yet, and that are at their defaults, are no change;
    nor are those of a method that the script no longer registers."""
    before = config.default()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_json(tmp_path / "config.json", {"config": json.loads(before.to_json())})
    registered(gain=(1.0, PLAIN))
    now = config.default()
    assert resume.check_same_config(tmp_path, now) == []
    write_json(tmp_path / "config.json", {"config": json.loads(now.to_json())})
    assert resume.check_same_config(tmp_path, before) == []
    now.sweep.gain = (1.0,)
    with pytest.raises(ValueError, match="differs in sweep.gain"):
        resume.check_same_config(tmp_path, now)


def test_the_default_is_that_of_every_run_before():
    method = json.loads(config.default().to_json())["method"]
    assert list(method) == ["name", *catalogue.KEYS]
    assert {key: value for key, value in method.items() if value is not None} == DEFAULT
    first = ["method", "base", "quant", "targets", "layers", "init", "scaling", "alpha", "rank"]
    first += ["target_rank", "tokens", "dim", "blocks", "block_size", "frequencies", "numbers"]
    first += ["tying", "mini_rank", "mask", "projection", "granularity", "dropout", "lr"]
    assert list(config.axes())[: len(first)] == first and list(config.axes())[-1] == "seed"


def test_no_hyperparameter_can_be_called_as_another_axis():
    others = {axis for axis, key in config.axes().items() if not key.startswith("method.")}
    assert others <= {*catalogue.RESERVED}


# ------------------------------------------------------------------------------ a user's method


def registered(**parameters):
    """A function of these parameters, {name: (default, annotation)}, as the method "mine"."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (default, annotation) in parameters.items()
    ]

    def mine(**hp):
        raise AssertionError("not called")

    mine.__signature__ = inspect.Signature(own)
    mine.__annotations__ = {
        name: annotation
        for name, (_, annotation) in parameters.items()
        if annotation is not inspect.Parameter.empty
    }
    return methods.register("mine", varies=tuple(parameters)[:1])(mine)


PLAIN = inspect.Parameter.empty


def test_keys_axes_and_groups_follow_from_a_registration(registry):
    registered(gain=(1.0, PLAIN), steps_of=(None, int | None), words=(("a",), tuple[str, ...]))
    c = config.default()
    assert c.method.gain is None and c.sweep.gain == () and c.sweep.words == ()
    with pytest.raises(TypeError, match="gain"):
        c.method.gain = "much"
    c.method.name, c.sweep.gain, c.sweep.steps_of = "mine", (1, 2.5), (3, None)
    members = config.members(c)
    assert [m.name for m in members[:2]] == ["gain=1,steps_of=3", "gain=1,steps_of=None"]
    assert [m.config.method.gain for m in members] == [1.0, 1.0, 2.5, 2.5]
    assert len({config.group_key(m) for m in members}) == 2  # it varies in gain alone
    c.sweep.gain = ("much",)
    with pytest.raises(ValueError, match="sweep.gain: values of type float are expected, 'much'"):
        config.members(c)


def test_a_registration_replaces_the_one_before_and_is_not_left(registry):
    registered(gain=(1.0, PLAIN))
    registered(loss=(1.0, PLAIN))
    assert "gain" not in config.default().method and "loss" in config.default().method


def test_before_and_after_nothing_is_registered():
    assert "mine" not in methods.METHODS and "gain" not in config.default().method


@pytest.mark.parametrize(
    ("parameters", "message"),
    {
        "no default": (dict(gain=(PLAIN, float)), "gain has no default"),
        "no type": (dict(gain=(None, PLAIN)), "gain needs a type of bool, int"),
        "two types": (dict(gain=(None, int | str)), "gain needs a type of"),
        "another type": (dict(rank=("many", str)), "rank is str, but config.method.rank is int"),
        "taken": (dict(seed=(0, int)), "'seed' is reserved by lorax"),
    }.values(),
)
def test_what_no_config_can_have_is_refused(registry, parameters, message):
    with pytest.raises(ValueError, match=f"method 'mine': {message}"):
        registered(**parameters)
    assert "mine" not in registry


def test_names_are_refused(registry):
    with pytest.raises(ValueError, match="method 'lora': lorax has one of this name"):
        methods.register("lora")(lambda rank=8: None)
    with pytest.raises(
        ValueError, match="no hyperparameter 'gian', only gain; did you mean 'gain'"
    ):
        methods.register("mine", varies=("gian",))(lambda gain=1.0: None)
    methods.register("mine")(lambda gain=1.0: None)
    with pytest.raises(ValueError, match="method 'other': gain is str, but config.method.gain is"):
        methods.register("other")(lambda gain="much": None)
    with pytest.raises(TypeError):
        methods.METHODS["mine"] = None
