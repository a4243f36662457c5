"""Models from outside: docs/examples/model.py, and what else a function may return."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn

import lorax
from lorax import config, decode, intercept, models, outside, tree
from lorax.interop import peft
from lorax.methods import targets
from lorax.models import Model
from lorax.models.load import skeleton
from lorax.tasks import planted
from lorax.train import activations

ROOT = pathlib.Path(lorax.__file__).parents[1]
FILE = ROOT / "docs" / "examples" / "model.py"
NANO, TINY = f"{FILE}:nano", f"{FILE}:tiny"
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 37 % 1024


@pytest.fixture(scope="module")
def nano():
    return lorax.load(NANO)


@pytest.fixture(scope="module")
def theirs():
    return lorax.load("gpt2-nano")


def logits(base):
    return np.asarray(intercept.apply(base.module, base.params, TOKENS))


# ---------------------------------------------------------------------------------- the example


def test_a_module_with_read_weights_computes_what_the_shipped_model_does(nano, theirs):
    np.testing.assert_allclose(logits(nano), logits(theirs), atol=2e-5)
    assert nano.causal and nano.input_shape is None and nano.positions == 256
    assert nano.vocabulary.rows == 1024 and nano.vocabulary.ends == theirs.vocabulary.ends
    assert tree.count(nano.params) == tree.count(theirs.params)
    assert len(nano.sha256) == 64 and "module Decoder" in repr(nano)


def test_its_layers_are_told_apart_and_named_as_torch_would(nano):
    assert nano.layers["blocks/3/query"] == ("blocks/query/kernel", (3,))
    assert nano.parts["blocks/1/norm1/scale"] == ("blocks/norm1/scale", (1,))
    assert nano.places.module("blocks/2/query") == "blocks.2.query"
    assert [*nano.places.at("blocks.2.query.weight")] == ["blocks/2/query/kernel"]
    assert nano.sources["blocks/query/kernel"].axes == (1, 0)
    assert nano.sources["norm/scale"].name == "norm.weight"


@pytest.mark.parametrize(
    "words, paths",
    [
        (("q", "v"), ["blocks/query/kernel", "blocks/value/kernel"]),
        (("query",), ["blocks/query/kernel"]),
        (("mlp",), ["blocks/expand/kernel", "blocks/contract/kernel"]),
        (("words",), ["words/embedding"]),
        (("re:.*/merge/kernel",), ["blocks/merge/kernel"]),
    ],
)
def test_targets_are_canonical_words_or_the_names_of_its_layers(nano, words, paths):
    assert {*targets.resolve(words, nano.sites)} == {*paths}


@pytest.mark.parametrize("beams", [1, 2])
def test_it_writes_what_the_shipped_model_writes(nano, theirs, beams):
    """Prompts of different lengths: padding stands in front of the shorter one."""
    options = decode.DecodingOptions(max_new_tokens=6, num_beams=beams)
    prompts = ["One day, a little girl", "The"]
    texts = [decode.complete(base, prompts, options=options) for base in (nano, theirs)]
    assert texts[0] == texts[1]


def test_weights_are_drawn_from_a_seed():
    one, same, other = (lorax.load(f"{TINY}{end}") for end in ("", "@0", "@1"))
    assert one.sha256 == same.sha256 != other.sha256
    drawn = lorax.load(f"random:{NANO}")
    assert drawn.sha256 != lorax.load(NANO).sha256 and drawn.params.keys() == drawn.params.keys()
    with jax.numpy_dtype_promotion("standard"):  # Flax's own LayerNorm needs it
        half = skeleton(TINY, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in tree.flatten(half.params).values()} == {"bfloat16"}
    assert half.module.model.dtype == "bfloat16"


def test_a_saved_model_is_read_back_by_its_function(nano, tmp_path):
    changed = tree.flatten(nano.params) | {"norm/bias": nano.params["norm"]["bias"] + 1}
    models.save(tmp_path / "out", nano.replace(params=tree.unflatten(changed)))
    back = lorax.load(f"{NANO}@{tmp_path / 'out'}")
    for path, leaf in tree.flatten(back.params).items():
        np.testing.assert_array_equal(leaf, changed[path], err_msg=path)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["function"] == outside.base_name(NANO).function
    with pytest.raises(ValueError, match=r"load them as FILE\.py:function@"):
        lorax.load(str(tmp_path / "out"))


# ------------------------------------------------------------------------------- other functions


class Looped(nn.Module):
    """Two layers in a loop; `leaks` looks at later tokens as well."""

    leaks: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for i in range(2):
            x = x + jnp.cumsum(nn.DenseGeneral((2, 4), name=f"block_{i}")(x), 1).reshape(x.shape)
        return nn.Dense(11)(x + x[:, -1:] if self.leaks else x)


class Scores(nn.Module):
    """Arrays (B, 6) -> scores (B, 3)."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(5, name="hidden")(x)))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="up")(x)


class Deep(nn.Module):
    """A stack that isn't the first word of its paths, and a loop of modules with layers inside."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Inner(name=f"block_{i}")(x)
        return nn.Dense(2, name="head")(Stack(name="decoder")(x))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = lambda module, x, _: (module(x), None)
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(Inner(name="layers"), x, None)[0]


def looped():
    return Looped()


def leaking():
    return Looped(leaks=True)


def scores(labels_=3):
    return Scores(), np.zeros((1, 6), np.float32)


def deep():
    return Deep(), jnp.zeros((1, 8))


def fails():
    return undefined  # noqa: F821


def nothing():
    return 3


def wrong_inputs():
    return Model(Scores(), np.zeros((2, 3), np.int32))


def wrong_output():
    return Model(Looped(), np.zeros((1, 4), np.float32))


def unread():
    return Model(Looped(), weights=lambda: {"Dense_0": {"kernel": np.zeros((8, 11))}})


def nan():
    flat = {"params": {"out": {"kernel": np.full((6, 3), np.nan), "bias": np.zeros(3)}}}
    return Model(nn.Dense(3), np.zeros((1, 6), np.float32), weights=lambda: flat["params"]["out"])


def unknown_word():
    return Model(Scores(), np.zeros((1, 6), np.float32), targets={"u": "hidden"})


def meant_nothing():
    return Model(Scores(), np.zeros((1, 6), np.float32), targets={"up": "hiden"})


def no_tokenizer():
    return Model(Looped(), vocabulary=str(ROOT / "nowhere"))


@pytest.mark.parametrize(
    "function, message",
    [
        (leaking, "the last token changes the logits of earlier tokens"),
        (fails, r"test_custom\.py:\d+: NameError: name 'undefined' is not defined"),
        (nothing, r"returns int, expected a flax\.linen\.Module, a flax\.nnx"),
        (wrong_inputs, "base: .*wrong_inputs: .*"),
        (wrong_output, "base: .*wrong_output: .*"),
        (unread, "weights: 'Dense_0/bias' of the module is missing"),
        (nan, "weights: kernel: NaN or infinity in it"),
        (unknown_word, "targets: 'u' is not one of q, k, v, o, up"),
        (meant_nothing, "targets: 'up': 'hiden' matches none of hidden/kernel, out/kernel"),
        (lambda: 1, "base: .*lambda.* given; it must be a function that a def"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        lorax.load(function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "run, message",
    [
        ({"remat": "full"}, "remat: 'full' given, but the function takes no argument 'remat'"),
        ({"dtype": "bfloat16"}, "dtype: 'bfloat16' given, but the function takes no argument"),
        ({"labels": 2}, "the task's classes, but the function takes no argument 'labels'"),
    ],
)
def test_options_that_the_function_does_not_take_are_refused(run, message):
    with pytest.raises(ValueError, match=f"base: .*:looped: {message}"):
        lorax.load(looped, **run)
    with pytest.raises(FileNotFoundError, match="'x' given after @; expected a seed"):
        lorax.load(f"{outside.spelled(looped)}@x")
    with pytest.raises(FileNotFoundError, match="base: no directory .*nowhere"):
        lorax.load(no_tokenizer)


def test_cka_is_refused_for_the_reason_that_holds(nano):
    with pytest.raises(ValueError, match="has no residual stream that lorax knows; CKA compares"):
        activations.check(nano, 8)


def test_layers_of_loops_and_of_stacks_below_the_first_word():
    base = lorax.load(deep)
    assert base.layers["block/1/up"] == ("block_1/up/kernel", ())
    assert base.layers["decoder/layers/2/up"] == ("decoder/layers/up/kernel", (2,))
    assert base.parts["decoder/layers/2/up/bias"] == ("decoder/layers/up/bias", (2,))
    assert base.places.module("decoder/layers/2/up") == "decoder.layers.2.up"
    assert base.places.module("block/1/up") == "block.1.up"
    assert {*base.layers_of("head/kernel")} == {"head"} and base.traits.outputs == 2
    kernels = lorax.load(looped)
    assert models.kernels(kernels)["block_1"].shape == (8, 8)  # kernel (8, 2, 4)


def test_a_function_that_reads_arrays_is_planted_in():
    base = lorax.load(scores)
    assert base.input_shape == (6,) and base.traits.outputs == 3 and not base.causal
    settings = config.default().task.to_dict() | {"name": "planted", "rank": 1, "examples": 64}
    task = planted.load(settings, base).build(settings, None, 1, base)
    assert [*task.facts["planted"]] == ["hidden", "out"] and task.train["inputs"].shape == (64, 6)


# -------------------------------------------------------------------------------- the commands

SMALL = (
    *("--config.train.steps=2", "--config.train.batch_size=2", "--config.train.seq_len=100"),
    *("--config.train.warmup=0", "--config.eval.every=2", "--config.eval.examples=8"),
    "--config.eval.test=8",
    *("--config.eval.batch_size=8", "--config.task.n_train=32", "--config.analysis.layers=1"),
    "--config.sweep.rank=(1, 2)",
)


def command(module, *words, cwd, code=0):
    """What a command prints, in a process of its own."""
    flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", f"lorax.{module}", *map(str, words)],
        cwd=cwd, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which the example's study was run, in a few steps, on both of its models."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "docs").symlink_to(ROOT / "docs")
    bases = "('docs/examples/model.py:tiny', 'docs/examples/model.py:nano')"
    line = f"--config.sweep.base={bases}", "--config.sweep.seed=(0,)", "--workdir=run"
    said = command("run", "--config=docs/examples/model.py", *SMALL, *line, cwd=folder)
    assert "base docs/examples/model.py:nano: module Decoder, 957,184 parameters" in said
    return folder


def test_the_study_of_the_example_sweeps_functions(run, nano):
    rows = [json.loads(line) for line in (run / "run/members.jsonl").read_text().splitlines()]
    swept = [(row["base"].partition(":")[2], row["rank"]) for row in rows]
    assert swept == [("tiny", 1), ("tiny", 2), ("nano", 1), ("nano", 2)]
    page = (run / "run/report.html").read_text()
    assert "docs/examples/model.py:nano" in page and "blocks/" in page
    adapter = peft.load(run / "run/adapters/3", nano.sources)
    assert {*adapter.factors} == {f"blocks/{i}/{x}" for i in range(4) for x in ("query", "value")}


def test_commands_take_a_function_for_a_base(run):
    base, adapter = "docs/examples/model.py:nano", "run/adapters/3"
    said = command("convert", "merge", base, adapter, "merged", cwd=run)
    assert "8 matrices merged" in said
    prompt = ["--prompt", "name = The", "--max-new-tokens", "4"]
    one = command("generate", "--base", base, "--adapter", adapter, *prompt, cwd=run)
    other = command("generate", "--base", f"{base}@merged", *prompt, cwd=run)
    assert other.replace("@merged", "") == one
    page = command("report", adapter, f"--base={base}", "--out=page", cwd=run).strip()
    assert "blocks/3/value" in (run / page).read_text()


def test_a_report_runs_no_function_that_only_the_run_names(run):
    command("report", "run", cwd=run)
    text = (run / "run/report.html").read_text()
    assert "is a function of yours, which the report only calls if --base names it" in text


def test_a_plan_calls_the_function_and_draws_nothing(run):
    line = "--config=docs/examples/model.py", "--config.base=docs/examples/model.py:nano"
    said = command("plan", *line, *SMALL, cwd=run)
    assert "957,184" in said and "4 members" in said
    wrong = command("run", *line[:1], "--config.base=docs/examples/model.py:nanoo", cwd=run, code=2)
    assert "has no function 'nanoo'" in wrong and len(wrong.strip().splitlines()) <= 2
