"""Tasks one after the other: every member goes on from its own merged model."""

import numpy as np
import pytest
from digits import digits, trained

from lorax import config, rundir, sequence
from lorax.analysis import forgetting, runs
from lorax.models import load
from lorax.run import run as run_of

PLAIN = ("plain", {"name": "digits", "n_train": 32})
SHUFFLED = ("shuffled", {"name": "digits", "shuffle": True, "n_train": 32})


def settings(**axes):
    c = digits(**axes)
    c.eval.test = 0
    c.sequence = (PLAIN, SHUFFLED)
    return c


def train(c, workdir):
    """The runs of a sequence, without their reports."""
    workdir.mkdir(exist_ok=True)
    return sequence.train(c, workdir, lambda of_task, _, folder: trained(folder, of_task))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sequence") / "run"
    return train(settings(lr=(1e-2, 1e30, 2e-2)), workdir), workdir


def test_a_member_goes_on_from_its_own_merged_model(both):
    first, second = both[0]
    assert [r.directory.name for r in (first, second)] == ["1-plain", "2-shuffled"]
    assert list(second.members["lr"]) == [1e-2, 2e-2]  # the other one diverged
    folders = [str(rundir.merged(first.directory, member)) for member in (0, 2)]
    assert list(second.members["base"]) == folders
    before = second.metrics.query("step == 0 and split == 'also:plain'")["loss"]
    after = first.metrics.query("step == 6 and split == 'eval' and member != 1")["loss"]
    np.testing.assert_allclose(before, after, rtol=1e-5)


def test_the_merged_model_is_the_base_with_the_update(both):
    first = both[0][0]
    base, now = load(digits().base), load(str(rundir.merged(first.directory, 2)))
    update = first.update(2)["head"]
    added = np.asarray(now.params["head"]["kernel"]) - np.asarray(base.params["head"]["kernel"])
    np.testing.assert_allclose(added, update.s * update.a @ update.b, atol=1e-6)


def test_a_task_is_trained_as_in_a_run_on_the_merged_model(both, tmp_path):
    second, c = both[0][1], settings(lr=(2e-2,))
    c.sequence, c.base = (), second.members["base"][1]
    c.task.shuffle, c.eval.also = True, (PLAIN,)
    alone = trained(tmp_path / "run", c)
    in_turn = second.metrics.query("member == 1").drop(columns="member")
    in_turn = in_turn.reset_index(drop=True)
    for name in ("loss", "kl", "accuracy"):
        np.testing.assert_allclose(alone.metrics[name], in_turn[name], rtol=1e-5, atol=1e-6)


def test_the_table_has_every_task_after_each(both):
    (first, second), workdir = both
    table = forgetting.sequence(workdir)
    assert (workdir / "sequence.csv").read_text() == table.to_csv(index=False)
    assert list(table["first"]) == [0, 0, 1, 1, 2, 2, 0, 0, 2, 2]
    went_on = table.query("after == 'shuffled' and task == 'plain' and first == 2").iloc[0]
    learned = runs.summary(first)["final_loss"][2]
    then = runs.summary(second)["final_also_plain"][1]
    assert went_on["learned"] == learned and went_on["loss"] == then
    assert went_on["forgetting"] == then - learned and went_on["lr"] == 2e-2
    assert went_on["before"] == pytest.approx(runs.summary(first)["base_loss"][2])
    ahead = table.query("after == 'plain' and task == 'shuffled'")
    assert ahead["forgetting"].isna().all() and ahead["loss"].notna().sum() == 2


def test_a_finished_sequence_stays_and_a_stopped_one_goes_on(both, tmp_path):
    c, workdir = settings(lr=(2e-2,)), tmp_path / "run"

    def stop(of_task, _, folder):
        return None if folder.name == "2-shuffled" else trained(folder, of_task)

    workdir.mkdir()
    assert sequence.train(c, workdir, stop)[1] is None
    folder = rundir.merged(workdir / "1-plain", 0)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    train(c, workdir)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    alone = runs.load(workdir / "2-shuffled").metrics["loss"]
    swept = both[0][1].metrics.query("member == 1")["loss"]
    np.testing.assert_allclose(alone, swept, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": (PLAIN,)}, "sequence: .* must name at least two tasks"),
        ({"sequence": (PLAIN, PLAIN)}, "sequence: 'plain' names two tasks"),
        ({"sequence": (PLAIN, "x")}, "sequence: 'x' given, must be pairs like"),
        ({"quant": "nf4"}, "sequence: quant codes the base"),
    ],
)
def test_a_sequence_that_can_not_be_trained_is_refused(change, message, tmp_path):
    c = settings()
    c.update(change)
    with pytest.raises(ValueError, match=message):
        run_of(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_can_not_be_merged_is_refused(tmp_path):
    c = config.default()
    c.sequence = (("a", {"name": "restaurants"}), ("b", {"name": "restaurants", "seed": 1}))
    c.sweep.method = ("lora", "prefix")
    with pytest.raises(ValueError, match="sequence: method 'prefix' does not change weights"):
        run_of(c, tmp_path / "run")
