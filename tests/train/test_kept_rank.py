"""The loss against the rank kept of trained updates: both ends, and what is between."""

import json

import jax
import numpy as np
import pytest
from digits import trained

from lorax import adapters, config, losses, methods
from lorax.adapters import Adapter, Factors
from lorax.analysis import figures, runs, tables
from lorax.train import kept_rank, prepare

BASE = "random:mlp-64-12-10"


def study(name, **method):
    c = config.default()
    c.base, c.task.name, c.task.n_train = BASE, "digits", 64
    c.method.targets = ("re:.*/kernel",)
    c.method.update(name=name, **method)
    c.train.update(steps=12, batch_size=16, warmup=0, lr=3e-2, parallel="none")
    c.eval.update(every=6, examples=60, batch_size=25)
    c.analysis.kept_ranks = True
    return c


def loss_of(base, task, updates: dict) -> float:
    """The loss of the base plus {layer: dW}."""
    factors = {
        layer: Factors(dw.astype(np.float32), np.eye(dw.shape[1], dtype=np.float32), 1.0)
        for layer, dw in updates.items()
    }
    bound = adapters.bind(base, Adapter(factors, {}, {}))
    total, weight, _ = losses.array_loss(base.module, bound, task.eval)
    return float(total / weight)


def best_of_rank(update, k):
    u, sigma, vt = np.linalg.svd(update.s * update.a.astype(np.float64) @ update.b)
    return (u[:, :k] * sigma[:k]) @ vt[:k]


def test_each_rank_has_the_loss_of_the_best_updates_of_that_rank(tmp_path):
    c = study("lora")
    c.sweep.rank = (1, 6)
    run = trained(tmp_path / "run", c)
    (group,) = prepare.groups(config.members(c), lambda line: None)
    table, base, task = tables.kept_rank(run), group.base, group.task
    assert table["kept"].tolist() == [0, 1, 0, 1, 2, 4, 6]
    final = runs.summary(run)
    for member, rows in table.groupby("member"):
        assert rows["loss"].iloc[0] == pytest.approx(final["base_loss"][member], rel=1e-5)
        assert rows["loss"].iloc[-1] == pytest.approx(final["final_loss"][member], rel=1e-4)
        assert rows["accuracy"].iloc[-1] == pytest.approx(final["accuracy"][member])
        assert rows["energy"].iloc[0] == 0 and rows["energy"].iloc[-1] == 1
        updates, squares = run.update(member), lambda x: sum(np.sum(dw**2) for dw in x.values())
        whole = squares({layer: best_of_rank(x, 6) for layer, x in updates.items()})
        for _, row in rows.iterrows():
            kept = {layer: best_of_rank(x, int(row["kept"])) for layer, x in updates.items()}
            assert row["loss"] == pytest.approx(loss_of(base, task, kept), rel=1e-4)
            assert row["energy"] == pytest.approx(squares(kept) / whole, abs=1e-5)
    chart = figures.kept_rank(table.assign(rank=table["member"]))
    assert "singular directions" in json.dumps(chart.to_dict())


@pytest.mark.parametrize("name", ["full", "dora", "vera"])
def test_the_ends_of_other_methods_are_the_base_and_the_member(name, tmp_path):
    run = trained(tmp_path / "run", study(name) if name == "full" else study(name, rank=4))
    rows, final = tables.kept_rank(run), runs.summary(run).iloc[0]
    assert rows["loss"].iloc[-1] == pytest.approx(final["final_loss"], rel=1e-3)
    if name == "vera":
        assert rows["loss"].iloc[0] == pytest.approx(final["base_loss"], rel=1e-5)
    assert rows["kept"].iloc[-1] == 4 or name == "full" and rows["kept"].iloc[-1] > 8


def test_a_diverged_member_takes_no_part(tmp_path, monkeypatch):
    """The others' losses are theirs, also behind it in the program."""
    c, seen = study("lora", rank=2), []
    c.sweep.lr = (1e30, 3e-2)
    together = kept_rank.together
    monkeypatch.setattr(kept_rank, "together", lambda x: seen.append(len(x)) or together(x))
    run = trained(tmp_path / "run", c)
    table, final = tables.kept_rank(run), runs.summary(run)
    assert final["status"].tolist() == ["diverged", "finished"] and seen == [1]
    assert table["member"].tolist() == [1] * 3 and table["kept"].tolist() == [0, 1, 2]
    ends = final.loc[1, ["base_loss", "final_loss"]].tolist()
    assert table["loss"].iloc[[0, -1]].tolist() == pytest.approx(ends, rel=1e-4)


def test_what_has_no_rank_is_said(tmp_path):
    class Base:
        params = {}

    said = kept_rank.why_not(methods.method("prefix"), Base)
    assert said == "prefix does not change weights and has no rank to keep"
    assert kept_rank.why_not(methods.method("lora"), Base) == ""
    mesh = jax.make_mesh((2,), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    Base.params = {"w": jax.device_put(np.zeros((4, 4)), place)}
    assert kept_rank.why_not(methods.method("lora"), Base) == ""
    assert "divided over devices" in kept_rank.why_not(methods.method("full"), Base)
