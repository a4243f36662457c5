"""`eval.also`: further tasks at every evaluation, and the KL from the base to the member."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits import contents, digits, trained
from quick import jit
from small import noisy, three_layers

from lorax import adapters, config, halving, losses, rundir, tasks
from lorax.analysis import runs
from lorax.interop import peft
from lorax.models import load
from lorax.planning import costs
from lorax.tasks import kinds
from lorax.train import evaluation, loop, prepare

SHUFFLED = ("shuffled", {"name": "digits", "shuffle": True})


def further(**axes):
    """A sweep whose members are measured on digits with shuffled pixels, too."""
    c = digits(**axes)
    c.eval.also = (SHUFFLED,)
    return c


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("also") / "run", further(rank=(1, 2)))


def logits_of(run, member, rows):
    """The logits (N, 10) of a member, or of its base for None, in float64."""
    base = load(digits().base)
    params = base.params
    if member is not None:
        adapter = peft.load(rundir.adapter(run.directory, member), base.sources)
        params = adapters.bind(base, adapter)
    return np.asarray(losses.array_states(base.module, params, rows), np.float64)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_every_evaluation_has_a_line_of_each_further_task(sweep):
    also = sweep.metrics.query("split == 'also:shuffled'")
    evals = sweep.metrics.query("split == 'eval'")
    assert also["step"].tolist() == evals["step"].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert also["accuracy"].notna().all() and also["kl"].isna().all()
    table = runs.summary(sweep)
    after = also.query("step == 6").set_index("member")["loss"]
    before = also.query("step == 0").set_index("member")["loss"]
    assert (table["final_also_shuffled"] == after).all()
    assert (table["forgetting_shuffled"] == after - before).all()
    assert (table["final_kl"] == evals.query("step == 6").set_index("member")["kl"]).all()
    assert (table["final_kl"] > 0).all()


def test_losses_and_kl_are_those_of_numpy(sweep):
    settings, base = dict(SHUFFLED[1]), load(digits().base)
    task = tasks.build({"name": "digits", "n_train": 32}, None, 1, 50, base, test=None)
    also = tasks.build(settings, None, 1, 50, base, test=None)
    table = runs.summary(sweep)
    for member in (0, 1):
        before, after = (log_softmax(logits_of(sweep, m, task.eval)) for m in (None, member))
        kl = (np.exp(before) * (before - after)).sum(axis=1).mean()
        assert table["final_kl"][member] == pytest.approx(kl, rel=1e-4)
        nats = -log_softmax(logits_of(sweep, member, also.eval))
        loss = np.take_along_axis(nats, also.eval["label"][:, None], 1).mean()
        assert table["final_also_shuffled"][member] == pytest.approx(loss, rel=1e-5)
    first = sweep.metrics.query("split == 'eval' and step == 0")["kl"]
    assert np.abs(first).max() < 1e-6


def test_training_and_the_runs_own_losses_stay_the_same(sweep, tmp_path):
    without = trained(tmp_path / "run", digits(rank=(1, 2)))
    ours = sweep.metrics.query("split != 'also:shuffled'")
    np.testing.assert_allclose(ours["loss"], without.metrics["loss"], rtol=1e-6)
    assert contents(sweep.directory)[1] == contents(without.directory)[1]


def test_a_run_that_is_stopped_and_continued_is_bit_for_bit_the_same(sweep, tmp_path, monkeypatch):
    c, advance = further(rank=(1, 2)), loop.part.advance

    def stop(part, at, k):
        if at.step == 4:
            raise KeyboardInterrupt
        return advance(part, at, k)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.part, "advance", stop)
        trained(tmp_path / "run", c)
    trained(tmp_path / "run", c)
    assert contents(tmp_path / "run") == contents(sweep.directory)


def test_the_base_is_computed_once_for_all_groups(tmp_path, monkeypatch):
    made, states_of_base = [], evaluation.states_of_base

    def counted(*arguments):
        made.append(states_of_base(*arguments))
        return made[-1]

    monkeypatch.setattr(evaluation, "states_of_base", counted)
    run = trained(tmp_path / "run", further(rank=(1, 2), full_lr=(1e-3,)))
    assert len(made) == 1 and len(prepare.groups(config.members(further()), print)) == 1
    assert run.metrics.query("split == 'eval'")["kl"].notna().all()


def test_states_that_are_too_large_are_computed_with_the_members(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_STATES", 1)
    again = trained(tmp_path / "run", further(rank=(1, 2)))
    kl = [r.metrics.query("split == 'eval'")["kl"] for r in (sweep, again)]
    np.testing.assert_allclose(*kl, rtol=1e-4, atol=1e-6)


def fitted(c):
    """The programs of a run of one group, which fit into its memory."""
    (group,) = prepare.groups(config.members(c), lambda line: None)
    race = halving.without(group.members)
    return loop.Compiled([group], race, lambda line: None).get(group, group.stack)


def test_what_the_kl_keeps_is_counted_where_programs_are_fitted_into_memory():
    c, needed = further(), fitted(further()).bytes
    kept = costs.plan(config.members(c)).states
    assert kept == 64 * 10 * 4  # two batches of 32 rows, the last one filled up
    assert needed - fitted(digits()).bytes == kept
    c.train.memory_gb = (needed - 1) / 1e9
    with pytest.raises(MemoryError, match="one member needs"):
        fitted(c)


@pytest.mark.parametrize("spread", ["mesh", "members"])
def test_it_is_the_same_where_devices_share_the_base_or_the_members(sweep, tmp_path, spread):
    c = further(rank=(1, 2))
    c.train.update(
        {"mesh": {"parallel": "auto", "mesh": "fsdp=2"}}.get(spread, {"parallel": spread})
    )
    run = trained(tmp_path / "run", c)
    for name in ("loss", "kl"):
        ours, alone = run.metrics[name], sweep.metrics[name]
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_diverged_member_has_no_forgetting(tmp_path):
    table = runs.summary(trained(tmp_path / "run", further(lr=(1e-2, 1e30))))
    assert table["status"].tolist() == ["finished", "diverged"]
    for name in ("final_kl", "final_also_shuffled", "forgetting_shuffled"):
        assert np.isfinite(table[name][0]) and np.isnan(table[name][1])


def test_the_kl_of_a_language_model_is_numpys_whatever_the_parts(monkeypatch):
    base, rng = three_layers(), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 20, (3, 7), np.int32))
    mask = jnp.asarray(rng.integers(0, 2, (3, 7)).astype(np.float32))
    batch, params = {"tokens": tokens, "mask": mask}, noisy(base.params, 0.1)
    monkeypatch.setattr(losses, "ROWS", 4)  # 18 tokens in five parts, the last one filled up

    def rows(params, of_base):
        states = kinds.TEXTS.states(base.module, of_base, batch)
        return losses.lm_rows(base.module, params, batch, losses.Reference(of_base, states))

    found = jit(rows)(params, base.params)
    logits = [base.module.apply({"params": p}, tokens)[:, :-1] for p in (base.params, params)]
    before, after = (log_softmax(np.asarray(x, np.float64)) for x in logits)
    kl = (np.exp(before) * (before - after)).sum(axis=-1)
    np.testing.assert_allclose(found.kl, (kl * mask[:, 1:]).sum(axis=1), rtol=1e-4, atol=1e-6)
    alone = jit(lambda p: losses.lm_rows(base.module, p, batch))(params)
    assert alone.kl is None
    jax.tree.map(np.testing.assert_array_equal, alone, found._replace(kl=None))


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (("x",), r"eval.also: 'x' given, must be pairs like"),
        ((("x", {"path": "y"}),), r"eval.also: \('x', .* must be pairs like"),
        ((("a b", {"name": "digits"}),), "eval.also: .* must be pairs like"),
        ((SHUFFLED, SHUFFLED), "eval.also: 'shuffled' names two tasks"),
        ((("x", {"name": "digits", "shufle": True}),), "eval.also: x: .*did you mean .*shuffle"),
        ((("x", {"name": "digits", "seed": "one"}),), "eval.also: x: task.seed: 'one' given, must"),
        ((("x", {"name": "digits", "seed": -1}),), "eval.also: x: task.seed: -1 given, must be in"),
    ],
)
def test_a_mistake_is_one_clear_error(also, message):
    c = digits()
    c.eval.also = also
    with pytest.raises(ValueError, match=message):
        config.members(c)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "digit"}, "eval.also: x: task.name: 'digit' is no task"),
        ({"name": "restaurants"}, "eval.also: x: task 'restaurants' needs another kind of model"),
        ({"name": "planted", "rank": 1}, "eval.also: x: .*planted"),
        ({"name": "mnist"}, "eval.also: x: .*mnist"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_training(keys, message):
    c = digits()
    c.eval.also = (("x", keys),)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare.groups(config.members(c), lambda line: None)


def test_a_missing_file_is_named():
    c = config.default()
    c.eval.also = (("x", {"name": "text", "path": "nowhere.txt"}),)
    message = "eval.also: x: task.path: 'nowhere.txt' does not exist"
    with pytest.raises(FileNotFoundError, match=message):
        prepare.groups(config.members(c), lambda line: None)
