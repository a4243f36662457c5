"""Each seed moves what its comment in the config says, and nothing else."""

import json

import jax
import numpy as np
import pandas as pd
import pytest

from lorax import config, resume, tasks
from lorax.analysis import runs
from lorax.models import load
from lorax.train import prepare
from lorax.train.batches import train_batches


def study(**axes):
    """Members on digits, with dropout. axes: of the sweep."""
    c = config.default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-12-10", "digits", ("re:.*/kernel",)
    c.method.rank, c.method.dropout, c.task.n_train = 2, 0.1, 40
    c.train.update(steps=4, batch_size=8)
    c.eval.update(every=2, examples=20)
    c.sweep.update(axes)
    return c


def prepared(c):
    """{what a seed may move: its arrays} of every member."""
    found = []
    for group in prepare.groups(config.members(c), lambda line: None):
        stack = prepare.drawn(group, group.stack)
        rows = train_batches(stack, group.task, 0, 7)
        for i in range(len(stack.members)):
            of_member = lambda tree, i=i: [np.asarray(x)[i] for x in jax.tree.leaves(tree)]
            start = [*of_member(stack.state.trainable), *of_member(stack.constants)]
            keys = jax.random.key_data(stack.hyper.key)
            train, evaluation = group.task.train.values(), group.task.eval.values()
            found.append(
                {
                    "start": start,
                    "dropout": of_member(keys),
                    "batches": of_member(rows),
                    "data": [np.sort(x, axis=0) for x in train],
                    "evaluation": [*evaluation],
                }
            )
    return found


MOVES = {
    "seed": {"start", "dropout", "batches"},
    "start_seed": {"start"},
    "order_seed": {"dropout", "batches"},
    "draw_seed": {"batches", "data"},
}


@pytest.mark.parametrize("axis", MOVES)
def test_a_seed_moves_what_it_says(axis):
    first, second = prepared(study(**{axis: (3, 4)}))
    same = lambda part: all(map(np.array_equal, first[part], second[part]))
    assert {part for part in first if not same(part)} == MOVES[axis]
    assert config.members(study(axes={config.key_of(axis): (3, 4)}))[1].name == f"{axis}=4"


def test_seeds_that_are_given_as_they_would_be_anyway_change_nothing():
    one, both = study(seed=(2,)), study(seed=(5,))
    both.seeds.start = both.seeds.order = 2
    (one,), (both,) = prepared(one), prepared(both)
    assert all(all(map(np.array_equal, one[part], both[part])) for part in one)


def test_rows_are_drawn_from_all_and_the_first_of_more_are_those_of_fewer():
    settings, base = {"name": "digits"}, load("random:mlp-64-10")
    built = lambda n, **seed: tasks.build({**settings, "n_train": n}, None, 1, 20, base, **seed)
    whole, few, more = built(None), built(30, draw_seed=7), built(50, draw_seed=7)
    rows = lambda task: [x.tobytes() for x in task.train["inputs"]]
    assert rows(few) == rows(more)[:30] and len(set(rows(more))) == 50
    assert set(rows(more)) < set(rows(whole)) and rows(more) != rows(whole)[:50]
    assert few.note.endswith("; 30 train rows drawn with seed 7")
    total = len(whole.train["inputs"])
    with pytest.raises(
        ValueError, match=f"^seeds.data: 7 given, but task.n_train takes all {total:,} "
    ):
        built(total, draw_seed=7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_train": None}, "^seeds.data: 1 given, needs a task.n_train"),
        ({"packing": True}, "^seeds.data: 1 given, but packed rows"),
        (
            {"name": "planted"},
            "^seeds.data: 1 given, but task 'planted' draws its rows by task.seed",
        ),
    ],
)
def test_rows_that_can_not_be_drawn_are_refused(changes, message):
    c = study(draw_seed=(1,))
    c.task.update(changes)
    with pytest.raises(ValueError, match=message):
        config.members(c)


def test_members_that_differ_in_several_seeds_are_paired_by_all_of_them():
    c = study(rank=(1, 2), start_seed=(0, 1), order_seed=(0, 1))
    members = [m.point | {"seed": 0, "member": m.index} for m in config.members(c)]
    table = pd.DataFrame(members)
    assert list(runs.repeats(table[table["order_seed"] == 0])) == [0, 1, 0, 1]
    labels = runs.repeats(table)
    assert labels[1] == "start_seed=1, order_seed=0" and list(labels[:4]) == list(labels[4:])
    tied = pd.DataFrame({"seed": [0, 1], "data_seed": [5, 6]})
    assert list(runs.repeats(tied)) == [0, 1]


def test_a_run_from_before_these_keys_continues(tmp_path):
    c = config.default()
    stored = json.loads(c.to_json())
    del stored["seeds"]
    for axis in ("start_seed", "order_seed", "draw_seed"):
        del stored["sweep"][axis]
    stored["train"].update(b1=0.9, b2=0.999, eps=1e-8)  # defaults then; now None means the same
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    assert resume.check_same_config(tmp_path, c) == []
    c.seeds.order, c.train.b1 = 1, 0.8
    assert resume.check_same_config(tmp_path, c) == ["seeds.order", "train.b1"]
