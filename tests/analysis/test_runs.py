"""A run directory as tables: what is read, what is refused, and the best setting."""

import json
import shutil
import types

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from synthetic import BASE_LOSS, make_run, planted_factors

from lorax.analysis import runs, tables
from lorax.interop.peft import Factors
from lorax.report import words
from lorax.train import loop


def read(run):
    table = runs.summary(run)
    by = runs.axes(run, table)
    return table, by, runs.settings(table, by)


# ---------------------------------------------------------------------------------------- reading


def test_load_reads_what_was_written(tmp_path):
    run = runs.load(make_run(tmp_path / "run"))
    assert list(run.members.index) == list(range(10))
    assert run.config["config"]["base"] == "gpt2-nano" and run.status["state"] == "finished"
    assert set(run.metrics["split"]) == {"train", "eval"}
    assert run.metrics["loss"].dtype == float
    for path, (a, b, s, _) in planted_factors(2, 1, 8.0).items():
        got = run.adapter(3)[path]
        np.testing.assert_array_equal(got.a, a)
        np.testing.assert_array_equal(got.b, b)
        assert got.s == s


def test_torn_last_line_is_ignored_with_a_warning(tmp_path):
    directory = make_run(tmp_path / "run")
    whole = runs.load(directory).metrics
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"member": 0, "step": 150, "spl')
    with pytest.warns(UserWarning, match=r"metrics.jsonl:\d+: incomplete last line"):
        torn = runs.load(directory).metrics
    pd.testing.assert_frame_equal(torn, whole)


def test_damage_is_named_by_file_and_line(tmp_path):
    directory = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere: no such run directory"):
        runs.load(tmp_path / "nowhere")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join([lines[0], "{torn", *lines[1:]]))
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        runs.load(directory)
    (directory / "metrics.jsonl").write_text(lines[0] + '\n{"member": 0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: need the fields"):
        runs.load(directory)
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        runs.load(directory)


@pytest.mark.parametrize("file", ["config.json", "status.json"])
def test_damaged_json_is_named(tmp_path, file):
    directory = make_run(tmp_path / "run", ranks=(1,))
    (directory / file).write_text("[1, 2")
    with pytest.raises(ValueError, match=file):
        runs.load(directory)


def test_missing_adapter_is_named(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1,), adapters=False))
    with pytest.raises(FileNotFoundError, match="adapters/0"):
        run.adapter(0)
    found, missing = tables.updates(run, [0, 1])
    assert not found and set(missing) == {0, 1}


def test_a_path_with_a_comma_is_one_cell_of_a_ranking(tmp_path):
    ranking = [{"path": "blocks,0/q", "rank": 2, "score": 0.5}]
    (tmp_path / "analysis").mkdir()
    loop.write_rankings(tmp_path, [types.SimpleNamespace(rankings={3: ranking})])
    table = pd.read_csv(tmp_path / "analysis" / "sensitivity.csv")
    assert table.to_dict("records") == [{"member": 3} | ranking[0]]


def test_a_run_is_shown_by_what_came_of_it(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 2)))
    best = runs.summary(run)["final_loss"].idxmin()
    shown = repr(run)
    assert (
        shown.startswith("<Run run: finished, 4 members (lora), best rank=2,") and len(shown) < 99
    )
    assert run.members["name"][best] in shown
    early = make_run(tmp_path / "early", ranks=(1,), adapters=False)
    (early / "metrics.jsonl").write_text("")
    (early / "status.json").write_text("{}")
    assert repr(runs.load(early)) == "<Run early: state unknown, 2 members (lora)>"


def test_an_update_is_given_whatever_the_method(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(2,)))
    factors = run.update(0)
    assert all(isinstance(update, Factors) for update in factors.values())
    folder = run.directory / "adapters" / "1"
    shutil.rmtree(folder)
    folder.mkdir()
    dense = {path: f.s * f.a @ f.b for path, f in factors.items()}
    save_file(dense, folder / "delta.safetensors")
    (folder / "method.json").write_text('{"name": "loha", "hp": {}}')
    np.testing.assert_array_equal(run.update(1)["h/0/attn/q"], dense["h/0/attn/q"])
    updates, missing = tables.updates(run, [1, 0])
    assert list(updates) == [0, 1] and not missing  # those with factors first
    assert tables.has_factors(updates[0]) and not tables.has_factors(updates[1])


def test_a_damaged_update_is_named(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1,), adapters=False))
    with pytest.raises(FileNotFoundError, match="adapters/0"):
        run.update(0)
    for name in ("adapters/0/delta.safetensors", "trajectory/0-1/5.safetensors"):
        file = run.directory / name
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(20))
    with pytest.raises(ValueError, match="delta.safetensors: not a readable safetensors file"):
        run.delta(0)
    with pytest.raises(ValueError, match="5.safetensors: not a readable safetensors file"):
        tables.trajectory(run)


# ----------------------------------------------------------------------------------------- losses


def test_means_and_standard_errors_are_those_of_the_seeds(tmp_path):
    table, by, settings = read(runs.load(make_run(tmp_path / "run")))
    assert by == runs.Axes("rank", ())
    assert (table["base_loss"] == BASE_LOSS).all() and (table["final_step"] == 100).all()
    assert list(settings["rank"]) == [1, 2, 4, 8, 16] and (settings["n"] == 2).all()
    for _, row in settings.iterrows():
        losses = table.loc[table["rank"] == row["rank"], "final_loss"]
        assert row["mean"] == pytest.approx(losses.mean(), abs=1e-12)
        # Of two values, the standard error is half their distance.
        assert row["se"] == pytest.approx(abs(losses.iloc[0] - losses.iloc[1]) / 2, abs=1e-12)


def test_diverged_members_are_left_out_of_the_means(tmp_path):
    table, _, settings = read(runs.load(make_run(tmp_path / "run", diverged=(0, 6, 7))))
    assert list(table.index[table["status"] == "diverged"]) == [0, 6, 7]
    assert table.loc[[0, 6, 7], "final_loss"].isna().all()
    settings = settings.set_index("rank")
    assert settings.loc[1, "n"] == 1 and np.isnan(settings.loc[1, "se"])
    assert settings.loc[1, "mean"] == pytest.approx(1.61, abs=1e-12)
    assert settings.loc[8, "n"] == 0 and np.isnan(settings.loc[8, "mean"])
    assert settings.loc[8, "diverged"] == 2


def test_a_last_loss_that_is_not_finite_is_a_divergence(tmp_path):
    directory = make_run(tmp_path / "run", ranks=(1, 2), diverged=(1,))
    status = json.loads((directory / "status.json").read_text())
    status["members"]["1"] = {"status": "finished", "diverged_at": None, "seconds": 1.0}
    (directory / "status.json").write_text(json.dumps(status))
    assert runs.summary(runs.load(directory)).loc[1, "status"] == "diverged"


def test_a_setting_with_a_diverged_seed_is_not_the_best(tmp_path):
    # Rank 8 is as good as rank 4 and would be the lowest with the seed that is left.
    _, _, settings = read(runs.load(make_run(tmp_path / "a", ranks=(1, 4, 8), diverged=(5,))))
    assert settings["mean"].idxmin() == 2 and runs.best_setting(settings)["rank"] == 4
    run = runs.load(make_run(tmp_path / "b", ranks=(1, 4), diverged=(0, 1, 2, 3)))
    assert runs.best_setting(read(run)[2]) is None


def test_axes_of_several_kinds(tmp_path):
    _, by, settings = read(runs.load(make_run(tmp_path / "a", lrs=(1e-3, 3e-3), ranks=(1, 2))))
    assert by == runs.Axes("rank", ("lr",))
    assert set(settings["line"]) == {"lr=0.001", "lr=0.003"} and len(settings) == 4
    _, by, _ = read(runs.load(make_run(tmp_path / "b", ranks=(4,), alphas=(4.0, 8.0))))
    assert by == runs.Axes("alpha", ())
    _, by, settings = read(runs.load(make_run(tmp_path / "c", ranks=(4,))))
    assert by == runs.Axes(None, ()) and len(settings) == 1


def test_a_field_that_a_method_has_no_use_for_is_not_said(tmp_path):
    directory = make_run(tmp_path / "run", ranks=(4, 8, 16))
    rows = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row |= {"n_train": (100, None)[n % 2]} | ({"method": "full", "rank": None} if n > 3 else {})
    (directory / "members.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, by, settings = read(runs.load(directory))
    assert by == runs.Axes("method", ("rank", "n_train"))
    assert set(settings["line"]) == {
        "n_train=100", "n_train=all", "rank=4, n_train=100", "rank=4, n_train=all",
        "rank=8, n_train=100", "rank=8, n_train=all",
    }  # fmt: skip
    full = settings[(settings["method"] == "full") & settings["n_train"].isna()].iloc[0]
    assert words.setting(full, by) == "method = full with n_train=all"
    assert words.listed(table["rank"]) == "4, 8" and words.listed(table["n_train"]) == "100, all"
    assert words.cell("layers", None) == "all" and words.cell("rank", None) is None


def test_tied_axes_are_one(tmp_path):
    directory = make_run(tmp_path / "run", ranks=(1, 2))
    rows = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    for row in rows:
        row["targets"] = ["q", "v"] if row["rank"] == 1 else ["q"]
    (directory / "members.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, by, _ = read(runs.load(directory))
    assert by == runs.Axes("rank", ()) and set(table["targets"]) == {"q v", "q"}


def test_an_axis_that_is_no_field_is_not_averaged_over(tmp_path):
    directory = make_run(tmp_path / "run", ranks=(1,), seeds=(0, 1, 2, 3))
    config = json.loads((directory / "config.json").read_text())
    config["config"]["sweep"] = {"quant": ["none", "nf4"], "seed": [0, 1]}
    (directory / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["name"] = f"quant={('none', 'nf4')[n // 2]},seed={n % 2}"
    (directory / "members.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, by, settings = read(runs.load(directory))
    assert by.main == "setting" and list(settings["setting"]) == ["quant=nf4", "quant=none"]
    assert list(settings["n"]) == [2, 2]
