"""The largest eigenvalue of the Hessian: against dense matrices, and a dense Hessian of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits import trained
from quick import jit

import lorax
from lorax import config, intercept, tree
from lorax.analysis import largest_eigenvalues, runs
from lorax.models import gpt2, load
from lorax.train import loop, prepare, sharpness
from lorax.train import step as steps
from lorax.train.batches import train_batches


def symmetric(eigenvalues, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    return (q * eigenvalues) @ q.T


def test_largest_eigenvalues_of_matrices_side_by_side():
    """Also where the largest in size is negative, one is far away, or all are equal."""
    n, rng = 40, np.random.default_rng(1)
    spectra = [
        np.linspace(-3, 2, n),
        np.geomspace(1e-3, 50, n),
        np.full(n, 0.5),
        -np.arange(1.0, n + 1),
    ]
    matrices = np.stack([symmetric(x, seed) for seed, x in enumerate(spectra)])
    times = lambda v: np.einsum("mij,mj->mi", matrices, v)
    found = largest_eigenvalues(times, rng.standard_normal((4, n)), tolerance=1e-6)
    largest = np.array([x.max() for x in spectra])
    np.testing.assert_allclose(found.value, largest, rtol=1e-5)
    assert (np.abs(found.value - largest) <= found.residual + 1e-9).all() and found.products <= n
    few = largest_eigenvalues(times, rng.standard_normal((4, n)), tolerance=1e-6, most=3)
    assert few.products == 3 and few.residual[0] > 1e-3 and few.value[0] < largest[0]


def test_what_can_not_start_is_refused():
    with pytest.raises(
        ValueError, match=r"^start \(2, 3\): need \(M, P\), none of the M all zeros"
    ):
        largest_eigenvalues(lambda v: v, np.array([[1.0, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="^product: returned numbers that are not finite"):
        largest_eigenvalues(lambda v: v * np.nan, np.ones((1, 3)))


def study(name="lora"):
    c = config.default()
    c.base, c.task.name, c.task.n_train = "random:mlp-64-6-10", "digits", 48
    c.method.name, c.method.targets = name, ("re:.*/kernel",)
    c.train.update(steps=4, batch_size=16, warmup=0, lr=3e-2, parallel="none", accumulate=2)
    c.eval.update(every=4, examples=40, batch_size=40)
    c.analysis.sharpness = 2
    return c


def dense(c, group, i, trainable):
    """The largest eigenvalue of the Hessian of member i, alone and without padding."""
    method, base = group.methods[i], group.base
    rows = train_batches(group.stack, group.task, 0, c.analysis.sharpness)
    batch = jax.tree.map(lambda x: x[i].reshape(-1, *x.shape[4:]), rows)
    own, constants = method.init(jax.random.key(0), base.params, base.sites)
    cut = lambda x, like: jnp.asarray(x[tuple(map(slice, like.shape))])
    flat = tree.flatten(trainable)
    own = {path: cut(flat[path][i], x) for path, x in tree.flatten(own).items()}
    sizes = np.cumsum([x.size for x in own.values()])

    def loss(vector):
        parts = jnp.split(vector, sizes[:-1])
        state = {p: x.reshape(own[p].shape) for p, x in zip(own, parts, strict=True)}
        bound = method.bind(tree.unflatten(state), constants, base.params, sites=base.sites)
        total, weight, _ = group.task.kind.loss(base.module, bound, batch)
        return total / weight

    vector = jnp.concatenate([x.ravel() for x in own.values()])
    return float(np.linalg.eigvalsh(np.asarray(jax.hessian(loss)(vector), np.float64))[-1])


def test_members_have_the_sharpness_of_their_dense_hessians_at_both_ends(tmp_path):
    """Of rank 1 and 3 in one program: the padding of the first, a saddle, does not count."""
    c = study()
    c.sweep.rank = (1, 3)
    (group,) = prepare.groups(config.members(c), lambda line: None)
    run = trained(tmp_path / "run", c)
    table = runs.summary(run)
    for i in range(2):
        expected = dense(c, group, i, prepare.drawn(group, group.stack).state.trainable)
        assert table["start_sharpness"][i] == pytest.approx(expected, rel=2e-3)
        assert table["start_sharpness_residual"][i] <= 1e-3 * table["start_sharpness"][i]
        learned = {}
        for path, (site, _) in group.base.layers.items():
            update = run.update(i)[path]
            learned |= {f"{site}/a": update.a, f"{site}/b": update.b}
        trainable = tree.unflatten({p: np.stack([x] * 2) for p, x in learned.items()})
        assert table["sharpness"][i] == pytest.approx(dense(c, group, i, trainable), rel=5e-3)


def test_a_diverged_member_takes_no_part(tmp_path, monkeypatch):
    """Whatever its Hessian is."""
    c, measure = study(), sharpness.measure
    c.sweep.lr, c.method.rank, c.analysis.sharpness = (1e-2, 1e30), 2, 1
    (group,) = prepare.groups(config.members(c), lambda line: None)

    def spoiled(part, trainable, batches, trained):
        assert trained == [0]
        others = np.arange(2)[:, None] > 0
        nan = lambda x: np.where(others.reshape(2, *(1,) * (x.ndim - 1)), np.nan, x)
        return measure(part, jax.tree.map(nan, trainable), batches, trained)

    monkeypatch.setattr(sharpness, "measure", spoiled)
    rows, _ = loop.train(tmp_path, [group], loop.Terminal(*[lambda *_: None] * 3))
    assert rows[1]["status"] == "diverged" and "sharpness" not in rows[1]
    assert rows[0]["sharpness"]["end"]["value"] > 0 and "failed" not in rows[0]


def test_the_product_is_the_difference_of_gradients_of_a_language_model():
    """Through layers that have a backward pass of their own."""
    small = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12)
    module, rng = gpt2.GPT2(small), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 20, (2, 3, 7)), jnp.int32)
    params = jit(module.init)(jax.random.key(0), tokens[0])["params"]
    sites = intercept.sites(module, params, tokens[0])
    method = lorax.method("lora", rank=2, targets=("q", "v"))
    trainable, constants = method.init(jax.random.key(1), params, sites)
    noise = lambda: jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), trainable
    )
    at, vector = jax.tree.map(jnp.add, trainable, noise()), noise()
    c = config.default()
    program = steps.Program(module, method, sites, c.train, dropout=False, merge=False)
    batches = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.float32)}
    product = lambda t: steps.hessian_product(program, params, constants, t, batches, vector)

    def gradient(t):
        loss = lambda t: steps.evaluate(program, params, constants, t, batches)[0]
        return jax.grad(loss)(t)

    moved = lambda by: jit(gradient)(jax.tree.map(lambda x, v: x + by * v, at, vector))
    expected = jax.tree.map(lambda x, y: (x - y) / 0.2, moved(0.1), moved(-0.1))
    found, expected = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
        for t in (jit(product)(at), expected)
    )
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["full", "vera"])
def test_other_methods_have_masks_of_their_own_shapes(name):
    c = study(name)
    if name != "full":
        c.sweep.rank = (2, 5)
    (group,) = prepare.groups(config.members(c), lambda line: None)
    masks = tree.flatten(sharpness.masks(group.stack, load(c.base)))
    for i, method in enumerate(group.methods):
        own = method.init(jax.random.key(0), group.base.params, group.base.sites).trainable
        own = {path: x.size for path, x in tree.flatten(own).items()}
        assert {path: int(mask[i].sum()) for path, mask in masks.items()} == own
