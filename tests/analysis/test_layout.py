"""What of a sweep is drawn how: which axis is x, colour and panel, and which members are drawn."""

import numpy as np
import pandas as pd
import pytest

from lorax.analysis import compare, runs, settings_compared
from lorax.analysis.figures import layout
from lorax.analysis.figures.layout import Layout
from lorax.report import selection


def members(**axes):
    """A table like `runs.summary`'s: all combinations of the values, two seeds each."""
    axes = {"rank": [4], "lr": [1e-3], "method": ["lora"]} | axes | {"seed": [0, 1]}
    grid = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    grid = grid.astype({name: object for name in axes if None in axes[name]})
    return grid.assign(
        member=grid.index, name="m", status="finished", final_loss=1.0, base_loss=3.0,
        trainable_params=100,
    )  # fmt: skip


def laid_out(main, *others, tuned=(), **axes):
    return layout.layout(members(**axes), runs.Axes(main, others, tuned))


def test_numbers_are_x_and_the_rate_is_the_first_to_be_at_its_best():
    ranks, lrs, alphas = {"rank": [1, 2, 4]}, {"lr": [0.1, 0.2]}, {"alpha": [8, 16]}
    assert laid_out("rank", **ranks) == Layout("rank")
    assert laid_out("rank", "lr", **ranks, **lrs) == Layout("rank", "lr")
    names = {"targets": ["q v", "q", "o"]}
    assert laid_out("rank", "targets", "lr", **ranks, **names, **lrs) == Layout(
        "rank", "lr", "targets"
    )
    four = laid_out("rank", "targets", "alpha", "lr", **ranks, **names, **alphas, **lrs)
    assert four == Layout("rank", "alpha", "targets", ("lr",))
    assert four.names == ("rank", "alpha", "targets", "lr")
    five = laid_out("rank", "targets", "alpha", "lr", "init", init=["a", "b"], **ranks, **names,
                    **alphas, **lrs)  # fmt: skip
    assert five == Layout("rank", "alpha", "targets", ("lr", "init"))


def test_names_are_x_only_without_numbers_and_methods_have_the_colours():
    names = {"targets": ["q v", "q"], "init": ["a", "b"]}
    assert laid_out("targets", "init", **names) == Layout("targets", "init")
    methods = {"method": ["lora", "dora"], "rank": [1, 2], "lr": [0.1, 0.2]}
    assert laid_out("method", "rank", "lr", **methods) == Layout("rank", "method", "lr")
    assert laid_out("method", "lr", method=["lora", "full"], lr=[0.1, 0.2]) == Layout(
        "lr", "method"
    )


def test_a_tuned_axis_is_at_its_best():
    found = laid_out("rank", tuned=("lr",), rank=[1, 2], lr=[0.1, 0.2])
    assert found == Layout("rank", best=("lr",))


def test_at_best_takes_the_lowest_mean_of_settings_that_reached_the_end():
    table = members(rank=[1, 2], lr=[0.1, 0.2, 0.3])
    table["final_loss"] = table["lr"].map({0.1: 1.2, 0.2: 1.1, 0.3: 1.0})
    assert set(layout.at_best(table, ["rank"], ["lr"])["lr"]) == {0.3}
    table.loc[(table["lr"] == 0.3) & (table["seed"] == 0), "status"] = "diverged"
    best = layout.at_best(table, ["rank"], ["lr"])
    assert set(best["lr"]) == {0.2} and len(best) == 4
    table.loc[table["rank"] == 1, "status"] = "stopped"  # nothing else at this rank
    assert set(layout.at_best(table, ["rank"], ["lr"])["rank"]) == {1, 2}
    assert layout.at_best(table, ["rank"], []) is table


def test_members_without_a_number_on_x_are_lines_across():
    table = members(rank=[1, 2], lr=[0.1, 0.2])
    full = table.head(4).assign(method="full", rank=None, member=range(90, 94))
    full["final_loss"] = [0.9, 0.9, 0.8, 0.8]  # the second rate is better
    table = pd.concat([table, full], ignore_index=True).astype({"rank": object})
    points, others = layout.curve_members(table, Layout("rank", "lr"))
    assert set(points["method"]) == {"lora"} and list(others["member"]) == [92, 93]
    assert layout.line_names(others, points, "rank") == ["full fine-tuning"] * 2
    # A missing number of an adapter's axis is called by what it is.
    some = members(n_train=[None, 64, 128])
    points, others = layout.curve_members(some, Layout("n_train"))
    assert layout.line_names(others, points, "n_train") == ["n_train = all"] * 2
    names = members(method=["lora", "full"], targets=["q", "v"])
    assert layout.curve_members(names, Layout("targets"))[1]["method"].unique() == ["full"]
    assert layout.curve_members(names, Layout("method"))[1].empty


@pytest.mark.parametrize("count, sizes", [(1, [1]), (12, [12]), (13, [6, 7]), (30, [10] * 3)])
def test_no_panel_is_left_out(count, sizes):
    parts = selection.pages(list(range(count)), layout.MOST_PANELS)
    assert sorted(map(len, parts)) == sizes and sum(parts, []) == list(range(count))


def test_maps_have_the_rate_as_columns_and_names_as_panels():
    table = members(rank=[1, 2], alpha=[8, 16], lr=[0.1, 0.2], targets=["q", "v"])
    by = runs.Axes("rank", ("targets", "alpha", "lr"))
    assert layout.pairs(table, by) == [("rank", "alpha"), ("rank", "lr"), ("alpha", "lr")]
    assert layout.map_layout(table, by, "rank", "lr") == Layout("lr", "rank", "targets", ("alpha",))
    assert layout.map_layout(table, by, "rank", "alpha").best == ("lr",)
    assert layout.pairs(members(targets=["q", "v"]), runs.Axes("targets", ())) == []


def test_the_frontier_is_what_no_other_beats():
    params = [10, 10, 20, 30, 30, 40]
    losses = [2.0, 1.9, 1.9, 1.5, 1.6, 1.7]
    assert layout.frontier(params, losses) == [False, True, False, True, False, False]


def test_the_axis_of_losses_reaches_to_a_base_that_is_near():
    losses = pd.Series([1.0, 2.0, np.nan])
    low, high = layout.extent(losses, 3.0)
    assert low < 1 and 3 < high < 3.5
    low, high = layout.extent(losses, 9.0)  # far above: not reached
    assert high < 2.2
    low, high = layout.extent(pd.Series([1.0, 2.0, 50.0]), 3.0)  # diverging: it is at the edge
    assert high < 3.5
    assert layout.extent(pd.Series([np.nan]), None) == (0.0, 1.0)


def test_the_axis_of_losses_has_room_for_intervals():
    table = members(rank=[1, 2]).assign(final_loss=[1.0, 1.1, 2.0, 2.0])
    low, high = layout.widened((0.9, 2.1), table, ["rank"], "final_loss")
    assert low == pytest.approx(compare.interval([1.0, 1.1]).low) and high == 2.1
    table["final_loss"] = [1.0, 1.9, 2.0, 2.0]  # from -4.3: half of the axis more
    assert layout.widened((0.9, 2.1), table, ["rank"], "final_loss")[0] == pytest.approx(0.3)
    one = table[table["seed"] == 0]
    assert layout.widened((0.9, 2.1), one, ["rank"], "final_loss") == (0.9, 2.1)


def test_many_evaluations_are_thinned_and_the_last_of_each_member_stays():
    steps, count = 400, 50
    curves = pd.DataFrame(
        {"member": np.repeat(range(count), steps), "step": list(range(steps)) * count, "loss": 1.0}
    )
    curves = curves[(curves["member"] != 3) | (curves["step"] <= 77)]  # stopped
    kept = layout.thinned(curves)
    assert len(kept) <= layout.MOST_POINTS + count
    assert kept.groupby("member")["step"].max()[[2, 3]].to_list() == [399, 77]
    assert layout.thinned(curves.head(50)).equals(curves.head(50))


def test_what_is_reported_is_the_test_rows_where_there_are_any():
    table = members(rank=[1, 2])
    assert runs.measured(table) == ("final_loss", "base_loss", "validation")
    assert runs.base_loss(table) == 3.0
    table = table.assign(test_loss=np.nan, base_test_loss=np.nan)
    assert runs.measured(table).split == "validation"
    table = table.assign(test_loss=1.1, base_test_loss=[3.1, 3.1, 3.1, 4.0])
    assert runs.measured(table) == ("test_loss", "base_test_loss", "test")
    assert runs.base_loss(table) is None  # the members have different bases


def test_what_is_chosen_on_the_validation_rows_is_reported_on_the_test_rows():
    table = members(rank=[1, 2], lr=[0.1, 0.2])
    table = table.assign(scale=1.0, final_loss=table["lr"] + 0.01 * table["seed"])
    table["test_loss"] = 5 - table["lr"] + table["seed"]  # the other rate looks better here
    for by in (runs.Axes("rank", ("lr",)), runs.Axes("rank", (), ("lr",))):
        found = settings_compared.curve(table, by, "rank")
        assert found["mean"].to_list() == pytest.approx([5.4] * 2) and (found["n"] == 2).all()
        found = settings_compared.with_interval(found)
        of_two = compare.interval([4.9, 5.9])
        assert list(found[["low", "high"]].iloc[0]) == pytest.approx([of_two.low, of_two.high])
