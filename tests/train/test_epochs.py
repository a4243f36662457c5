"""Steps by epochs: how many there are, which rows they see, and who says so."""

import numpy as np
import pytest

import lorax
from lorax import command_line, config, halving, rundir, search, tasks
from lorax.planning import shapes
from lorax.tasks import batch_order
from lorax.train import batches, prepare

ROWS = 32  # train rows; every batch has 5, so that 2 are left over at an epoch's end


def digits(epochs=2.0, **keys):
    c = config.default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.method.rank, c.task.n_train = 2, ROWS
    c.train.update(epochs=epochs, batch_size=5, warmup=0, parallel="none", lr=1e-2)
    c.eval.update(every=5, examples=50, test=0)
    c.analysis.report = False
    for key, value in keys.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("epochs", "n", "last", "steps"),
    [
        (2, 32, "full", 13), (2, 32, "short", 14), (2, 32, "drop", 12), (2, 30, "full", 12),
        (0.5, 32, "full", 4), (1.5, 32, "short", 11), (1.1, 50, "full", 11), (0.01, 9, "full", 1),
    ],
)  # fmt: skip
def test_steps_are_rounded_up(epochs, n, last, steps):
    assert batch_order.steps_of(epochs, n, 5, last) == steps


def test_too_few_rows_for_a_batch_are_refused_by_name():
    with pytest.raises(ValueError, match="train.last_batch: 'drop' given, but 4 training rows don"):
        batch_order.steps_of(1, 4, 5, "drop")


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("lengths", [None, np.arange(ROWS) % 7])
def test_an_epoch_has_every_row_once_in_the_order_of_full_batches(lengths):
    full = tasks.orders(ROWS, 5, 3, range(13), lengths).reshape(-1)
    short = tasks.orders(ROWS, 5, 3, range(14), lengths, "short")
    assert (short[[6, 13]] < 0).sum(axis=1).tolist() == [3, 3] and (short >= 0).sum() == 2 * ROWS
    np.testing.assert_array_equal(short[short >= 0], full[: 2 * ROWS])
    assert sorted(short[:7][short[:7] >= 0]) == list(range(ROWS))
    drop = tasks.orders(ROWS, 5, 3, range(12), lengths, "drop")
    np.testing.assert_array_equal(drop, short[[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]])
    again = tasks.orders(ROWS, 5, 3, [13, 6], lengths, "short")  # without replay
    np.testing.assert_array_equal(again, short[[13, 6]])


def test_rows_that_a_short_batch_lacks_have_no_weight():
    c = digits(train__last_batch="short")
    (group,) = prepare.groups(config.members(c), lambda line: None)
    made = batches.train_batches(group.stack, group.task, 6, 1)
    assert made["weight"].shape == (1, 1, 1, 5)
    assert made["weight"].ravel().tolist() == [1, 1, 0, 0, 0]
    assert not np.asarray(made["inputs"])[0, 0, 0, 2:].any()


# ------------------------------------------------------------------------------------------ members


def test_members_of_a_run_get_their_steps_and_the_plan_says_the_same():
    c = digits(sweep__n_train=(20, 32), sweep__axes={"train.epochs": (1, 2)})
    members, said = config.members(c), []
    assert [m.config.train.steps for m in members] == [0] * 4  # not counted yet
    groups = prepare.groups(members, said.append)
    steps = {m.name: m.config.train.steps for m in prepare.members_of(groups)}
    assert steps == {
        "train.epochs=1,n_train=20": 4, "train.epochs=2,n_train=20": 8,
        "train.epochs=1,n_train=32": 7, "train.epochs=2,n_train=32": 13,
    }  # fmt: skip
    assert "train.epochs: 2 over 32 rows in batches of 5: 13 steps" in said
    planned = [m.config.train.steps for m in shapes.with_steps(members)]
    assert planned == [m.config.train.steps for m in prepare.members_of(groups)]


def test_packed_rows_are_counted_not_examples():
    c = config.default()
    c.train.update(epochs=3, batch_size=4, seq_len=256)
    c.task.update(n_train=40, packing=True)
    said = []
    (member,) = shapes.with_steps(config.members(c), said.append)
    packed = int(said[0].split(" packed into ")[1].split()[0])
    assert packed < 40 and member.config.train.steps == -(-3 * packed // 4)


@pytest.mark.parametrize(
    ("base", "task", "why"),
    [
        ("random:gpt2", "restaurants", "random:gpt2 has no tokenizer to make rows with"),
        ("random:mlp-64-10", "planted", "random:mlp-64-10 is not loaded"),
    ],
)
def test_a_plan_that_can_not_count_rows_says_what_to_give(base, task, why):
    c = config.default()
    c.base, c.task.name, c.train.epochs = base, task, 1
    with pytest.raises(ValueError, match=f"train.epochs: 1 given, but {why}.* train.steps to a"):
        shapes.with_steps(config.members(c))


def test_a_run_by_epochs_is_the_run_of_as_many_steps(tmp_path):
    by_epochs = lorax.run(digits(), tmp_path / "epochs")
    by_steps = lorax.run(digits(epochs=0.0, train__steps=13), tmp_path / "steps")
    assert by_epochs.members["steps"].tolist() == [13]
    assert by_epochs.metrics["loss"].tolist() == by_steps.metrics["loss"].tolist()
    assert lorax.run(digits(), tmp_path / "epochs").metrics["step"].max() == 13  # it is finished


def test_rates_race_over_the_steps_that_epochs_make(tmp_path):
    c = digits(epochs=4.0, sweep__lr=(1e-3, 1e-2, 3e-2), sweep__tune="lr", eval__every=2)
    c.halving.rungs = (0.25,)
    members = search.members(c)
    line = command_line.summary(c, members).splitlines()[1]
    assert line == "tunes lr over 3 values by halving at 25% of the steps"
    steps = halving.race(c, shapes.with_steps(members)).stops
    assert set(steps.values()) == {(6, 26)}
    lorax.run(c, tmp_path / "run")
    results = rundir.read_status(tmp_path / "run")["members"].values()
    assert [r["status"] for r in results].count("stopped") == 2
    assert {r.get("stopped_at") for r in results} == {6, None}
