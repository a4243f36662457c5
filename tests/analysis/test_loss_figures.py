"""Figures of losses say what the tables say, in charts that follow the page's member filter."""

import warnings

import numpy as np
import pandas as pd
import pytest
from drawn import marks, number, specification, texts
from synthetic import BASE_LOSS, make_run

from lorax.analysis import compare, figures, runs
from lorax.analysis.figures import layout
from lorax.analysis.figures.layout import Layout
from lorax.report import charts

FULL = 0.9  # its loss, at 10,000 parameters
MEAN = "mean final validation loss (nats)"
LOSS = "final validation loss (nats)"


def with_full(table, seeds=(0, 1)):
    """The table with members of full fine-tuning."""
    rows = [
        table.iloc[0].to_dict()
        | {"member": 90 + seed, "name": f"full, seed={seed}", "method": "full", "rank": None}
        | {"seed": seed, "final_loss": FULL, "trainable_params": 10_000, "status": "finished"}
        | {"alpha": None, "lr": None}
        for seed in seeds
    ]
    added = pd.DataFrame(rows, index=[row["member"] for row in rows])
    return pd.concat([table.astype({"rank": object}), added.astype({"rank": object})])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return runs.load(make_run(directory, ranks=(1, 2, 4, 8), diverged=(1,), adapters=False))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A run of three ranks, two alphas, two rates and three seeds."""
    directory = tmp_path_factory.mktemp("runs") / "grid"
    return runs.load(
        make_run(directory, (1, 2, 4), (0, 1, 2), (8.0, 16.0), (1e-3, 2e-3), adapters=False)
    )


def means(figure, **options):
    return [mark for mark in marks(figure, "symbol", **options) if MEAN in mark]


def test_the_curve_has_means_with_t_intervals_seeds_and_lines(run):
    table = with_full(runs.summary(run))
    chosen = pd.Series({"rank": 4})
    figure = figures.rank_curve(table, Layout("rank"), chosen=chosen)
    drawn = means(figure)
    assert [mark["rank r of the adapter"] for mark in drawn] == ["1", "2", "4", "8"]
    assert [mark["seeds"] for mark in drawn] == ["1", "2", "2", "2"]
    assert [mark["seeds that did not reach the end"] for mark in drawn] == ["1", "0", "0", "0"]
    assert drawn[0]["95% interval from"] == "null"  # one seed is left at rank 1
    of_4 = compare.interval(table.loc[table["rank"] == 4, "final_loss"])
    shown = [drawn[2][name] for name in (MEAN, "95% interval from", "to")]
    assert list(map(number, shown)) == pytest.approx([of_4.value, of_4.low, of_4.high], abs=1e-4)
    assert len([mark for mark in marks(figure, "symbol") if "member" in mark]) == 7
    (ring,) = [mark for mark in marks(figure) if "ringed" in mark]
    assert ring["rank r of the adapter"] == "4"
    lines = {mark["line"]: number(mark[LOSS]) for mark in marks(figure, "rule") if "line" in mark}
    assert lines == {"full fine-tuning": pytest.approx(FULL), "base": pytest.approx(BASE_LOSS)}
    assert {"full fine-tuning 0.900", f"base {BASE_LOSS}, beyond this scale"} <= set(texts(figure))


def test_means_and_lines_follow_the_filter_of_members(run):
    table = with_full(runs.summary(run))
    figure = figures.rank_curve(table, Layout("rank"))
    hidden = [*table.index[table["seed"] == 1], 90]
    drawn = means(figure, hidden=hidden)
    of_seed_0 = table.loc[(table["seed"] == 0) & (table["method"] != "full"), "final_loss"]
    assert [number(mark[MEAN]) for mark in drawn] == pytest.approx(of_seed_0, abs=1e-4)
    lines = [mark["line"] for mark in marks(figure, "rule", hidden=hidden) if "line" in mark]
    assert lines == ["base"]


def test_test_rows_are_shown_where_there_are_any(run):
    table = runs.summary(run).assign(test_loss=lambda t: t["final_loss"] + 0.5)
    table["base_test_loss"] = 4.0
    figure = figures.rank_curve(table, Layout("rank"))
    said = texts(figure)
    assert "final test loss (nats)" in said and "base 4.000, beyond this scale" in said
    assert "validation" not in " ".join(said)


def test_further_axes_are_colours_and_panels(grid):
    table = runs.summary(grid)
    by = runs.axes(grid, table)
    figure = figures.rank_curve(table, layout.layout(table, by))
    assert {"alpha = 8", "alpha = 16"}.isdisjoint(texts(figure))  # the rate has the panels
    assert {"learning rate = 0.001", "learning rate = 0.002"} <= set(texts(figure))
    drawn = means(figure)
    assert len(drawn) == 12 and {mark["α"] for mark in drawn} == {"8", "16"}
    one = figures.rank_curve(table, layout.layout(table, by), panels=[0.002])
    assert len(means(one)) == 6
    best = figures.rank_curve(table, Layout("rank", "alpha", None, ("lr",)))
    assert {mark["learning rate"] for mark in means(best)} == {"0.001"}


def test_an_axis_of_names_is_listed_best_first(run):
    table = runs.summary(run).assign(init=["kaiming", "gaussian"] * 4)
    table["final_loss"] = table["init"].map({"kaiming": 1.3, "gaussian": 1.1})
    figure = figures.rank_curve(with_full(table), Layout("init"))
    said = texts(figure)
    assert said.index("gaussian") < said.index("kaiming") and "none" not in said
    assert not marks(figure, "line")  # none leads from one name to another
    assert "full fine-tuning 0.900" in said


def test_methods_are_names_too_and_full_fine_tuning_is_one(run):
    table = with_full(runs.summary(run))
    figure = figures.rank_curve(table, Layout("method", best=("rank",)))
    found = {mark["method"]: number(mark[MEAN]) for mark in means(figure)}
    assert found == {"lora": pytest.approx(1.2), "full": pytest.approx(FULL)}


def test_many_colours_differ_in_something(run):
    table = runs.summary(run)
    rows = pd.concat([table.assign(init=f"init {n}", member=n) for n in range(12)])
    rows = rows.reset_index(drop=True)
    spec = specification(figures.rank_curve(rows, Layout("rank", "init")))
    text = str(spec)
    assert all(f"init {n}" in text for n in range(12))
    ramp = figures.encodings.ramp
    assert len(set(ramp(9))) == 9 and ramp(1) == ramp(9)[:1]


def test_learning_curves_leave_diverged_members_out_of_the_mean(run):
    figure = figures.learning_curves(run.metrics, runs.summary(run), runs.Axes("rank", ()))
    thick = [mark for mark in marks(figure, "symbol") if "seeds" in mark]
    rank_1 = [mark for mark in thick if mark["rank r of the adapter"] == "1"]
    seed_0 = run.metrics[(run.metrics["member"] == 0) & (run.metrics["split"] == "eval")]
    found = [number(mark["mean validation loss (nats)"]) for mark in rank_1]
    assert found == pytest.approx(seed_0["loss"], abs=1e-4) and rank_1[0]["seeds"] == "1"
    ends = [mark for mark in marks(figure, "symbol") if "status" in mark]
    assert [mark["status"] for mark in ends] == ["diverged"]
    assert len(marks(figure, "line")) >= 7


def test_stopped_members_end_where_they_were_stopped(run):
    table = runs.summary(run)
    table.loc[6, "status"] = "stopped"
    metrics = run.metrics[(run.metrics["member"] != 6) | (run.metrics["step"] <= 50)]
    figure = figures.learning_curves(metrics, table, runs.Axes("rank", ()))
    ends = {mark["member"]: mark["step"] for mark in marks(figure, "symbol") if "status" in mark}
    assert ends[table["name"][6]] == "50"


def test_learning_curves_have_a_panel_for_each_of_the_other_axes(grid):
    table = runs.summary(grid)
    by = runs.axes(grid, table)
    titles = [f"alpha = {a}, lr = {lr}" for a in (8, 16) for lr in (0.001, 0.002)]
    figure = figures.learning_curves(grid.metrics, table, by)
    assert set(titles) <= set(texts(figure))
    figure = figures.learning_curves(grid.metrics, table, by, panels=titles[1:2])
    assert titles[1] in texts(figure) and titles[0] not in texts(figure)


def test_a_map_frames_the_best_of_each_row_and_marks_edges(grid):
    table = runs.summary(grid)
    table["final_loss"] += 0.05 * (table["rank"] == 4) * (table["lr"] == 1e-3) * 4
    by = runs.axes(grid, table)
    laid = layout.map_layout(table, by, "rank", "lr")
    figure = figures.setting_map(table, laid)
    cells = [mark for mark in marks(figure, "rect") if MEAN in mark]
    assert len(cells) == 3 * 2 * 2  # rank, rate, and panels of alpha
    arrows = [text for text in texts(figure) if text in "◂▸" and text]
    assert sorted(arrows) == ["▸"] * 2 + ["◂"] * 4
    # A row's best is among the cells that reached the end.
    at = (table["rank"] == 4) & (table["lr"] == 2e-3) & (table["seed"] == 0)
    table.loc[at, ["status", "final_loss"]] = ["diverged", np.nan]
    arrows = [text for text in texts(figures.setting_map(table, laid)) if text in "◂▸" and text]
    assert sorted(arrows) == ["◂"] * 6


def test_a_map_says_which_cells_were_stopped(grid):
    table = runs.summary(grid)
    table.loc[table["lr"] == 2e-3, ["status", "final_loss"]] = ["stopped", np.nan]
    by = runs.Axes("rank", (), ("lr",))
    figure = figures.setting_map(table, layout.map_layout(table, by, "rank", "lr"))
    assert texts(figure).count("stopped") == 3 and "undefined" not in texts(figure)


def test_full_fine_tuning_has_a_panel_of_learning_curves(run):
    table = with_full(runs.summary(run))
    assert set(layout.panel_of(table, runs.Axes("rank", ()))) == {"adapters", "full fine-tuning"}
    assert set(layout.panel_of(runs.summary(run), runs.Axes("rank", ()))) == {""}


def test_the_frontier_of_the_chart_is_that_of_the_table(grid):
    table = with_full(runs.summary(grid))
    table["trainable_params"] *= np.where(table["alpha"] == 16, 2, 1)
    names = ["rank", "alpha", "lr"]
    settings = runs.settings(table, runs.Axes("rank", ("alpha", "lr")))
    kept = layout.frontier(list(settings["trainable_params"]), list(settings["mean"]))
    figure = figures.size_curve(table, names, "lr")
    named = {text for text in texts(figure) if text.startswith("r ") or "full" in text}
    first = table.drop_duplicates(names)
    expected = figures.loss_sizes.short_names(settings.loc[kept].assign(method="lora"), names)
    expected = {text or "full fine-tuning" for text in expected}
    assert named == expected and "full fine-tuning" in named and len(first) == len(settings)
    assert len(means(figure)) == len(settings)
    # Without the best members, another setting is on the line.
    hidden = table.index[(table["rank"] == 4) & (table["lr"] == 1e-3)]
    assert "r 4, α 8, lr 0.002" in texts(figure, hidden) and "r 4, α 8, lr 0.002" not in named


def test_all_members_are_lines_through_their_values(grid):
    table = with_full(runs.summary(grid))
    table.loc[0, ["status", "final_loss"]] = ["diverged", np.nan]
    figure = figures.parallel(table, ["rank", "alpha", "lr"])
    said = texts(figure)
    assert {"rank", "α", "rate", "parameters", "loss"} <= set(said)
    assert {"0.001", "0.002", "none", "10k"} <= set(said)
    at, ticks = figures.members.heights(table["rank"], "rank")
    assert at[90] == 0 and at[table.index[-3]] == 1 and ticks["none"] == 0
    assert ticks["1"] < ticks["2"] < ticks["4"]
    drawn = lambda hidden=(): {mark["member"] for mark in marks(figure, "line", hidden)}
    assert len(drawn()) == len(table) and len(drawn([0, 1, 2])) == len(table) - 3


def test_charts_of_one_seed_and_one_setting(tmp_path):
    table = runs.summary(runs.load(make_run(tmp_path / "run", seeds=(0,), adapters=False)))
    drawn = means(figures.rank_curve(table, Layout("rank")))
    assert len(drawn) == 5 and "95% interval from" not in drawn[0]


def test_a_chart_of_200_members_is_small(tmp_path):
    directory = make_run(
        tmp_path / "run", (1, 2, 4, 8), tuple(range(5)), (8.0, 16.0),
        tuple(1e-3 * 2**n for n in range(5)), adapters=False,
    )  # fmt: skip
    run = runs.load(directory)
    metrics = pd.concat([run.metrics.assign(step=run.metrics["step"] + n) for n in range(50)])
    table = runs.summary(run)
    by = runs.axes(run, table)
    made = [
        figures.learning_curves(metrics, table, by),
        figures.rank_curve(table, layout.layout(table, by)),
        figures.parallel(table, by.names),
        figures.size_curve(table, by.names, "lr"),
    ]
    page = charts.embedded({str(n): specification(chart) for n, chart in enumerate(made)})
    assert len(table) == 200 and len(page) < 500_000


def test_every_chart_compiles_without_a_warning(grid, capfd):
    table = with_full(runs.summary(grid))
    by = runs.axes(grid, table[table["method"] != "full"])
    made = [
        figures.rank_curve(table, layout.layout(table, by)),
        figures.rank_curve(table, Layout("method", best=by.names)),
        figures.learning_curves(grid.metrics, runs.summary(grid), by),
        figures.setting_map(table, layout.map_layout(table, by, "rank", "lr")),
        figures.size_curve(table, by.names, "lr"),
        figures.parallel(table, by.names),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(marks(chart) for chart in made)
    out, err = capfd.readouterr()
    assert "WARN" not in out + err and "rror" not in err
