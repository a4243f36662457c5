"""Who competes with whom in a sweep that is tuned, what it costs, and whether it finds the best."""

import math

import numpy as np
import pytest

from lorax import command_line, config, halving, search

EPOCHS = {"axes": {"train.epochs": (1, 2)}, "lr": (1.0,)}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


def study(keys=None, **axes):
    c = config.default()
    c.train.steps = 160
    c.sweep.tune = "lr"
    for axis, values in ({"rank": (1, 8), "lr": RATES, "seed": (0, 1, 2)} | axes).items():
        c.sweep[axis] = values
    for key, value in (keys or {}).items():
        section, name = key.split(".")
        with c.ignore_type():
            c[section][name] = value
    return c


def race_of(c):
    members = config.members(c)
    return halving.race(c, members), {m.index: m for m in members}


def raced(race, loss):
    """The members that finish when loss(member, step) is their loss, and the steps that all
    trained."""
    running, spent, done = race.starters, 0, set()
    for leg in range(len(halving.planned(race))):
        spent += halving.member_steps(race, running, leg)
        losses = {i: loss(i, race.ends(i, leg)[1]) for i in running}
        left = halving.survivors(race, leg, running, losses)
        done |= running if leg >= len(race.rungs) else set()
        running = left
    return done, spent


def test_values_of_a_point_compete_with_each_other_alone():
    """By their mean over the seeds: at rank 1 small rates win, at rank 8 large ones."""
    race, members = race_of(study())

    def loss(i, step):
        point = members[i].point
        far = math.log(point["lr"] / (2e-3 if point["rank"] == 1 else 2e-2)) ** 2
        return far + (point["seed"] - 1) * 10  # much more than rates differ by

    done, spent = raced(race, loss)
    points = {(members[i].point["rank"], members[i].point["lr"]) for i in done}
    assert points == {(1, 2e-3), (8, 2e-2)} and len(done) == 6
    assert spent == halving.all_steps(race) == 6 * (5 * 20 + 2 * 20 + 120)


def test_a_candidate_with_a_diverged_seed_is_out():
    race, members = race_of(study())
    lost = next(i for i, m in members.items() if m.point == {"rank": 1, "lr": 5e-3, "seed": 2})

    def loss(i, step):
        return math.nan if i == lost else abs(math.log(members[i].point["lr"] / 5e-3))

    done, _ = raced(race, loss)
    points = {(members[i].point["rank"], members[i].point["lr"]) for i in done}
    assert points == {(1, 1e-2), (8, 5e-3)}
    nothing = lambda i, step: math.nan if members[i].point["rank"] == 1 else 1.0
    assert {members[i].point["rank"] for i in raced(race, nothing)[0]} == {8}


@pytest.mark.parametrize(
    ("values", "keep", "left"),
    [(5, 1 / 3, [2, 1]), (6, 0.5, [3, 2]), (9, 1 / 3, [3, 1]), (2, 0.9, [2, 2])],
)
def test_a_share_goes_on_at_every_rung(values, keep, left):
    race, _ = race_of(study({"halving.keep": keep}, lr=tuple(range(1, values + 1)), rank=()))
    assert [len(leg) // 3 for leg in halving.planned(race)] == [values, *left]


def test_a_rung_is_a_whole_call_of_the_program():
    race, _ = race_of(study({"halving.rungs": (0.01, 0.3), "eval.every": 50}, lr=(1.0, 2.0)))
    assert set(race.stops.values()) == {(10, 50, 160)}
    race, _ = race_of(study(steps=(100, 160)))  # each of its own steps
    assert set(race.stops.values()) == {(10, 20, 100), (20, 40, 160)}


def test_any_axis_can_be_tuned_and_seeds_can_wait():
    c = study({"sweep.tune": "train.warmup", "halving.seeds": 1}, axes={"train.warmup": (0, 5, 9)})
    race, members = race_of(c)
    assert len(race.points) == 2 * 5 and race.axis == "train.warmup"
    best = lambda i, step: members[i].point["train.warmup"]
    done, spent = raced(race, best)
    assert {members[i].point["train.warmup"] for i in done} == {0} and len(done) == 30
    assert spent == halving.all_steps(race) == 10 * (3 * 20 + 20 + 120 + 2 * 160)


def test_full_fine_tuning_beside_the_sweep_races_at_its_own_rates():
    race, members = race_of(study({"sweep.full_lr": (1e-4, 1e-3)}))
    assert [len(point) for point in race.points] == [5, 5, 2]
    done, _ = raced(race, lambda i, step: members[i].point["lr"])
    assert {m.point["lr"] for i, m in members.items() if i in done} == {1e-3, 1e-4}
    # An axis that full fine-tuning doesn't have: each of its rates trains to the end.
    keys = {"sweep.full_lr": (1e-4, 1e-3), "sweep.tune": "alpha"}
    race, _ = race_of(study(keys, alpha=(4.0, 8.0, 16.0), lr=(1e-3,)))
    assert [len(point) for point in race.points] == [3, 3, 1, 1]


def test_the_default_brings_five_rates_to_a_third_and_says_so():
    c = study()
    line = command_line.summary(c, config.members(c)).splitlines()[1]
    assert line == (
        "tunes lr over 5 values by halving at 12.5%, 25%: about 32% of the full grid's steps "
        "(1,560 of 4,800)"
    )
    c.sweep.tune = None
    assert "\n" not in command_line.summary(c, config.members(c))


@pytest.mark.parametrize(
    ("keys", "axes", "message"),
    [
        ({"sweep.tune": "alpha"}, {}, "sweep.tune: 'alpha' given, must be an axis .* has rank, lr"),
        ({"sweep.tune": "seed"}, {}, "sweep.tune: 'seed' given, but a seed is no choice"),
        ({"sweep.tune": "data_seed"}, {"data_seed": (0, 1)}, "'data_seed' given, but a seed"),
        ({"sweep.tune": "steps"}, {"steps": (50, 99)}, "'steps' given, .* at the same step"),
        ({"sweep.tune": "train.epochs", "train.steps": 0}, EPOCHS, ".* at the same step"),
        ({"sweep.tune": "noise"}, {"noise": (0.0, 1.0)}, "'noise' given, .* measured on"),
        ({}, {"zip": (("rank", "lr"),), "rank": (1, 2, 3, 4, 5)}, "'lr' given, but it has one val"),
        ({}, {"lr": (1.0,)}, "sweep.tune: 'lr' given, but it has one value at every point"),
        (
            {"search.threshold": 0.9, "method.name": "subspace"},
            {"dim": (1, 2), "rank": ()},
            "sweep.tune: 'lr' given, but a search",
        ),
        ({"halving.rungs": ()}, {}, r"halving.rungs: \(\) given, must be shares of train.steps"),
        ({"halving.rungs": (0.5, 0.25)}, {}, "halving.rungs: .* ascending"),
        ({"halving.rungs": (0.5, 1.0)}, {}, r"halving.rungs: .* in \(0, 1\)"),
        ({"halving.rungs": (0.99,)}, {}, "halving.rungs: 0.99 .* train.steps = 160 .* by 10 steps"),
        ({"halving.keep": 1.0}, {}, r"halving.keep: 1.0 given, must be in \(0, 1\)"),
        ({"halving.seeds": 0}, {}, "halving.seeds: 0 given, must be at least 1"),
        (
            {"sweep.tune": "train.offload"},
            {"axes": {"train.offload": (None, "optimizer")}, "steps": (100,)},
            "'train.offload' given, but its values would be compared at different steps",
        ),
    ],
)
def test_what_can_not_be_tuned_is_one_clear_error(keys, axes, message):
    with pytest.raises(ValueError, match=message):
        search.members(study(keys, **axes))


def made_up(rng):
    """The loss at a share t of training with rate x (1: the middle one), under linear decay.

    What is still to be learned falls with the rates summed so far, the noise of the steps grows
    with the current rate, and large rates do lasting harm. So at a rung other rates lead than at
    the end.
    """
    start, speed = rng.uniform(0.5, 3), np.exp(rng.uniform(0, 3))
    noise, harm = rng.uniform(0, 0.1), np.exp(rng.uniform(-7, 0))
    left = lambda t, x: start * np.exp(-speed * x * (t - t * t / 2))
    return lambda t, x: left(t, x) + noise * x * (1 - t) + harm * x**2


def test_halving_finds_the_best_rate_within_one_step_of_the_grid():
    """In 9 of 10 points with known best rates, with noise of the seeds and of the evaluation."""
    rng = np.random.default_rng(0)
    race, members = race_of(study(rank=()))
    off, truths = [], set()
    for _ in range(400):
        curve, seeds = made_up(rng), rng.normal(0, 0.05, 3)
        truth = int(np.argmin([curve(1.0, rate / RATES[2]) for rate in RATES]))
        losses = {
            (i, stop): curve(stop / 160, member.point["lr"] / RATES[2])
            + seeds[member.point["seed"]]
            + rng.normal(0, 0.02)
            for i, member in members.items()
            for stop in race.stops[i]
        }
        done, _ = raced(race, lambda i, step, losses=losses: losses[i, step])
        (found,) = {RATES.index(members[i].point["lr"]) for i in done}
        off.append(abs(found - truth))
        truths.add(truth)
    assert truths == set(range(5))
    assert (np.array(off) <= 1).mean() >= 0.9, np.bincount(off)
