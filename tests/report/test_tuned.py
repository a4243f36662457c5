"""A run of which one axis was tuned by halving: some members stopped, and every setting has its own
rate."""

import pandas as pd
from reading import Page
from synthetic import kernels, make_run

from lorax import report, terminal
from lorax.analysis import answer, runs

RATES = (1e-3, 2e-3)


def tuned(directory):
    """Ranks 1 and 4: at rank 1 the second rate has stopped, at rank 4 the first."""
    return make_run(directory, ranks=(1, 4), lrs=RATES, stopped=(2, 3, 4, 5))


def test_a_stopped_member_has_no_result(tmp_path):
    run = runs.load(tuned(tmp_path))
    table = runs.summary(run)
    stopped = table[table["status"] == "stopped"]
    assert list(stopped.index) == [2, 3, 4, 5] and (stopped["stopped_at"] == 50).all()
    assert stopped["final_loss"].isna().all() and (stopped["final_step"] == 50).all()
    assert stopped["diverged_at"].isna().all()
    assert table.loc[[0, 1, 6, 7], "final_loss"].notna().all()


def test_every_setting_stands_at_its_own_best_value(tmp_path):
    run = runs.load(tuned(tmp_path))
    table = runs.summary(run)
    by = runs.axes(run, table)
    assert by == runs.Axes("rank", (), ("lr",))
    settings = runs.settings(table, by)
    assert settings[["rank", "lr", "n", "diverged"]].values.tolist() == [
        [1, 1e-3, 2, 0],
        [4, 2e-3, 2, 0],
    ]
    assert list(runs.averaged(table, by)) == [0, 1, 6, 7]
    assert runs.best_setting(settings)["rank"] == 4
    # A second rate that was trained to the end is another candidate, in no mean.
    table.loc[[2, 3], ["status", "final_loss"]] = "finished", 9.0
    assert runs.settings(table, by)["mean"].equals(settings["mean"])
    assert list(runs.averaged(table, by)) == [0, 1, 6, 7]


def test_the_answer_is_among_the_settings_at_their_best(tmp_path):
    found = answer.answer(runs.load(tuned(tmp_path)))
    assert found["axes"] == {"compared": ["rank"], "at_its_best": ["lr"]}
    assert found["setting"] == {"rank": 4, "lr": 2e-3}


def test_the_terminal_has_a_line_for_every_setting(tmp_path):
    rows = terminal.settings(runs.load(tuned(tmp_path)))
    assert [(row["rank"], row["lr"], row["seeds"], row["status"]) for row in rows] == [
        ("4", "0.002", "2", "2 stopped"),
        ("1", "0.001", "2", "2 stopped"),
    ]


def test_a_point_with_nothing_left_is_shown_without_a_result(tmp_path):
    run = runs.load(tuned(tmp_path))
    table = runs.summary(run)
    table.loc[[0, 1], ["status", "final_loss"]] = "diverged", float("nan")
    settings = runs.settings(table, runs.axes(run, table))
    assert settings["n"].tolist() == [0, 2] and settings["diverged"].tolist() == [2, 0]


def test_the_page_of_a_tuned_run(tmp_path, undrawn):
    text = report.write(tuned(tmp_path), kernels()).read_text()
    assert "8 (4 finished, 0 diverged, 4 stopped in favour of better values)" in text
    rows = Page(text).table("member", "status")
    assert [row["status"] for row in rows].count("stopped at step 50") == 4
    assert "where members were stopped: 4, for a better learning rate" in text
    assert "could not be made" not in text
    settings = pd.read_csv(tmp_path / "analysis" / "settings.csv")
    assert settings["lr"].tolist() == [1e-3, 2e-3]
    curves = pd.read_csv(tmp_path / "figures" / "learning_curves.csv")
    means = curves[curves["shows"] == "mean"]
    assert len(means) == 6 and (curves[curves["member"] == 2]["step"] <= 50).all()
