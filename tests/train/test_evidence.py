"""Targets and ranks that a member's first batches choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import config, intercept, tasks, tree
from lorax.intercept import sites
from lorax.methods import sensitivity, starts
from lorax.models import Base, gpt2
from lorax.train import evidence, prepare, stacks

CONFIG = gpt2.Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def base():
    module = gpt2.GPT2(CONFIG)
    tokens = np.zeros((1, 4), np.int32)
    params = jax.jit(module.init)(jax.random.key(7), tokens)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    return Base(module, params, CONFIG, None, sites(module, params, tokens), "gpt2", "tiny")


@pytest.fixture(scope="module")
def task():
    rows = np.random.default_rng(0).integers(1, 50, (64, 13)).astype(np.int32)
    both = {"tokens": rows, "mask": np.ones((64, 13), np.float32)}
    return tasks.Task("random", both, both, "")


SEEN = {}  # what has been read for one test is there for the next


def decided(base, task, seed=0, **method):
    c = config.default()
    c.train.update(batch_size=4, seq_len=12)
    c.method.batches = 2
    c.seed = seed
    c.method.update(method)
    (member,) = config.members(c)
    hp = stacks.hyperparameters(member, base)
    assert evidence.is_automatic(member, hp)
    hp, rows = evidence.decide(member, hp, base, task, SEEN)
    (built,) = stacks.build_methods([member], base, {0: hp})
    return built, rows


def test_the_best_matrices_are_taken_and_no_others(base, task):
    built, rows = decided(base, task, targets=("auto:3",), rank=2)
    scores = [row["score"] for row in rows]
    assert len(rows) == 12 and scores == sorted(scores, reverse=True)  # 6 kernels, 2 layers
    assert [row["rank"] for row in rows] == [2] * 3 + [0] * 9
    adapted = sum(np.count_nonzero(ranks) for ranks in built.hp["ranks"].values())
    assert adapted == 3 and built.hp["rank"] == 2
    trainable, _ = built.init(jax.random.key(0), base.params, base.sites)
    alive = {path for path, leaf in tree.flatten(trainable).items() if np.any(leaf)}
    named = {row["path"] for row in rows[:3]}
    assert {path.rpartition("/")[0] for path in alive} == {
        f"h/{name.split('/', 2)[2]}/kernel" for name in named
    }


def test_other_words_say_among_which(base, task):
    _, rows = decided(base, task, targets=("auto:2", "mlp"), rank=1)
    assert {row["path"].split("/")[2] for row in rows} == {"mlp"}
    _, of_one = decided(base, task, targets=("auto:2",), rank=1, layers=(1,))
    assert {row["path"].split("/")[1] for row in of_one} == {"1"}


@pytest.mark.parametrize("targets", [("auto:5",), ("attention",), ("all-linear", "auto:7")])
@pytest.mark.parametrize("budget", [500, 1111])
def test_ranks_keep_to_the_budget_and_use_it(base, task, targets, budget):
    built, rows = decided(base, task, targets=targets, rank="auto", budget=budget)
    count = built.count(base.params, base.sites)
    assert budget - 80 < count <= budget  # 80: a direction of the largest matrix, 16 + 64
    ranks = [row["rank"] for row in rows]
    assert len(set(ranks)) > 1 and max(ranks) <= 2 * built.hp["rank"]
    assert built.hp["scale"] == built.hp["alpha"] / built.hp["rank"]


def test_each_direction_taken_is_worth_more_than_those_left(base, task):
    built, _ = decided(base, task, targets=("attention",), rank="auto", budget=600)
    read = next(found for key, found in SEEN.items() if key[2] == "gradient" and len(found) == 4)
    worth, most = sensitivity.spectra(read), 2 * built.hp["rank"]
    taken = {(p, i): built.hp["ranks"].get(p, [0, 0])[i[0]] for p, i in worth}
    least = min(worth[m][r - 1] for m, r in taken.items() if r)
    assert all(worth[m][r] <= least for m, r in taken.items() if r < most)


def test_with_eva_they_are_the_papers(base, task):
    """All matrices of attention cost the same, so that a budget is a number of ranks."""
    built, _ = decided(base, task, targets=("attention",), rank="auto", budget=32 * 24, init="eva")
    read = next(found for key, found in SEEN.items() if key[2] == "moments")
    ranks = starts.by_path(starts.redistribute(starts.explained(read), 3))
    assert built.hp["rank"] == 3 and built.hp["ranks"] == ranks


def test_a_sweep_reads_each_members_own_batches_once(base, task):
    SEEN.clear()
    first, _ = decided(base, task, targets=("auto:3",), rank=2)
    for rank in (1, 4):
        decided(base, task, targets=("auto:3",), rank=rank)
    assert len(SEEN) == 1
    _, other = decided(base, task, seed=1, targets=("auto:3",), rank=2)
    assert len(SEEN) == 2
    again, rows = decided(base, task, targets=("auto:3",), rank=2)
    assert again.hp["ranks"] == first.hp["ranks"]
    assert [row["score"] for row in rows] != [row["score"] for row in other]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (dict(targets=("auto:0",)), r"method.targets: auto:0 given; 'auto:6' takes"),
        (dict(targets=("auto:x", "q")), r"method.targets: auto:x given"),
        (dict(targets=("auto:2", "auto:3")), r"method.targets: auto:2, auto:3 given"),
        (dict(rank="auto"), r"method.budget: needed with method.rank='auto'"),
        (dict(rank="auto", budget=9), r"method.budget: 9 given, rank 1 takes 128"),
        (dict(targets=("auto:2",), budget=9, rank=1), r"budget: 9 given, one matrix takes 32"),
        (dict(targets=("auto:2",), rank=99), r"method.rank: 99 given, but h/attn/q/kernel is 16"),
        (dict(name="loha", rank="auto"), r"method.rank: loha can't leave it to evidence; lora,"),
        (dict(rank="all"), r"""method.rank: 'all' given, must be at least 1, or "auto"'?"""),
    ],
)
def test_what_is_wrong_is_said(base, task, method, message):
    with pytest.raises(ValueError, match=message):
        decided(base, task, **method)


# ------------------------------------------------------------------------------------------- LoftQ


def test_loftq_starts_closer_to_the_base_than_its_codes_are():
    """On gpt2-nano in 4 bits; a base as it is has nothing to make up for."""
    c = config.default()
    c.base, c.quant, c.method.init = "gpt2-nano", "nf4", "loftq"
    c.method.update(rank=32, targets=("all-linear",))
    c.task.n_train, c.train.batch_size = 64, 4
    (group,) = prepare.groups(config.members(c), lambda line: None)
    plain = lorax.load("gpt2-nano")
    drawn = prepare.drawn(group, group.stack)
    state = jax.tree.map(lambda x: x[0], drawn.state.trainable)
    constants = jax.tree.map(lambda x: x[0], drawn.constants)
    bound = group.stack.methods[0].bind(state, constants, group.base.params)
    tokens = jnp.arange(24).reshape(2, 12)
    exact = intercept.apply(plain.module, plain.params, tokens)
    off = lambda params: float(
        jnp.linalg.norm(intercept.apply(plain.module, params, tokens) - exact)
    )
    assert off(bound) < 0.8 * off(group.base.params)
    c.quant = None
    with pytest.raises(ValueError, match="method.init: 'loftq' starts from the quant.*: set quant"):
        prepare.groups(config.members(c), lambda line: None)
