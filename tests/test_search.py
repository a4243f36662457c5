"""What a search trains beside its sweep, and what its later rounds ask for."""

import pytest

from lorax import config, search


def searching(keys=(), **axes):
    c = config.default()
    for axis, values in ({"dim": (10, 100)} | axes).items():
        c.sweep[axis] = values
    c.method.name = "subspace"
    c.search.threshold = 0.9
    for key, value in dict(keys).items():
        c.search[key] = value
    return c


def test_a_search_trains_full_fine_tuning_and_lora_beside_the_sweep():
    c = searching(
        {"seeds": (0, 1), "baseline_lr": (1e-3,), "lora_ranks": (2,)}, lr=(0.1, 0.2), seed=(0,)
    )
    members = search.members(c)
    assert [m.name for m in members] == [
        *[f"dim={d},lr={lr},seed=0" for d in (10, 100) for lr in (0.1, 0.2)],
        *[f"method=full,lr=0.001,seed={s}" for s in (0, 1)],
        *[f"method=lora,rank=2,lr={lr},seed={s}" for lr in (0.1, 0.2) for s in (0, 1)],
    ]
    assert [m.index for m in members] == list(range(10))
    full, lora = members[4], members[6]
    assert (full.config.method.name, full.config.train.lr, full.config.seed) == ("full", 1e-3, 0)
    assert (lora.config.method.name, lora.config.method.rank) == ("lora", 2)
    assert all("search" not in m.config and "sweep" not in m.config for m in members)


def test_methods_share_a_baseline_and_other_conditions_do_not():
    c = searching(method=("subspace", "said"), projection=("dense", "sparse"), base=("a", "b"))
    full = [m for m in search.members(c) if m.config.method.name == "full"]
    assert [m.point for m in full] == [
        {"method": "full", "base": base, "lr": 2e-3, "seed": 0} for base in ("a", "b")
    ]
    layers = [m.point for m in search.members(searching(layers=((0,), None)))[4:]]
    assert [point["layers"] for point in layers] == [(0,), None]
    assert config.shared_axes(("method", "base", "rank", "lr", "layers", "seed", "shuffle")) == (
        "base",
        "layers",
        "shuffle",
    )


def test_without_values_of_its_own_a_search_takes_the_sweeps():
    members = search.members(searching(lr=(0.1, 0.2), seed=(3, 4)))
    full = [(m.point["lr"], m.point["seed"]) for m in members if m.config.method.name == "full"]
    assert full == [(0.1, 3), (0.1, 4), (0.2, 3), (0.2, 4)]


def test_later_rounds_count_on_and_train_nothing_twice():
    c = searching({"seeds": (0, 1)}, method=("subspace", "said"), lr=(0.1, 0.2))
    members = search.members(c)
    asked = [
        {"like": 4, "dim": dim, "lr": lr, "seed": s}
        for dim in (10, 40)
        for lr in (0.2, 0.3)
        for s in (0, 1)
    ]
    assert members[4].point["method"] == "said"
    more = search.more_members(c, members, [*asked, asked[-1]])
    assert [m.name for m in more] == [
        f"method=said,dim={d},lr={lr},seed={s}"
        for d, lr, s in ((10, 0.2, 1), (10, 0.3, 0), (10, 0.3, 1), (40, 0.2, 0), (40, 0.2, 1),
                         (40, 0.3, 0), (40, 0.3, 1))
    ]  # fmt: skip
    assert [m.index for m in more] == list(range(len(members), len(members) + 7))
    assert more[0].config.method.dim == 10 and more[0].config.seed == 1
    assert search.more_members(c, members + more, asked) == []
    assert search.most_members(c, members) == 2 * 6 * 2 * 2


def test_without_a_threshold_there_is_no_search():
    c = searching({"threshold": 0.0, "lora_ranks": (1,), "seeds": (5,)})
    assert [m.name for m in search.members(c)] == ["dim=10", "dim=100"]


@pytest.mark.parametrize(
    ("keys", "axes", "message"),
    [
        (dict(threshold=1.5), {}, r"search.threshold: 1.5 given, must be in \[0, 1\]"),
        (dict(points=0), {}, "search.points: 0 given, must be at least 1"),
        (dict(rounds=-1), {}, "search.rounds: -1 given, must not be negative"),
        (dict(baseline_lr=("x",)), {}, r"search.baseline_lr: \('x',\) given, must be a tuple of"),
        (dict(seeds=(-1,)), {}, r"search.seeds: \(-1,\) given, must be a tuple of integers in"),
        (dict(seeds=(0, 0)), {}, "search.seeds: .* a value occurs twice"),
        (dict(seeds=(1,)), {}, r"search.seeds: \(1,\) given, must hold those of the sweep, \(0,\)"),
        (dict(lora_ranks=(0,)), {}, r"search.lora_ranks: \(0,\) given, must be a tuple"),
        ({}, dict(dim=()), r"search.threshold: 0.9 given, needs a sweep.dim of at least two"),
        ({}, dict(dim=(1, None)), "search.threshold: 0.9 given, needs a sweep.dim of numbers"),
        ({}, dict(method=("lora",)), "method 'lora' has no dim; subspace, said, lora-subspace"),
        ({}, dict(method=("full",)), "method 'full' has no dim"),
        ({}, dict(steps=(5, 6), zip=(("dim", "steps"),)), "sweep.zip: dim is tied, but a search"),
    ],
)
def test_a_search_that_can_not_be_is_one_clear_error(keys, axes, message):
    with pytest.raises(ValueError, match=message):
        search.members(searching(keys, **axes))
