"""Spectra taken on the device: of factors as they are, and of a run from its start to its end."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quick import jit

import lorax
from lorax import config, halving, intercept, quant, spectrum, tree
from lorax.analysis import runs, tables
from lorax.analysis.measures import overlap
from lorax.analysis.tables import along_training
from lorax.models import Base, gpt2, load
from lorax.models.base import kernel
from lorax.train import (
    compared,
    evidence,
    fitting,
    layouts,
    loop,
    prepare,
    stacks,
    trajectory,
)
from lorax.train.batches import batch_shapes, eval_batches
from lorax.train.members import over_members
from lorax.train.programs import compile_programs

CONFIG = gpt2.Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)


@pytest.fixture(scope="module")
def base():
    module = gpt2.GPT2(CONFIG)
    tokens = np.zeros((1, 4), np.int32)
    params = jit(module.init)(jax.random.key(7), tokens)["params"]
    sites = intercept.sites(module, params, tokens)
    return Base(module, params, CONFIG, None, sites, "gpt2", "tiny")


def moved(tree_, seed=0):
    """The tree with noise wherever something is trained: padding stays zero, as in training."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        a = flat.get(path.removesuffix("/b") + "/a")
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if a is None or path.endswith("/a"):
            return x
        return noise * np.asarray(a != 0).any(-2)[..., None]

    flat = tree.flatten(tree_)
    return tree.unflatten({path: jnp.asarray(fill(path, x)) for path, x in flat.items()})


def test_spectra_of_padded_members_are_those_of_their_own_factors(base):
    """Ranks 1 and 6, and one without v, in one stack: padding has no singular values."""
    hps = dict(rank=1, targets=("q", "v")), dict(rank=6, targets=("q", "v")), dict(rank=2)
    built = [lorax.method("lora", **{"targets": ("q",), "alpha": 3.0, **hp}) for hp in hps]
    c = config.default()
    members = [config.Member(i, "", {}, c) for i in range(3)]
    stack = stacks.stack(members, built, base)
    trainable = moved(stack.state.trainable)
    one = lambda *m: trajectory.spectra(built[0], base.sites, base.params, *m)
    found = jit(over_members(one, 3))(stack.constants, trainable)
    assert set(found) == {"h/attn/q/kernel", "h/attn/v/kernel"}
    for path, (sigma, directions, used, *_) in found.items():
        own = tree.flatten(trainable)
        a, b = (np.asarray(own[f"{path}/{name}"]) for name in "ab")
        s = np.asarray(tree.flatten(stack.constants)[f"{path}/s"])
        for m, rank in enumerate((1, 6, 2)):
            if m == 2 and "/v/" in path:
                assert not used[m].any() and not sigma[m].any() and not directions[m].any()
                continue
            assert used[m].all()
            cut = a[m][..., :rank], b[m][:, :rank]
            expected = spectrum.factor_svd(*cut, s[m])[1]
            np.testing.assert_allclose(sigma[m][:, :rank], expected, rtol=1e-5)
            assert np.all(sigma[m][:, rank:] <= 1e-6 * expected[:, :1])
            k = min(rank, trajectory.DIRECTIONS)
            assert not directions[m][..., k:].any()
            inputs = overlap.update_directions(*cut)[0][..., :k]
            phi = overlap.basis_similarity(directions[m][..., :k], inputs)
            np.testing.assert_allclose(phi[:, range(k), range(k)], 1, atol=1e-5)


def test_an_update_without_factors_is_taken_apart_where_it_is_small(base, monkeypatch):
    method = lorax.method("full", parameters=("q", "embed"))
    trainable, constants = method.init(jax.random.key(0), base.params, base.sites)
    noise = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape)
    trainable = jax.tree.map(noise, trainable)
    found = trajectory.spectra(method, base.sites, base.params, constants, trainable)
    delta = method.delta(trainable, constants, base.params, base.sites)
    assert "h/attn/q/kernel" in found and "wte/embedding" in found
    for path, (sigma, directions, used, *_) in found.items():
        u, expected, _ = np.linalg.svd(np.asarray(delta[path]), full_matrices=False)
        np.testing.assert_allclose(sigma, expected, rtol=1e-4, atol=1e-5)
        cosines = np.abs(np.sum(np.asarray(directions) * u[..., : directions.shape[-1]], axis=-2))
        np.testing.assert_allclose(cosines, 1, atol=1e-4)
        assert used.all()
    assert trajectory.left_out(method, base, constants, trainable) == ""
    monkeypatch.setattr(trajectory, "WIDEST", 15)
    assert trajectory.spectra(method, base.sites, base.params, constants, trainable) == {}
    said = trajectory.left_out(method, base, constants, trainable)
    assert "h/attn/q/kernel" in said and "wider than 15" in said
    prefix = lorax.method("prefix")
    assert "prefix does not change weights" in trajectory.left_out(prefix, base, {}, {})
    assert trajectory.spectra(prefix, base.sites, base.params, {}, {}) == {}


# ------------------------------------------------------------------------------------- many devices

#: As many devices as there are cores. As one program over the devices this hung in two of three
#: tries: batched LAPACK calls wait for each other's threads.
LOOP = """
import os
import jax

jax.config.update("jax_num_cpu_devices", os.cpu_count())
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import lorax
from lorax.ops import Site
from lorax.train import trajectory

n = 2 * len(jax.devices())
sites = {"h/q/kernel": Site("linear", 1, (0,), (1,))}
params = {"h": {"q": {"kernel": jnp.zeros((4, 128, 128))}}}
method = lorax.method("full", parameters=("re:h/q/kernel",))
trainable, constants = method.init(jax.random.key(0), params, sites)
noise = np.random.default_rng(0).standard_normal((n, 4, 128, 128), np.float32)
many = lambda x: jnp.broadcast_to(x, (n, *x.shape))
stacked = jax.tree.map(many, constants), jax.tree.map(lambda x: noise, trainable)
mesh = jax.make_mesh((len(jax.devices()),), ("devices",))
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
params, (constants, trainable) = put(params, P()), put(stacked, P("devices"))

decompose = trajectory.decomposer(method, sites)
for _ in range(200):
    found = decompose(params, constants, trainable, [{}] * n)
sigma = np.linalg.svd(noise, compute_uv=False)
np.testing.assert_allclose(found["h/q/kernel"].sigma, sigma, rtol=1e-4, atol=1e-4)
"""


def test_spectra_of_members_on_every_core_do_not_hang():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", LOOP], env=environment, timeout=300, check=True)


# -------------------------------------------------------------------------------- run directories


def study(on, **method):
    c = config.default()
    c.base, c.task.name, c.task.n_train = "random:mlp-64-12-10", "digits", 32
    c.method.targets = ("re:.*/kernel",)
    c.train.update(steps=5, batch_size=8, warmup=0, lr=1e-2, parallel="none")
    c.eval.update(every=2, examples=50, batch_size=25)
    c.method.update(**method)
    c.sweep.seed = (0, 1)
    c.analysis.trajectory = on
    return c


def train(workdir, c):
    """(`runs.Run` of what training leaves, what was said)."""
    said = []
    workdir.mkdir(exist_ok=True)
    groups = prepare.groups(config.members(c), said.append)
    loop.train(workdir, groups, loop.Terminal(said.append, lambda *_: None, lambda row: None))
    members = pd.DataFrame([row for group in groups for row in prepare.describe(group)])
    return runs.Run(workdir, {}, members, pd.DataFrame(), {}), said


def contents(workdir, *folders):
    files = [p for folder in folders for p in (workdir / folder).rglob("*") if p.is_file()]
    found = {str(p.relative_to(workdir)): p.read_bytes() for p in files}
    return found | {"metrics": (workdir / "metrics.jsonl").read_bytes()}


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "full"))]
)
def test_a_trajectory_ends_in_the_exported_update_and_survives_a_kill(name, tmp_path):
    c = study(True, name=name, rank=3)
    if name != "full":
        c.sweep.rank = (1, 3)
    run, said = train(tmp_path / "whole", c)
    assert not any("analysis.trajectory" in line for line in said)
    table = tables.trajectory(run)
    assert tuple(table.columns) == along_training.COLUMNS
    assert list(table["step"].unique()) == [0, 2, 4, 5]
    assert len(table) == len(run.members) * 4 * 2  # kernels of two layers

    # At step 0 there is no update, and the last step is the one that was exported.
    start = table[table["step"] == 0]
    numbers = ["norm", "effective", "stable", "energy90", "overlap_final"]
    assert not start[numbers].to_numpy().any()
    final = table[table["step"] == 5].set_index(["member", "path"])
    np.testing.assert_allclose(final["overlap_final"], 1, atol=1e-5)
    updates, _ = tables.updates(run, run.members["member"])
    expected = tables.spectra(updates)[1].set_index(["member", "path"])
    assert set(final.index) == set(expected.index)
    for field in numbers[:-1]:
        np.testing.assert_allclose(final[field], expected.loc[final.index, field], rtol=1e-4)
    assert list(final["layer"]) == list(expected.loc[final.index, "layer"])
    between = table[table["step"] == 2]
    assert (between["overlap_final"] > 0.05).all() and (between["overlap_final"] < 1).all()

    # Killed between a spectrum and its checkpoint, then continued: the same bytes.
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints/0-0/5")
    shutil.rmtree(torn / "adapters")
    (torn / "trajectory/0-0/5.safetensors").write_bytes(b"torn")
    _, said = train(torn, c)
    assert any("continues at step 4 of 5" in line for line in said)
    same = "trajectory", "adapters"
    assert contents(torn, *same) == contents(whole, *same)

    if name != "lora":
        return
    # And training itself takes no notice of being watched.
    c.analysis.trajectory = False
    run, _ = train(tmp_path / "off", c)
    assert not (tmp_path / "off/trajectory").exists() and tables.trajectory(run) is None
    assert contents(tmp_path / "off", "adapters") == contents(whole, "adapters")


def in_directions(dw, u, v):
    """Shares of |dw|^2 of both sides, the input side, the output side."""
    parts = (u.T @ dw @ v, u.T @ dw, dw @ v)
    return [np.sum(x**2) / np.sum(dw**2) for x in parts]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_trajectory_says_where_updates_lie_among_directions_that_do_not_move(name, tmp_path):
    c, k = study(True, name=name), 3
    c.sweep.seed, c.train.steps = (1,), 3
    if name == "lora":
        c.sweep.rank = (1, 3)
    c.analysis.update(subspaces=k, first_gradient=True)
    run, said = train(tmp_path / "run", c)
    table, base = tables.trajectory(run), load(c.base)
    spans = name == "lora"
    columns = (*along_training.COLUMNS, *along_training.ENERGY, *along_training.GRADIENT * spans)
    assert tuple(table.columns) == columns
    assert any("trains no a to compare" in line for line in said) != spans
    start = table.query("step == 0")
    assert start[[*along_training.ENERGY[:6]]].isna().all(axis=None)
    (group,) = prepare.groups(config.members(c), lambda line: None)
    rows = evidence.read(group.members[0], base, group.task, base.sites, "gradient", {})
    for _, row in table.query("step == 3").iterrows():
        w, update = kernel(base, *base.layers[row["path"]]), run.update(row["member"])[row["path"]]
        u, _, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
        dw = update.s * update.a @ update.b if spans else update
        for part, take in (("top", slice(k)), ("bottom", slice(-k, None))):
            got = [row[f"energy_{part}{side}"] for side in ("", "_in", "_out")]
            expected = in_directions(dw, u[:, take], vt[take].T)
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)
        sides = k / w.shape[0], k / w.shape[1]
        got = row[["chance", "chance_in", "chance_out"]].astype(float)
        np.testing.assert_allclose(got, [np.prod(sides), *sides], rtol=1e-6)
        if spans:
            path, r = base.layers[row["path"]][0], update.a.shape[1]
            g = np.linalg.svd(np.asarray(rows[path]["gradient"]))[0][:, :r]
            phi = np.sum((np.linalg.qr(update.a)[0].T @ g) ** 2) / r
            np.testing.assert_allclose(row["gradient_overlap"], phi, rtol=1e-3)
            np.testing.assert_allclose(row["gradient_chance"], r / w.shape[0], rtol=1e-6)


def test_w_is_decomposed_once_for_all_groups_and_legs(monkeypatch):
    c, decomposed, of_weights = study(True), [], compared.of_weights
    c.sweep.full_lr, c.analysis.subspaces = (1e-3,), 2
    groups = prepare.groups(config.members(c), lambda line: None)
    race = halving.without([member for group in groups for member in group.members])

    def counted(base, path, k):
        decomposed.append(path)
        return of_weights(base, path, k)

    monkeypatch.setattr(compared, "of_weights", counted)
    monkeypatch.setattr(fitting, "fit", lambda *arguments: None)  # nothing is compiled
    programs = loop.Compiled(groups, race, lambda line: None)
    found = [programs.compared(group, group.stack) for group in groups * 2]
    assert len(groups) == 2 and all(of_member for of in found for of_member in of.values())
    assert len(decomposed) == len({*decomposed}) > 0


def test_energy_in_random_directions_is_chance(base):
    """And all of it lies in all directions of W: the shares of a full basis are 1."""
    path, rng = "h/attn/q/kernel", np.random.default_rng(0)
    method = lorax.method("full", parameters=("q",))
    trainable, constants = method.init(jax.random.key(0), base.params, base.sites)
    noise = rng.standard_normal(
        (200, *trainable["h"]["attn"]["q"]["kernel"]["w"].shape), np.float32
    )
    for k, tolerance in ((16, 1e-5), (4, 0.1)):
        known = {path: compared.Compared(*compared.of_weights(base, path, k))}
        of_one = jit(
            lambda x, given: (
                trajectory.spectra(
                    method,
                    base.sites,
                    base.params,
                    constants,
                    jax.tree.map(lambda w: w + x, trainable),
                    given,
                )[path].energy
            )
        )
        found = np.mean([of_one(x, known) for x in noise], axis=0)
        np.testing.assert_allclose(
            found, np.broadcast_to(found[:, 2:], found.shape), rtol=tolerance
        )


def test_directions_of_a_coded_base_and_on_a_mesh_are_those_of_one_device(base):
    """Of what the codes stand for; the numbers of a divided base are gathered layer by layer."""
    path = "h/attn/q/kernel"
    coded = base.replace(params=quant.quantize(base.params, "nf4", sites=base.sites))
    u, v = compared.of_weights(coded, path, 2)
    for layer in range(3):
        w = kernel(coded, path, (layer,))
        assert np.linalg.norm(w - kernel(base, path, (layer,))) > 1e-3
        sigma = np.linalg.svd(w)[1]
        for end, expected in ((0, sigma[:2]), (1, sigma[-2:])):
            inside = u[layer, end].T @ w @ v[layer, end]
            np.testing.assert_allclose(inside, np.diag(expected), atol=1e-5)

    method = lorax.method("lora", rank=2, targets=("q",))
    trainable, constants = method.init(jax.random.key(0), base.params, base.sites)
    trainable = moved(trainable)
    gradient = compared.of_gradient(jax.random.normal(jax.random.key(1), (3, 16, 16)), 2)
    known = [{path: compared.Compared(u, v, gradient)}]
    decompose = trajectory.decomposer(method, base.sites)
    many = jax.tree.map(lambda x: x[None], (constants, trainable))
    one = decompose(base.params, *many, known)[path]
    mesh = jax.make_mesh((2,), ("fsdp",))
    place = lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp" if x.ndim > 1 else None))
    params = jax.tree.map(lambda x: jax.device_put(x, place(x)), base.params)
    rest = jax.device_put(many, NamedSharding(mesh, P()))
    two = decompose(params, *rest, known)[path]
    assert one.energy.shape == (1, 3, 3, 3) and one.phi.shape == (1, 3, 2)
    for mine, theirs in zip(one[3:], two[3:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_what_trajectories_measure_needs_a_trajectory():
    for key, value in (("subspaces", 4), ("first_gradient", True)):
        c = study(False)
        c.analysis[key] = value
        with pytest.raises(ValueError, match=rf"^analysis\.{key}: {value} given, needs analysis"):
            config.members(c)


@pytest.mark.slow
def test_devices_that_share_the_members_see_what_one_sees(tmp_path):
    """Three members on two devices, or one after the other: the copy that fills up has no rows."""
    found = []
    for mode, devices in (("none", 1), ("members", 2), ("pmap", 2)):
        c = study(True, rank=2)
        c.sweep.seed = (0, 1, 2)
        (group,) = prepare.groups(config.members(c), lambda line: None)
        stack = prepare.drawn(group, group.stack)
        train_ = c.train.copy_and_resolve_references()
        train_.parallel = mode
        batches = batch_shapes(c.train, group.task, 1)
        evals = tree.shapes(eval_batches(group.task, 25))
        chosen = layouts.layout(3, train_, group.base, jax.devices()[:devices])
        programs = compile_programs(stack, group.base, chosen, batches, evals, group.task.kind)
        trainable = programs.place(moved(stack.state.trainable))
        constants = programs.place(stack.constants)
        params = programs.place_base(group.base.params)
        file = tmp_path / mode / "trajectory" / "0-0" / "1.safetensors"
        spectra = programs.spectra(params, constants, trainable, [{}] * 3)
        trajectory.write(file, spectra, stack.members, group.base)
        found.append(tables.trajectory(runs.Run(tmp_path / mode, {}, None, None, {})))
    assert list(found[0]["member"].unique()) == [0, 1, 2]
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], rtol=1e-5)
