"""Frontiers of forgetting, differences at equal loss, and what explains forgetting."""

import json

import numpy as np
import pandas as pd
import pytest
from drawn import specification

from lorax import rundir
from lorax.analysis import compare, forgetting, runs
from lorax.interop.adapter import Factors
from lorax.report import charts
from lorax.report.sections import forgetting as section

LOSSES = (4.0, 3.0, 2.0)  # at steps 0, 10 and 20


def run_of(directory, forgotten, losses=LOSSES):
    """A run of members (method, rank, lr, seed) whose forgetting at the three steps is given: on
    the task "old", and twice that on "older"."""
    members, metrics = [], []
    for i, ((method, rank, lr, seed), values) in enumerate(forgotten.items()):
        row = {"member": i, "name": f"{i}", "method": method, "rank": rank, "scale": 1.0, "lr": lr}
        members.append(row | {"seed": seed, "trainable_params": 1, "steps": 20})
        for step, loss, more in zip((0, 10, 20), losses, values, strict=True):
            at = {"member": i, "step": step}
            metrics.append(at | {"split": "eval", "loss": loss, "kl": more / 2})
            metrics.append(at | {"split": "also:old", "loss": 1.0 + more})
            metrics.append(at | {"split": "also:older", "loss": 1.5 + 2 * more})
    directory.mkdir()
    rundir.write_members(directory, members)
    rundir.write_config(directory, {"config": {}})
    rows = {i: {"status": "finished"} for i in range(len(members))}
    rundir.write_status(directory, "finished", rows, 0.0, {})
    (directory / rundir.METRICS).write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return runs.load(directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rates of LoRA, of which one forgets less at loss 2, the other at loss 3; full fine-tuning
    forgets twice as much and 0.01 more with each seed."""
    forgotten = {}
    for seed in range(3):
        forgotten["lora", 4, 0.1, seed] = (0.0, 0.1, 0.4)
        forgotten["lora", 4, 0.2, seed] = (0.0, 0.2, 0.3)
        forgotten["full", None, 0.1, seed] = (0.0, 0.2, 0.6 + 0.01 * seed)
    return run_of(tmp_path_factory.mktemp("runs") / "run", forgotten)


def test_points_have_a_row_for_each_task_member_and_evaluation(run):
    points = forgetting.points(run)
    assert forgetting.tasks(run) == ["old", "older"] and len(points) == 2 * 9 * 3
    assert set(points["line"]) == {"method=lora", "method=full"}
    old, older = (
        points[points["task"] == task]["forgetting"].to_numpy() for task in ("old", "older")
    )
    np.testing.assert_allclose(older, 2 * old)
    np.testing.assert_allclose(points[points["task"] == "old"]["kl"], old / 2)


def test_forgetting_is_interpolated_where_a_loss_is_first_reached(run):
    points = forgetting.points(run)
    member = points[(points["task"] == "old") & (points["member"] == 0)]
    at = [forgetting.forgetting_at(member, loss) for loss in (5.0, 4.0, 3.5, 3.0, 2.25, 2.0)]
    np.testing.assert_allclose(at, [0.0, 0.0, 0.05, 0.1, 0.325, 0.4])
    assert np.isnan(forgetting.forgetting_at(member, 1.9))


def test_the_frontier_has_the_rate_that_forgets_least_at_each_loss(run):
    points = forgetting.points(run)
    table = forgetting.frontier(points[points["task"] == "old"], [3.0, 2.0, 1.0])
    lora = table[(table["line"] == "method=lora") & (table["seed"] == 1)]
    np.testing.assert_allclose(lora["forgetting"], [0.1, 0.3, np.nan])


def test_lines_are_compared_at_equal_loss_seed_by_seed(run):
    points = forgetting.points(run)
    points = points[points["task"] == "old"]
    a, b = "method=lora", "method=full"
    assert forgetting.lowest_common(points, (a, b)) == 2.0
    found = forgetting.at_equal_loss(points, a, b)
    assert found == compare.interval([-0.3, -0.31, -0.32])
    assert forgetting.at_equal_loss(points, a, b, 3.0).value == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="line 'lora': there are method=lora, method=full"):
        forgetting.at_equal_loss(points, "lora", b)
    with pytest.raises(ValueError, match="loss 1: not reached by all seeds"):
        forgetting.at_equal_loss(points, a, b, 1.0)


def test_the_squared_norm_of_factors_is_that_of_their_product():
    rng = np.random.default_rng(0)
    factors = Factors(rng.normal(size=(6, 2)), rng.normal(size=(2, 5)), 0.5)

    class OneMember:
        members = pd.DataFrame(index=[0])
        update = staticmethod(lambda member, base: {"q": factors, "v": np.eye(3)})

    dense = 0.5 * factors.a @ factors.b
    found = forgetting.squared_norms(OneMember)
    assert found[0] == pytest.approx(np.square(dense).sum() + 3)


def test_r2_of_groups_left_out_is_that_of_a_law_that_holds_for_all():
    rng = np.random.default_rng(0)
    kl, groups = rng.uniform(size=40), np.repeat(["a", "b", "c", "d"], 10)
    forgotten = 0.1 + kl + kl**2
    assert forgetting.held_out_r2(kl, forgotten, groups) == pytest.approx(1)
    assert forgetting.held_out_r2(rng.uniform(size=40), forgotten, groups) < 0.3
    # what is the same within a group can't predict the one that is left out
    rank = np.repeat([1.0, 2.0, 4.0, 8.0], 10)
    assert forgetting.held_out_r2(rank, forgotten, groups) < 0
    with pytest.raises(ValueError, match="at least two"):
        forgetting.held_out_r2(kl, forgotten, ["a"] * 40)


def test_the_report_draws_the_frontier_and_has_its_numbers(run):
    (made,) = section.section(run, runs.summary(run))
    assert set(made.files) == {"forgetting.csv", "frontier.csv"}
    chart = made.pictures["frontier"].figure
    assert "concat" in chart.spec
    assert charts.pdf(specification(chart)).startswith(b"%PDF")
    assert "forgetting of old at 2.000" in made.content
    assert "<td>0.300 ± 0.000</td><td>0.600 ± 0.000</td>" in made.content


def test_a_figure_of_one_member_has_no_intervals(tmp_path):
    run = run_of(tmp_path / "run", {("lora", 4, 0.1, 0): (0.0, 0.1, 0.2)})
    (made,) = section.section(run, runs.summary(run))
    assert "all members" in made.content and "±" not in made.content.partition("<table")[2]
    specification(made.pictures["frontier"].figure)


def test_where_nothing_is_learned_only_the_members_are_drawn(tmp_path):
    run = run_of(tmp_path / "run", {("lora", 4, 0.1, 0): (0.0, 0.1, 0.2)}, (4.0, 4.1, 4.2))
    (made,) = section.section(run, runs.summary(run))
    assert made.pictures["frontier"].numbers.empty
    specification(made.pictures["frontier"].figure)


def test_a_run_without_further_tasks_has_no_section(tmp_path):
    run = run_of(tmp_path / "run", {("lora", 4, 0.1, 0): (0.0, 0.1, 0.2)})
    alone = run.metrics[run.metrics["split"] == "eval"]
    run = runs.Run(run.directory, run.config, run.members, alone, run.status)
    assert section.section(run, runs.summary(run)) == [] and forgetting.points(run).empty
