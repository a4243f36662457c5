import functools
import re

import jax
import numpy as np
import pytest
from quick import jit
from support import few

import lorax
from lorax import config, tasks, tree
from lorax.calls import steps_per_call
from lorax.intercept import sites
from lorax.models import Base, gpt2
from lorax.tasks import kinds
from lorax.train import fitting, layouts, stacks
from lorax.train import step as train_step
from lorax.train.batches import batch_shapes, eval_batches, train_batches
from lorax.train.programs import halved

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
    rng = np.random.default_rng(0)

    def rows(n):
        tokens = np.cumsum(rng.integers(1, 3, (n, 13)), axis=1).astype(np.int32) % 50
        mask = np.ones((n, 13), np.float32)
        mask[:, :4] = 0
        return {"tokens": tokens, "mask": mask}

    return tasks.Task("count", rows(64), rows(10), "")


def settings(**sweep_axes):
    c = config.default()
    c.train.update(steps=7, batch_size=8, seq_len=12, warmup=0, schedule="constant", lr=5e-3)
    c.eval.update(every=4, batch_size=4)
    for axis, values in sweep_axes.items():
        c.sweep[axis] = values
    return c


def stack_of(c, base, pick=None):
    members = config.members(c)
    members = members if pick is None else [members[i] for i in pick]
    return stacks.stack(members, stacks.build_methods(members, base), base)


def run(c, base, task, pick=None, devices=None, steps=7, k=4):
    """Final eval losses (M,), training losses (M, steps), final trainable trees (M leading)."""
    stacked = stack_of(c, base, pick)
    abstract = tree.shapes
    evals = eval_batches(task, 4)
    batches = batch_shapes(stacked.members[0].config.train, task, k)
    devices = devices or jax.devices()[:1]
    train = stacked.members[0].config.train
    with pytest.MonkeyPatch.context() as patch:
        if not train.memory_gb:  # what a program takes is asked of the one that a person gets
            patch.setattr(jax, "jit", jit)
        programs = fitting.fit(
            stacked, base, train, abstract(batches), abstract(evals), task.kind, devices
        )
    params, losses, finals, trees = programs.place_base(base.params), [], [], []
    pad = stacks.padding(stacked.methods, base)
    for part in stacks.parts(stacked, programs.layout.size):
        chunk = stacks.stack(part.members, part.methods, base, pad)
        place, m = programs.place, len(chunk.members)
        constants, hyper = place(chunk.constants), place(chunk.hyper)
        state = programs.place_state(chunk.state)
        curve = []
        for first in range(0, steps, k):
            host = train_batches(chunk, task, first, k)
            state, logs = programs.train(
                params, constants, hyper, state, programs.place_batches(host)
            )
            curve.append(np.asarray(logs["loss"])[:m, : steps - first])
        n = np.int32(len(evals[next(iter(evals))]))
        rows = programs.rows(params, constants, programs.learned(state), evals, n)
        finals.append(np.asarray(rows.loss.sum((1, 2)) / rows.weight.sum((1, 2)))[:m])
        losses.append(np.concatenate(curve, axis=1))
        trees.append(jax.device_get(state.trainable))
    n = len(stacked.members)
    together = jax.tree.map(lambda *x: np.concatenate(x)[:n], *trees)
    return np.concatenate(finals), np.concatenate(losses), together, programs, state


MIXED = dict(
    rank=(1, 3, 4),
    targets=(("q", "v"), ("all-linear",)),
    seed=(0, 1),
)


@pytest.fixture(scope="module")
def reference(base, task):
    return run(settings(**MIXED), base, task)


def test_padding_is_exactly_zero_at_the_end(base, reference):
    trainable = reference[2]
    flat = tree.flatten(trainable)
    for i, member in enumerate(config.members(settings(**MIXED))):
        rank, targets = member.point["rank"], member.point["targets"]
        for path, leaf in flat.items():
            adapted = targets == ("all-linear",) or path.split("/")[2] in targets
            own = leaf[i][..., rank:] if path.endswith("/a") else leaf[i][..., rank:, :]
            assert not own.any(), (member.name, path)
            assert leaf[i].any() == adapted, (member.name, path)


@pytest.mark.parametrize("index", [0, 11])
def test_a_member_alone_equals_itself_in_the_sweep(base, task, reference, index):
    final, losses, trainable, *_ = run(settings(**MIXED), base, task, pick=[index])
    np.testing.assert_allclose(losses[0], reference[1][index], rtol=1e-5)
    np.testing.assert_allclose(final[0], reference[0][index], rtol=1e-5)


OPTIMIZERS = {"adafactor": "none", "lion": "none", "muon": "members", "schedule-free": "pmap"}
OPTIMIZERS |= {"riemannian": "pmap", "lora-muon": "members"}


@pytest.mark.parametrize(
    "optimizer", few(OPTIMIZERS, ["schedule-free"], ["muon", "lora-muon", "riemannian"])
)
def test_a_member_alone_equals_itself_in_the_sweep_with_other_optimizers(base, task, optimizer):
    """Rank 1 of two matrices, padded to rank 16 of all; over two devices and on one."""
    axes = {"rank": (1, 16), "targets": (("q", "v"), ("all-linear",))}
    c = settings(**axes)
    c.train.optimizer = optimizer
    c.train.parallel = OPTIMIZERS[optimizer]
    final, losses, *_ = run(c, base, task, pick=[0, 3], devices=jax.devices()[:2])
    c.train.parallel = "none"
    of_one, losses_of_one, *_ = run(c, base, task, pick=[0])
    np.testing.assert_allclose(losses_of_one[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(of_one[0], final[0], rtol=1e-5)
    assert losses[0, -1] < losses[0, 0] - 0.001


def test_members_learn_and_differ(reference):
    final, losses = reference[:2]
    assert (losses[:, -1] < losses[:, 0] - 0.01).all()
    assert len(np.unique(losses, axis=0)) == len(final)


@pytest.mark.parametrize("width", [1, 5])
def test_width_changes_nothing(base, task, reference, width):
    c = settings(**MIXED)
    c.train.width = width
    final, losses, *_ = run(c, base, task)
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    np.testing.assert_allclose(final, reference[0], rtol=1e-5)


@pytest.mark.parametrize("parallel", ["members", "batch", "pmap"])
def test_eight_devices_equal_one(base, task, reference, parallel):
    c = settings(**MIXED)
    c.train.parallel = parallel
    final, losses, _, programs, state = run(c, base, task, devices=jax.devices())
    assert programs.layout.mode == parallel and len(programs.layout.devices) == 8
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    np.testing.assert_allclose(final, reference[0], rtol=1e-5)
    if parallel == "members":
        leaf = jax.tree.leaves(state.trainable)[0]
        assert len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated


OFFLOADED = [
    ("none", 1, {"width": 1}),
    ("members", 8, {"accumulate": 2}),
    ("batch", 8, {"width": 5}),
    ("none", 1, {}),
]


@pytest.mark.parametrize(
    ("parallel", "devices", "changes"), few(OFFLOADED, [], [OFFLOADED[0], OFFLOADED[2]])
)
def test_an_offloaded_optimiser_changes_no_bit(
    base, task, reference, parallel, devices, changes, monkeypatch
):
    """Against the same two programs with the state on the device all the time; and against the one
    program of a plain step within rounding."""
    c = settings(**MIXED)
    c.train.parallel, c.train.offload = parallel, "optimizer"
    c.train.update(**changes)
    away = run(c, base, task, devices=jax.devices()[:devices], k=1)
    kinds = lambda t: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(t)}
    state = away[4]
    assert kinds(state.opt_state) == {"pinned_host"}
    assert kinds((state.trainable, state.step)) == {"device"}
    assert (
        parallel != "members"
        or not state.opt_state[1].mu["h"]["attn"]["q"]["kernel"]["a"].is_fully_replicated
    )

    monkeypatch.setattr("lorax.train.offload.HOST", "device")
    here = run(c, base, task, devices=jax.devices()[:devices], k=1)
    assert kinds(here[4]) == {"device"}
    for mine, other in zip(here[:2], away[:2], strict=True):
        np.testing.assert_array_equal(mine, other)
    same = lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    jax.tree.map(same, here[4], state)
    np.testing.assert_allclose(away[1], reference[1], rtol=1e-5)
    np.testing.assert_allclose(away[0], reference[0], rtol=1e-5)


def test_batches_grouped_by_length_are_cut_and_lose_nothing(base, task, monkeypatch):
    """Two thirds of the rows are short: the losses are those of the same rows at full width."""
    mask = task.train["mask"].copy()
    mask[np.arange(64) % 3 > 0, 8:] = 0
    rows = {"tokens": task.train["tokens"], "mask": mask}
    rows = {name: np.pad(x, ((0, 0), (0, 4))) for name, x in rows.items()}
    grouped = task._replace(train=rows, lengths=kinds.lengths(task.kind, rows))
    assert tasks.widths(grouped) == (9, 17)
    c = settings(seed=(0, 1))
    c.train.update(steps=8, batch_size=4, seq_len=16)
    stacked = stack_of(c, base)
    widths = [train_batches(stacked, grouped, i, 1)["tokens"].shape[-1] for i in range(8)]
    assert widths[0] == 17 and 9 in widths
    cut = run(c, base, grouped, steps=8, k=1)
    monkeypatch.setattr(tasks, "widths", lambda task: (17,))
    whole = run(c, base, grouped, steps=8, k=1)
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-5)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)


def test_auto_spreads_members_and_then_batches(base):
    one = settings().train
    assert layouts.layout(12, one, base).mode == "members"
    assert layouts.layout(1, one, base).mode == "batch"
    assert layouts.layout(1, one, base, jax.devices()[:1]).mode == "none"
    odd = settings().train.copy_and_resolve_references()
    odd.batch_size = 6
    assert layouts.layout(1, odd, base).mode == "none"
    odd.parallel = "batch"
    with pytest.raises(ValueError, match="train.parallel: 'batch' over 8 devices, .* 6 sequences"):
        layouts.layout(1, odd, base)


def test_too_little_memory_means_parts_and_the_same_numbers(base, task, reference):
    c = settings(**MIXED)
    c.train.memory_gb = 1e-3  # one program for all 12 takes 1.1 MB even at width 1
    final, losses, _, programs, _ = run(c, base, task)
    assert programs.layout.width == 1 and programs.layout.size < 12 and programs.bytes <= 1e6
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    np.testing.assert_allclose(final, reference[0], rtol=1e-5)


def test_memory_for_not_even_one_is_an_error_before_any_allocation(base, task):
    c = settings(rank=(1, 2))
    c.train.memory_gb = 1e-6
    with pytest.raises(MemoryError, match="one member needs .* nor would a smaller batch fit"):
        run(c, base, task)


def fitted(base, task, accumulate=1, seq_len=12, memory_gb=0.0):
    """Programs of one member."""
    c = settings(rank=(2,))
    c.train.update(accumulate=accumulate, memory_gb=memory_gb)
    cut = tasks.Task("cut", {k: x[:, : seq_len + 1] for k, x in task.train.items()}, task.eval, "")
    batches = tree.shapes(batch_shapes(c.train, cut, 4))
    evals = tree.shapes(eval_batches(task, 4))
    stacked, devices = stack_of(c, base), jax.devices()[:1]
    return fitting.fit(stacked, base, c.train, batches, evals, task.kind, devices)


def test_what_would_fit_is_said_and_fits(base, task):
    """First in more parts; then in shorter rows; and where nothing of a batch helps, that."""
    whole, least = fitted(base, task).bytes, fitted(base, task, 8).bytes
    assert least < whole
    with pytest.raises(MemoryError, match="given by train.memory_gb: .*accumulate=. would") as one:
        fitted(base, task, memory_gb=(whole - 1) / 1e9)
    a = int(re.search(r"train.accumulate=(\d)", str(one.value))[1])
    assert fitted(base, task, a, memory_gb=(whole - 1) / 1e9).bytes < whole
    wide = task._replace(train={k: np.tile(x, (1, 2))[:, :17] for k, x in task.train.items()})
    short = fitted(base, wide, 8, 8).bytes
    with pytest.raises(MemoryError, match="train.seq_len=8 with train.accumulate=8 would fit"):
        fitted(base, wide, 1, 16, memory_gb=(short + 1) / 1e9)


def test_a_limit_by_the_user_is_no_more_than_there_is(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(fitting.memory, "free", lambda: fitting.memory.Free(10**9, "are free"))
    train = settings().train
    assert fitting.memory_limit(train, one) == (800_000_000, "are free")
    train.memory_gb = 0.5
    assert fitting.memory_limit(train, one) == (500_000_000, "are given by train.memory_gb")
    train.memory_gb = 2.0
    assert fitting.memory_limit(train, one) == (1_000_000_000, "are free")
    assert fitting.memory_limit(train, jax.devices()[:2]) == (500_000_000, "are free")


def test_a_diverging_member_stops_and_leaves_the_others_alone(base, task):
    calm = run(settings(rank=(2,), lr=(5e-3, 1e-3)), base, task)
    wild = run(settings(rank=(2,), lr=(5e-3, 1e38, 1e-3)), base, task)
    at = np.asarray(wild[4].diverged_at)
    assert at[0] == at[2] == -1 and 1 <= at[1] <= 3
    np.testing.assert_allclose(wild[1][[0, 2]], calm[1], rtol=1e-5)
    for leaf in jax.tree.leaves(wild[2]):
        assert np.isfinite(leaf).all()


def test_optimiser_state_has_no_frozen_leaf(base):
    stacked = stack_of(settings(**MIXED), base)
    trained = tree.nbytes(stacked.state.trainable)
    m = len(stacked.members)
    # Adam's two moments; a step counter each for Adam and for the schedule.
    assert tree.nbytes(stacked.state.opt_state) == 2 * trained + 2 * 4 * m


def test_one_program_serves_every_call(base, task):
    stacked = stack_of(settings(**MIXED), base)
    assert len({config.group_key(member) for member in stacked.members}) == 1


def test_batches_are_a_function_of_seed_and_step(base, task):
    stacked = stack_of(settings(rank=(1, 2), seed=(3, 4)), base)
    a = train_batches(stacked, task, 8, 4)["tokens"]
    b = train_batches(stacked, task, 4, 8)["tokens"]
    np.testing.assert_array_equal(a, b[:, 4:])
    np.testing.assert_array_equal(a[0], a[2])  # rank 1 and 2 of seed 3
    assert (a[0] != a[1]).any()


def test_n_train_members_see_only_their_rows(base, task):
    stacked = stack_of(settings(n_train=(5, 64)), base)
    seen = train_batches(stacked, task, 0, 16)["tokens"]
    rows = {row.tobytes() for row in task.train["tokens"][:5]}
    assert {row.tobytes() for row in seen[0].reshape(-1, 13)} == rows
    assert len({row.tobytes() for row in seen[1].reshape(-1, 13)}) > 5


def test_eval_batches_fill_up_without_weight(task):
    batches = eval_batches(task, 4)
    assert batches["tokens"].shape == (3, 4, 13)
    assert batches["mask"].sum() == task.eval["mask"].sum()


# ------------------------------------------------------------------------------------------ arrays


@pytest.fixture(scope="module")
def mlp():
    return lorax.load("random:mlp-64-12-10")


@pytest.fixture(scope="module")
def images(mlp):
    return tasks.build({"name": "digits", "n_train": 60}, None, 1, 10, mlp)


IMAGES = dict(rank=(1, 3), seed=(0, 1))


def image_settings(**axes):
    c = settings(**axes)
    c.base, c.task.name, c.method.targets = "random:mlp-64-12-10", "digits", ("re:.*/kernel",)
    return c


@pytest.fixture(scope="module")
def image_reference(mlp, images):
    return run(image_settings(**IMAGES), mlp, images)


@pytest.mark.parametrize("index", [0, 3])
def test_an_array_member_alone_equals_itself_in_the_sweep(mlp, images, image_reference, index):
    final, losses, *_ = run(image_settings(**IMAGES), mlp, images, pick=[index])
    np.testing.assert_allclose(losses[0], image_reference[1][index], rtol=1e-5)
    np.testing.assert_allclose(final[0], image_reference[0][index], rtol=1e-5)
    assert len(np.unique(image_reference[1], axis=0)) == 4


@pytest.mark.parametrize("parallel", ["members", "batch"])
def test_arrays_on_eight_devices_equal_those_on_one(mlp, images, image_reference, parallel):
    c = image_settings(**IMAGES)
    c.train.parallel = parallel
    final, losses, _, programs, _ = run(c, mlp, images, devices=jax.devices())
    assert programs.layout.mode == parallel
    np.testing.assert_allclose(losses, image_reference[1], rtol=1e-5)
    np.testing.assert_allclose(final, image_reference[0], rtol=1e-5)


def test_arrays_with_an_offloaded_optimiser(mlp, images, image_reference):
    c = image_settings(**IMAGES)
    c.train.offload = "optimizer"
    final, losses, *_ = run(c, mlp, images, k=1)
    np.testing.assert_allclose(losses, image_reference[1], rtol=1e-5)
    np.testing.assert_allclose(final, image_reference[0], rtol=1e-5)


def test_batches_of_arrays(mlp, images):
    stacked = stack_of(image_settings(n_train=(5, 60)), mlp)
    batches = train_batches(stacked, images, 0, 3)
    assert {name: x.shape for name, x in batches.items()} == {
        "inputs": (2, 3, 1, 8, 8, 8, 1),
        "label": (2, 3, 1, 8),
        "weight": (2, 3, 1, 8),
    }
    assert batches["inputs"].dtype == np.uint8
    first = {row.tobytes() for row in images.train["inputs"][:5]}
    assert {row.tobytes() for row in batches["inputs"][0].reshape(-1, 64)} == first
    own = batch_shapes(stacked.members[0].config.train, images, 3)
    assert {name: (2, *x.shape) for name, x in own.items()} == {
        name: x.shape for name, x in batches.items()
    }
    # an image counts as one token: as many members side by side as a CPU ever has
    train = stacked.members[0].config.train
    assert layouts.layout(8, train, mlp, jax.devices()[:1]).width == 8
    evals = eval_batches(images, 4)
    assert evals["inputs"].shape == (3, 4, 8, 8, 1) and evals["weight"].sum() == 10
    assert (evals["weight"][2] == [1, 1, 0, 0]).all() and not evals["inputs"][2, 2:].any()


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(mlp, images):
    """The last of three batches is half empty, and one of ten is full."""
    stacked = stack_of(image_settings(), mlp)
    program = train_step.Program(
        mlp.module, stacked.methods[0], mlp.sites, stacked.members[0].config.train, False, False,
        kind=kinds.ARRAYS,
    )  # fmt: skip
    one = lambda t: jax.tree.map(lambda x: x[0], t)
    state = mlp.params, one(stacked.constants), one(stacked.state.trainable)
    run = jit(functools.partial(train_step.evaluate, program))
    losses = [run(*state, eval_batches(images, size))[0] for size in (4, 10)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(("every", "k"), [(50, 10), (1, 1), (8, 8), (14, 7), (13, 1)])
def test_steps_per_call_divide_the_distance_between_evaluations(every, k):
    assert steps_per_call(every) == k
    assert steps_per_call(every, offload="optimizer") == 1


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ({"name": "lora", "targets": ("q",)}, 0),
        ({"name": "dora", "targets": ("q",)}, 0),
        ({"name": "subspace"}, None),
        ({"name": "full", "parameters": ("q", "norms")}, 1),
        ({"name": "full", "layers": (0,)}, None),
    ],
    ids=["lora", "dora", "subspace", "full", "full-layers"],
)
def test_kernels_that_a_method_makes_anew_do_not_multiply_in_bfloat16(base, task, method, own):
    """own: how many kernels the method replaces; None: all of the layers."""
    c = settings(**({"dim": (8,)} if method["name"] == "subspace" else {}))
    c.operands = "bfloat16"
    c.method.update(method)
    whole = base.sites.keys() - halved(stack_of(c, base), base).keys()
    in_layers = {path for path in base.sites if path.startswith("h/")}
    assert whole >= in_layers if own is None else len(whole) == own
    losses = run(c, base, task)[1]
    assert np.isfinite(losses).all() and losses[0, -1] < losses[0, 0]
