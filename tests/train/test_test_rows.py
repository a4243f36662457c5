"""Test rows: measured before and after training, row by row, and what is exported is what is
measured."""

import shutil

import numpy as np
import pytest
from digits import BASE, contents, digits, trained

from lorax import adapters, config, losses, rundir, tasks
from lorax.analysis import runs
from lorax.interop import peft
from lorax.models import load
from lorax.train import loop, prepare


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("rows") / "run", digits(rank=(1, 2), seed=(0, 1)))


@pytest.fixture(scope="module")
def task():
    return tasks.build({"name": "digits", "n_train": 32}, None, 1, 50, load(BASE), test=None)


def test_rows_add_up_to_what_is_reported(sweep, task):
    table, labels = runs.summary(sweep), task.test["label"]
    for i in range(4):
        rows = sweep.rows(i)
        assert {name: (x.shape, x.dtype) for name, x in rows.items()} == dict.fromkeys(
            ("loss", "start", "weight", "score", "start_score"), ((len(labels),), np.float32)
        )
        assert (rows["weight"] == 1).all() and set(rows["score"]) == {0, 1}
        mean = lambda name, rows=rows: rows[name].sum() / rows["weight"].sum()
        assert table["test_loss"][i] == pytest.approx(mean("loss"), rel=1e-6)
        assert table["base_test_loss"][i] == pytest.approx(mean("start"), rel=1e-6)
        assert table["test_accuracy"][i] == pytest.approx(mean("score"), rel=1e-6)
        assert table["test_loss"][i] < table["base_test_loss"][i]
    tests = sweep.metrics.query("split == 'test'").sort_values(["member", "step"])
    assert tests["step"].tolist() == [0, 6] * 4
    assert tests["loss"].tolist()[1::2] == table["test_loss"].tolist()
    assert tests["accuracy"].tolist()[1::2] == pytest.approx(table["test_accuracy"].tolist())


def test_rows_are_the_bases_before_training_and_the_adapters_after(sweep, task):
    base = load(BASE)
    before = losses.array_rows(base.module, base.params, task.test)
    adapter = peft.load(rundir.adapter(sweep.directory, 3), base.sources)
    after = losses.array_rows(base.module, adapters.bind(base, adapter), task.test)
    rows = sweep.rows(3)
    for name, found in (("start", before), ("", after)):
        np.testing.assert_allclose(rows[name or "loss"], found.loss, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(rows[f"{name}_score".strip("_")], found.right)


def test_the_base_is_measured_once_for_all_groups(tmp_path):
    c, lines = digits(rank=(1, 2), full_lr=(1e-3,)), []
    groups = prepare.groups(config.members(c), lambda line: None)
    loop.train(tmp_path, groups, loop.Terminal(lines.append, *[lambda *_: None] * 2))
    starts = [dict(np.load(rundir.rows(tmp_path, i)))["start"] for i in range(3)]
    assert len(groups) == 2 and len([x for x in lines if "the base on" in x]) == 1
    assert (starts[0] == starts[1]).all() and (starts[0] == starts[2]).all()


def test_a_member_alone_has_the_rows_that_it_has_in_a_sweep(sweep, tmp_path):
    c = digits(seed=(1,))
    alone = trained(tmp_path / "run", c).rows(0)
    for name, x in sweep.rows(3).items():
        np.testing.assert_allclose(alone[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


def test_without_test_rows_nothing_is_written(tmp_path, task):
    c = digits()
    c.eval.update(test=0, examples=360)
    run = trained(tmp_path / "run", c)
    table = runs.summary(run)
    assert run.rows(0) is None and not (tmp_path / "run/rows").exists()
    assert np.isnan(table[["test_loss", "base_test_loss", "test_accuracy"]].to_numpy()).all()
    assert set(run.metrics["split"]) == {"train", "eval"}


# --------------------------------------------------------------------------------------- the best


def steep():
    """A rate at which the loss falls first and then rises, and one that diverges."""
    c = digits(lr=(0.02, 1e30), seed=(0, 1))
    c.train.steps, c.eval.keep = 12, "best"
    return c


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("best") / "run", steep())


def test_the_best_step_is_exported_and_tested(best, tmp_path):
    """It is what a run of as many steps exports: the rate is constant."""
    evals = best.metrics.query("split == 'eval' and member == 0").set_index("step")["loss"]
    step, table = best.status["members"]["0"]["kept_step"], runs.summary(best)
    assert step == evals.idxmin() == table["final_step"][0] and 0 < step < 12
    assert table["final_loss"][0] == evals.min() < evals.iloc[-1]
    c = digits(lr=(0.02,))
    c.train.steps = int(step)
    short = trained(tmp_path / "run", c)
    for name, x in short.rows(0).items():
        np.testing.assert_allclose(best.rows(0)[name], x, rtol=1e-4, atol=1e-5)
    stored = [run.adapter(0)["head"] for run in (best, short)]
    np.testing.assert_allclose(stored[0].b, stored[1].b, rtol=1e-4, atol=1e-6)


def test_a_diverged_member_has_no_test_loss_and_no_rows(best):
    table = runs.summary(best)
    assert table["status"].tolist() == ["finished"] * 2 + ["diverged"] * 2
    assert np.isnan(table["test_loss"][2:]).all() and np.isfinite(table["test_loss"][:2]).all()
    assert best.rows(2) is None and not rundir.rows(best.directory, 3).exists()


@pytest.mark.parametrize("lost", [("12",), ("10", "12")])
def test_a_run_that_is_killed_comes_to_the_same(best, tmp_path, lost):
    """What was best before the checkpoint is a part of it."""
    torn = tmp_path / "torn"
    shutil.copytree(best.directory, torn)
    for step in lost:
        shutil.rmtree(torn / "checkpoints/0-0" / step)
    shutil.rmtree(torn / "adapters")
    again = trained(torn, steep())
    assert contents(torn) == contents(best.directory)
    for name in ("kept_step", "eval_loss", "test_loss", "test_scores", "base_test_loss"):
        assert again.status["members"]["0"][name] == best.status["members"]["0"][name]
