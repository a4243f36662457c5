"""docs/examples/delora.py, a method of a user's file without a leaf of its own."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quick import jit
from strangers import assert_same_update, small, trained

import lorax
from lorax import catalogue, config, methods, tree
from lorax.planning import shapes
from lorax.train import prepare

FILE = Path(__file__).parents[2] / "docs" / "examples" / "delora.py"


def test_it_starts_at_the_base_and_merges(registry):
    catalogue.read(str(FILE))
    base = lorax.load("gpt2-nano")
    method = lorax.method("delora", rank=3, targets=("q", "down"))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert (
        method.count(base.params, base.sites)
        == tree.count(state.trainable)
        == 4 * (3 * (256 + 640) + 2)
    )
    tokens = jnp.arange(12)[None]
    run = jit(lambda params: lorax.apply(base.module, params, tokens))
    plain = run(base.params)
    np.testing.assert_allclose(run(method.bind(*state, base.params)), plain, rtol=0, atol=1e-4)

    noisy = jax.tree.map(lambda x: x + 0.1, state.trainable)
    moved = methods.State(noisy, state.constants)
    bound = run(method.bind(*moved, base.params))
    merged = run(lorax.merge(method, moved, base.params))
    np.testing.assert_allclose(merged, bound, rtol=0, atol=1e-4)
    assert np.abs(bound - plain).max() > 0.01


def test_it_sweeps_in_one_group(registry, tmp_path):
    """Ranks, seeds, layers and targets: one program, whose members are themselves alone."""
    catalogue.read(str(FILE))
    c = small("delora")
    c.method.alpha = 1.0
    c.sweep.rank, c.sweep.targets, c.sweep.seed = (2, 5), (("q",), ("v", "up")), (0, 1)
    members, together = config.members(c), trained(c, tmp_path / "together")
    (group,) = prepare.groups(members, lambda line: None)
    assert len(group.stack.members) == 8
    rows = prepare.describe(group)
    assert [row["trainable_params"] for row in rows] == [
        2052,
        2052,
        5124,
        5124,
        7176,
        7176,
        17928,
        17928,
    ]
    for member in (members[0], members[7]):
        alone = small("delora")
        alone.method.alpha = 1.0
        for axis, value in member.point.items():
            alone.sweep[axis] = (value,)
        assert_same_update(
            together.adapter(member.index), trained(alone, tmp_path / "a").adapter(0)
        )
        shutil.rmtree(tmp_path / "a")
    factors = together.adapter(7)
    assert {path.rpartition("/")[2] for path in factors} == {"v", "up"}
    assert all(f.a.shape[1] == 10 for f in factors.values())
    shapes.shapes(members)
