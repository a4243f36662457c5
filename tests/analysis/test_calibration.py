"""Estimators against a known truth: on tables made for it, and on random subspaces."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from drawn import marks, texts
from safetensors.numpy import save_file

from lorax import report
from lorax.analysis import calibration, figures, runs, tables

# ---------------------------------------------------------------------------------------- the knee


def curve(**means):
    return pd.DataFrame({"rank": [int(r[1:]) for r in means], "mean": list(means.values())})


@pytest.mark.parametrize("truth", [1, 2, 3, 4, 8, 16])
def test_the_knee_of_a_flat_spectrum_is_its_rank(truth):
    ranks = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    left = np.maximum(0, 1 - ranks / truth)
    table = pd.DataFrame({"rank": ranks, "mean": 5 * left + 1e-9 * np.sin(ranks)})
    assert calibration.knee(table, base=5.0) == truth
    # Overfitting from there on doesn't move it, nor does the order of the rows.
    table["mean"] += 1e-3 * ranks
    assert calibration.knee(table.sample(frac=1, random_state=0), base=5.0) == truth


def test_the_knee_is_where_a_hundredth_of_the_improvement_is_left():
    assert calibration.knee(curve(r1=1.051, r2=1.039, r4=1.0), base=5.0) == 2
    assert calibration.knee(curve(r1=1.051, r2=1.041, r4=1.0), base=5.0) == 4
    assert calibration.knee(curve(r1=1.051, r2=1.041, r4=1.0), base=5.0, share=0.5) == 1
    assert calibration.knee(curve(r1=np.nan, r2=1.0), base=5.0) == 2  # diverged


def test_no_improvement_has_no_knee():
    with pytest.raises(ValueError, match="knee: no rank is better than the base, 5"):
        calibration.knee(curve(r1=5.0, r2=6.0), base=5.0)


# ------------------------------------------------------------------------------------ the dimension


@pytest.mark.parametrize("d", [1, 10, 36])
def test_a_random_subspace_reaches_the_share_d_over_d_star(d):
    """|J (theta_0 + P z - theta*)|^2 at its least over z: mean and variance as `dimension` says."""
    n, total, draws = 40, 120, 400  # d*, D
    rng = np.random.default_rng(0)
    j = 3.0 * np.linalg.qr(rng.standard_normal((total, n)))[0].T  # rows of one length
    t = j @ rng.standard_normal(total)
    shares = []
    for _ in range(draws):
        q = np.linalg.qr(j @ rng.standard_normal((total, d)))[0]
        shares.append(np.sum((q.T @ t) ** 2) / np.sum(t**2))
    a, b = d / 2, (n - d) / 2
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert np.isclose(variance, 2 * (d / n) * (1 - d / n) / (n + 2))
    assert abs(np.mean(shares) - d / n) < 4 * np.sqrt(variance / draws)
    assert 0.75 < np.var(shares) / variance < 1.33


def test_the_dimension_of_such_a_curve_is_d_star():
    dims = np.array([5, 10, 20, 30, 40, 60])
    table = pd.DataFrame({"dim": dims, "mean": 4.0 * np.maximum(0, 1 - dims / 40)})
    for share in (0.5, 0.9):
        assert np.isclose(calibration.dimension(table, 4.0, share=share), 40)
    assert np.isclose(calibration.dimension(table.iloc[:1], 4.0, share=0.1), 40)  # through d = 0
    assert np.isnan(calibration.dimension(table.iloc[:3], 4.0))  # not reached


# ---------------------------------------------------------------------------------------- the table


def member(index, **fields):
    about = {"member": index, "group": 0, "name": f"m{index}", "method": "lora", "rank": None}
    about |= {"dim": None, "scale": 1.0, "base": "random:mlp-12-12", "lr": 0.1, "seed": 0}
    about |= {"planted_rank": None, "spectrum": "flat", "noise": 0.0, "inputs": None}
    about |= {"trainable_params": 10, "optimizer_bytes": 100}
    return about | {"data_seed": 0, "planted_dim": None} | fields


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """LoRA on updates of rank 2 and of rank 3, AdaLoRA on two kernels, subspaces, a search."""
    directory = tmp_path_factory.mktemp("runs") / "planted"
    lines, losses, deltas = [], [], []
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    of_rank = lambda r, scale=1.0: ((u[:, :r] * scale) @ v[:r]).astype(np.float32)

    def add(loss, delta, **fields):
        lines.append(member(len(lines), **fields))
        losses.append(loss)
        deltas.append(delta)

    for truth, noise in ((2, 0.0), (3, 0.5)):
        planted = {"planted": {"head": [1.0] * truth}, "planted_rank": truth, "noise": noise}
        for r in (1, 2, 3, 4):
            left = max(0.0, 1 - r / truth)
            add(left, {"head": of_rank(min(r, truth))}, rank=r, **planted)
    both = {"planted": {"dense_1": [1.0] * 3, "head": []}, "planted_rank": [3, 0]}
    add(0.1, {"dense_1": of_rank(3)}, method="adalora", rank=6, **both)
    single = {"planted": {"head": [1.0]}, "planted_rank": 1, "planted_dim": 20, "inputs": 4}
    for d in (5, 10, 15, 20, 30):
        add(max(0.0, 1 - d / 20), {}, method="subspace", dim=d, **single)

    directory.mkdir()
    evals = [
        {"member": i, "step": step, "split": "eval", "loss": loss if step else 1.0}
        for i, loss in enumerate(losses)
        for step in (0, 10)
    ]
    about = {"config": {"task": {"name": "planted"}, "sweep": {}, "base": "random:mlp-12-12"}}
    state = {"members": {str(i): {"status": "finished"} for i in range(len(lines))}}
    (directory / "config.json").write_text(json.dumps(about))
    (directory / "status.json").write_text(json.dumps(state | {"state": "finished"}))
    for name, rows in (("members", lines), ("metrics", evals)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    for i, delta in enumerate(deltas):
        if delta:
            folder = directory / "adapters" / str(i)
            folder.mkdir(parents=True)
            save_file(delta, folder / "delta.safetensors")
            (folder / "method.json").write_text(json.dumps({"name": "full", "hp": {}}))
    (directory / "analysis").mkdir()
    (directory / "analysis" / "intrinsic.csv").write_text(
        "condition,method,metric,threshold,d,verdict\n"
        "inputs=4,subspace,loss,0.9,18.9,reached\n"
        "inputs=4,subspace,loss,0.5,,not reached\n"
    )
    return runs.load(directory)


@pytest.fixture(scope="module")
def found(run):
    table = runs.summary(run)
    learned = tables.spectra(tables.updates(run, table.index)[0])
    return calibration.estimates(run, table, *learned)


def test_every_estimator_meets_its_truth(found):
    got = {
        (row.estimator, row.path, row.noise): (row.truth, row.estimate)
        for row in found[found["estimator"] != "search"].itertuples()
    }
    for name in ("knee", *calibration.RANKS, "numerical rank"):
        path = "" if name == "knee" else "head"
        for truth, noise in ((2, 0.0), (3, 0.5)):
            planted, estimate = got.pop((name, path, noise))
            assert planted == truth
            assert np.isclose(estimate, truth, rtol=1e-5), name
    assert got.pop(("AdaLoRA", "dense_1", 0.0)) == (3, 3)
    assert got.pop(("AdaLoRA", "head", 0.0)) == (0, 0)
    truth, estimate = got.pop(("d90 / 0.9", "", 0.0))
    assert truth == 20 and np.isclose(estimate, 20)
    assert got == {}
    searched = found[found["estimator"] == "search"]["estimate"]
    assert np.isclose(searched.iloc[0], 21) and np.isnan(searched.iloc[1])
    assert np.allclose((found["estimate"] - found["truth"] - found["error"]).dropna(), 0)
    assert set(found["estimator"]) == set(calibration.ESTIMATORS)


def test_what_a_spectrum_that_is_not_flat_would_give():
    sigma = np.array([1, 0.5, 0.25])
    expected = {name: float(f(sigma)) for name, f in calibration.RANKS.items()}
    assert np.isclose(expected["stable rank"], 1.3125) and expected["energy rank 0.9"] == 2


def test_a_rate_at_which_a_seed_diverged_is_no_choice(run):
    # Rank 1 has the loss of rank 2 at a rate at which another seed diverged.
    table = runs.summary(run)
    of_two = table[(table["planted_rank"].astype(str) == "2") & (table["method"] == "lora")]
    lucky = of_two[of_two["rank"] == 1].assign(final_loss=0.0, lr=1.0, setting="lr=1.0")
    other = lucky.assign(final_loss=np.nan, seed=1, status="diverged")
    knees = []
    for rows in ([of_two], [of_two, lucky], [of_two, lucky, other]):
        members = pd.concat(rows)
        members.index = of_two.index.append(of_two.index[:1].repeat(len(members) - len(of_two)))
        knees.append(calibration.estimates(run, members, pd.DataFrame(), pd.DataFrame()))
    knees = [x.loc[x["estimator"] == "knee", "estimate"].tolist() for x in knees]
    assert knees == [[2], [1], [2]]


def test_summary(found):
    table = calibration.summary(found).set_index(["estimator", "noise"])
    assert table.loc[("knee", 0.0), "exact"] == 1 and table.loc[("knee", 0.0), "n"] == 1
    row = table.loc[("search", 0.0)]
    assert row["missing"] == 1 and np.isclose(row["bias"], 0.05) and row["exact"] == 0


def test_no_planted_task_has_no_estimates(run):
    plain = runs.Run(**{**vars(run), "members": run.members.drop(columns="planted")})
    table = runs.summary(plain)
    assert calibration.estimates(plain, table, pd.DataFrame(), pd.DataFrame()).empty


def test_members_that_learn_nothing_have_no_knee(run):
    table = runs.summary(run)
    table["base_loss"] = 0.0
    found = calibration.estimates(run, table[table["method"] == "lora"], *[pd.DataFrame()] * 2)
    assert found.loc[found["estimator"] == "knee", "estimate"].isna().all()


def test_a_subspace_of_some_parameters_has_another_d_star(run):
    table = runs.summary(run).assign(parameters="re:.*/kernel")
    found = calibration.estimates(run, table, pd.DataFrame(), pd.DataFrame())
    assert "d90 / 0.9" not in set(found["estimator"]) and "knee" in set(found["estimator"])


def test_estimates_without_any_update(run):
    table = runs.summary(run)
    found = calibration.estimates(run, table, pd.DataFrame(), pd.DataFrame())
    assert set(found["estimator"]) == {"knee", "d90 / 0.9", "search"}


# --------------------------------------------------------------------------------------- the figure


def test_figure(found):
    figure = figures.calibration(found)
    said = texts(figure)
    assert set(calibration.ESTIMATORS) <= set(said) and {"0", "0.5", "noise"} <= set(said)
    assert {"planted r*", "estimate of r*", "planted d*", "estimate of d*"} <= set(said)
    points = [mark for mark in marks(figure, "symbol") if "estimate" in mark]
    assert len(points) == found["estimate"].notna().sum()
    assert len(marks(figure, "line")) == 2 * found["estimator"].nunique()  # ends of agreement


def test_the_report_of_a_planted_task_has_it(run, tmp_path):
    """Of the LoRA members alone, as a rank sweep leaves them."""
    directory = tmp_path / "run"
    shutil.copytree(run.directory, directory)
    (directory / "analysis" / "intrinsic.csv").unlink()
    for name in ("members", "metrics"):
        lines = (directory / f"{name}.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["member"] < 8]
        (directory / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    page = report.write(directory).read_text()
    assert ">Calibration</h2>" in page and "numerical rank" in page
    kept = pd.read_csv(directory / "analysis" / "calibration.csv")
    knees = kept[kept["estimator"] == "knee"]
    assert knees["truth"].tolist() == knees["estimate"].tolist() == [2, 3]
    assert (directory / "figures" / "calibration.csv").stat().st_size > 100
