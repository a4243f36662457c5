"""What `import lorax` offers: commands as functions that return values and raise errors."""

import inspect
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lorax
from lorax import rundir, tree
from lorax.analysis import answer, runs

ROOT = Path(__file__).parents[1]


def tiny():
    c = lorax.config.default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.method.rank = 2
    c.train.update(steps=4, batch_size=8, warmup=0, parallel="none")
    c.eval.update(every=2, examples=50, batch_size=50)
    c.analysis.report = False
    c.sweep.axes = {"train.warmup": (0, 2)}
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return lorax.run(tiny(), workdir=tmp_path_factory.mktemp("face") / "run")


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("first", ["", "import lorax.run, lorax.plan; ", "from lorax import run; "])
def test_commands_are_modules_and_functions_whatever_was_imported(first):
    code = f"{first}import sys, lorax; print('jax' in sys.modules, callable(lorax.run), "
    code += "callable(lorax.plan), callable(lorax.run.main), lorax.run is sys.modules['lorax.run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", *["True"] * 4]


def test_commands_say_their_arguments():
    assert list(inspect.signature(lorax.run).parameters) == ["settings", "workdir"]
    assert list(inspect.signature(lorax.plan).parameters) == [
        "settings", "devices", "mesh", "hosts",
    ]  # fmt: skip
    assert "also" in inspect.signature(lorax.report).parameters


def test_flags_of_a_program_that_imports_lorax_are_its_own():
    code = "from absl import flags; import lorax.run, lorax.plan; "
    code += "flags.DEFINE_string('config', None, ''); flags.DEFINE_bool('table', False, '')"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------- run


def test_run_trains_and_returns_the_run(trained, capsys):
    assert isinstance(trained, runs.Run) and rundir.has_finished(trained.directory)
    assert trained.members["train.warmup"].tolist() == [0, 2]
    assert trained.config["command"].startswith("lorax.run(config, ")
    update = trained.update(1)
    assert all(factors.a.shape[1] == 2 for factors in update.values()) and len(update) == 1
    again = lorax.run(tiny(), workdir=trained.directory)  # nothing is trained again
    assert again.metrics.equals(trained.metrics) and capsys.readouterr().out == ""


def test_a_run_computes_its_answer_once(trained, tmp_path, monkeypatch):
    computed = []
    compute = answer.answer
    monkeypatch.setattr(answer, "answer", lambda run: computed.append(compute(run)) or computed[-1])
    c = tiny()
    c.analysis.report = True
    again = shutil.copytree(trained.directory, tmp_path / "run")
    lorax.run(c, workdir=again)  # only analyses
    (found,) = computed
    assert rundir.answer(again).read_bytes() == answer.as_json(found)
    assert 'class="answer"' in (again / rundir.REPORT).read_text()


def test_a_run_of_another_config_is_refused(trained):
    c = tiny()
    c.train.lr = 1.0
    with pytest.raises(ValueError, match="holds a run of another config .it differs in train.lr"):
        lorax.run(c, workdir=trained.directory)


def test_the_usual_folder_depends_on_what_was_changed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(lorax.run, "_train", lambda settings, _, workdir, __: begun.append(workdir))
    for c in (lorax.config.default(), tiny(), tiny()):
        with pytest.raises(FileNotFoundError, match="no such run directory"):
            lorax.run(c)
    assert str(begun[0]) == "runs/config" and begun[1] == begun[2] != begun[0]


# -------------------------------------------------------------------------------------------- plan


def test_plan_is_a_table():
    table = lorax.plan(tiny(), devices=("h200", "a100"))
    assert table["device"].tolist() == ["h200", "a100"] * 2 and table["group"].tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert (table["trainable_params"] == 2 * (64 + 10)).all() and (table["parameters"] == 650).all()
    assert (table["adapters"] == 4 * table["trainable_params"]).all()
    assert (table["peak"] > table["weights"]).all() and (table["memory"] > 1e9).all()
    with pytest.raises(ValueError, match="'h300' is not one of h200, .*; did you mean 'h200'"):
        lorax.plan(tiny(), "h300")


# ------------------------------------------------------------------------------------------ report


def test_report_takes_runs_and_paths(trained, monkeypatch):
    from lorax.report import __main__ as command

    asked = []
    monkeypatch.setattr(command, "write", lambda what, *options: asked.append((what, options)))
    lorax.report(trained)
    lorax.report([trained, "other"], out="page")
    one = str(trained.directory)
    assert asked == [
        ([one], (None, None, None, None, (), None, ())),
        ([one, "other"], (None, "page", None, None, (), None, ())),
    ]
    with pytest.raises(ValueError, match="lorax.report: nothing given; expected runs or adapters"):
        lorax.report()


# -------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_is_quantised_and_back(kind):
    base = lorax.load("gpt2-nano")
    coded = lorax.quantize(base, kind, double=True)
    assert tree.nbytes(coded.params) < tree.nbytes(base.params) and coded.sites == base.sites
    plain, of_params = lorax.dequantize(coded), lorax.dequantize(lorax.quantize(base.params, kind))
    for tree_ in (plain.params, of_params):
        for path, w in tree.flatten(tree_).items():
            was = tree.flatten(base.params)[path]
            assert isinstance(w, jax.Array) and (w.shape, w.dtype) == (was.shape, was.dtype)
            np.testing.assert_allclose(w, was, rtol=0, atol=0.2 * np.abs(was).max())
    tokens = np.arange(12)[None]
    same = [lorax.apply(b.module, b.params, tokens) for b in (coded, plain)]
    np.testing.assert_allclose(*same, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------- a loop of one's own


def test_ten_lines_with_optax_learn():
    file = ROOT / "docs/examples/loop.py"
    with jax.numpy_dtype_promotion("standard"):  # optax's own, outside of a program
        scope = runpy.run_path(str(file))
    base, tokens = scope["base"], scope["tokens"]
    logits = lorax.apply(base.module, base.params, tokens)[:, :-1]
    before = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    assert scope["value"] < 0.5 * before
    loop = file.read_text().partition("def loss")[2].partition("\nprint")[0]
    assert len([line for line in loop.splitlines() if line.strip()]) == 10
