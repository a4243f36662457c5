"""From members to files: what the loop adds to the programs it calls."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import data

from lorax import adapters, config, losses, memory, tasks, tree
from lorax.interop import peft
from lorax.models import load
from lorax.train import checkpoint, loop, prepare, step
from lorax.train.batches import train_batches

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture
def members():
    c = config.default()
    c.train.update(steps=6, batch_size=4, seq_len=96, lr=1e-2, warmup=0, parallel="none")
    c.eval.update(every=2, examples=8, test=8, batch_size=8)
    c.task.n_train = 64
    c.sweep.seed = (0, 1)
    return c


def train(workdir, c):
    """(rows, what was said) of a run, or of its continuation."""
    said = []
    groups = prepare.groups(config.members(c), said.append)
    terminal = loop.Terminal(said.append, lambda done, total: None, lambda row: None)
    return loop.train(workdir, groups, terminal)[0], said


def contents(workdir):
    """Metrics, and the bytes of the adapters."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = sorted((workdir / "adapters").rglob("*.safetensors"))
    assert files
    return lines, {str(f.relative_to(workdir)): f.read_bytes() for f in files}


def test_an_offloaded_optimiser_resumes_bit_for_bit(members, tmp_path):
    members.train.offload = "optimizer"
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    train(whole, members)
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints/0-0/6")
    shutil.rmtree(torn / "adapters")
    _, said = train(torn, members)
    assert any("continues at step 4 of 6" in line for line in said)
    assert contents(torn) == contents(whole)


def test_other_optimizers_are_an_axis_and_resume_bit_for_bit(members, tmp_path):
    """Of schedule-free training the averages are exported, also when its state is on the host."""
    members.train.update(steps=4, schedule="constant", offload="optimizer")
    members.sweep.seed, members.eval.test = (), 0
    members.sweep.axes = {"train.optimizer": ("muon", "schedule-free")}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    train(whole, members)
    shutil.copytree(whole, torn)
    for group in (0, 1):  # the second begins again, after the lines of the first
        shutil.rmtree(torn / f"checkpoints/{group}-0/4")
    shutil.rmtree(torn / "adapters")
    _, said = train(torn, members)
    assert any("continues at step 2 of 4" in line for line in said)
    assert contents(torn) == contents(whole)

    group = prepare.groups(config.members(members), said.append)[1]
    like = tree.shapes(group.stack.state)
    _, state, _ = checkpoint.restore(whole / "checkpoints/1-0", like, said.append)
    path = "h/attn/q/kernel/a"
    learned, trained = step.learned(group.config.train, state), tree.flatten(state.trainable)[path]
    written = load_file(whole / "adapters/1/adapter_model.safetensors")
    layer = next(x for name, x in written.items() if "h.1.attn" in name and "lora_A" in name)
    average = np.asarray(tree.flatten(learned)[path])[0, 1].T
    np.testing.assert_allclose(layer[: len(average)], average, rtol=1e-5, atol=1e-7)
    assert np.abs(average - np.asarray(trained)[0, 1].T).max() > 1e-4


def test_groups_that_are_done_keep_their_lines_when_a_later_one_continues(members, tmp_path):
    members.train.steps = 4
    members.sweep.seed, members.sweep.method = (), ("lora", "bitfit")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    train(whole, members)
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints/1-0/4")
    train(torn, members)
    assert contents(torn) == contents(whole)
    shutil.rmtree(torn / "checkpoints/0-0/4")  # what comes after it is cut off, and done again
    train(torn, members)
    assert contents(torn) == contents(whole)


@pytest.mark.parametrize("n_train", [(3, 40), (3, None)])
def test_a_member_alone_trains_on_the_rows_that_it_has_in_a_sweep(members, tmp_path, n_train):
    """The first records are too long and dropped; members.jsonl says how many were trained on."""
    rows = [
        {"prompt": f"{i} is", "completion": "very " * (200 * (i < 4)) + "good"} for i in range(60)
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members.task.update(name="instruct", path=str(file), n_train=3)
    members.train.update(steps=2, seq_len=24)
    members.sweep.seed = ()
    said = []
    (group,) = prepare.groups(config.members(members), said.append)
    alone = train_batches(group.stack, group.task, 0, 2)
    members.sweep.n_train = n_train
    (group,) = prepare.groups(config.members(members), said.append)
    together = train_batches(group.stack, group.task, 0, 2)
    for name, x in alone.items():
        np.testing.assert_array_equal(x[0], together[name][0][..., : x.shape[-1]])
    counted = [row["train_examples"] for row in prepare.describe(group)]
    assert counted == [3, n_train[1] or 53]
    members.sweep.n_train = (54, None)
    with pytest.raises(ValueError, match=r"^task\.n_train: 54 was given; .* has 53 examples"):
        prepare.groups(config.members(members), said.append)


# ------------------------------------------------------------------------------------------ arrays


def images(base="random:mlp-64-10", task="digits", **axes):
    c = config.default()
    c.base, c.task.name, c.method.targets = base, task, ("re:.*/kernel",)
    c.method.rank, c.task.n_train = 2, 32
    c.train.update(steps=4, batch_size=8, warmup=0, parallel="none")
    c.eval.update(every=2, examples=50, batch_size=20)
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


def test_every_axis_of_the_data_is_in_members_jsonl():
    c = images(shuffle=(False, True), data_seed=(0, 1), seed=(3,))
    groups = prepare.groups(config.members(c), lambda line: None)
    assert len(groups) == 4  # data that differ are no data of one program
    rows = [row for group in groups for row in prepare.describe(group)]
    assert [(r["shuffle"], r["data_seed"], r["seed"]) for r in rows] == [
        (False, 0, 3), (False, 1, 3), (True, 0, 3), (True, 1, 3),
    ]  # fmt: skip
    a, b = groups[0].task.train["inputs"], groups[2].task.train["inputs"]
    assert (a != b).any() and (a.sum(axis=(1, 2)) == b.sum(axis=(1, 2))).all()


@pytest.mark.parametrize("base", ["random:mlp-64-10", "random:mlp-64-12-10"])
def test_adapters_of_an_mlp_are_pefts(base, tmp_path):
    """And they are the update: the exported factors give the loss that was logged."""
    rows, said = train(tmp_path, images(base))
    assert not any("own format" in line for line in said)
    stored = json.loads((tmp_path / "adapters/0/adapter_config.json").read_text())
    assert stored["task_type"] is None and "head" in stored["target_modules"]
    own = load(base)
    adapter = peft.load(tmp_path / "adapters/0", own.sources)
    task = tasks.build({"name": "digits", "n_train": 32}, None, 1, 50, own, test=None)
    bound = adapters.bind(own, adapter)
    total, weight, scores = losses.array_loss(own.module, bound, task.eval)
    np.testing.assert_allclose(total / weight, rows[0]["eval_loss"], rtol=1e-5)
    tested = losses.array_rows(own.module, bound, task.test)
    np.testing.assert_allclose(tested.loss.mean(), rows[0]["test_loss"], rtol=1e-5)
    assert rows[0]["scores"] == pytest.approx(task.scores(scores, task.eval["label"]))
    assert weight == 50


def test_all_of_mnist_is_evaluated(tmp_path):
    c = images("random:mnist-fc", "mnist")
    c.task.path = str(data("mnist/mnist.npz"))
    c.eval.update(every=4, examples=10_000, batch_size=600)  # the last batch is not full
    rows, said = train(tmp_path, c)
    assert any("32 train, 10,000 eval and 10,000 test images of mnist.npz" in line for line in said)
    right = rows[0]["scores"]["accuracy"] * 10_000
    assert right == pytest.approx(round(right), abs=0.01) and right > 500


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_method_trains_what_it_says_and_no_head_beside(method):
    c = images("random:mlp-64-12-10")
    c.method.name = method
    (group,) = prepare.groups(config.members(c), lambda line: None)
    (row,) = prepare.describe(group)
    assert row["trainable_params"] == (910 if method == "full" else 22)


@pytest.mark.parametrize(
    ("base", "task", "message"),
    [
        (
            "random:mnist-fc",
            "restaurants",
            r"mnist-fc \(mlp\) reads images, .*'restaurants' has te",
        ),
        (
            "gpt2-nano",
            "digits",
            r"base: gpt2-nano \(gpt2\) reads tokens, but task 'digits' has arr",
        ),
        ("random:mnist-lenet", "digits", r"reads images of 28 x 28 x 1; task 'digits' has images"),
        ("random:mnist-fc", "mnist", "task.path: task 'mnist' needs"),
        ("random:mnist-fc", "mnits", "'mnits' is no task; .* did you mean 'mnist'"),
    ],
)
def test_a_base_and_a_task_that_do_not_fit(base, task, message):
    c = images(base, task)
    with pytest.raises(ValueError, match=message):
        prepare.groups(config.members(c), lambda line: None)


def test_without_prompts_no_texts_are_generated_and_a_line_says_so():
    c, said = images(), []
    c.eval.generate = 3
    prepare.groups(config.members(c), said.append)
    assert "eval.generate: task digits has no prompts, so no texts are generated" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.remat", "full", r"random:mlp-64-10 \(mlp\) has no setting remat"),
        ("method.targets", ("q",), "'q' matches nothing; there is paths head/kernel"),
        ("method.rank", 11, "method.rank: 11 given, but head/kernel is 64 x 10"),
    ],
)
def test_settings_that_images_have_no_use_for(key, value, message):
    c = images()
    section, _, name = key.partition(".")
    c[section][name] = value
    with pytest.raises(ValueError, match=message):
        prepare.groups(config.members(c), lambda line: None)


def test_glue_needs_an_encoder():
    c = images("random:mlp-64-10", "glue")
    c.task.subset = "sst2"
    with pytest.raises(ValueError, match=r"mlp-64-10 \(mlp\) has no setting head, .*only encoders"):
        prepare.groups(config.members(c), lambda line: None)


# ----------------------------------------------------------------------------------- planted tasks


def test_groups_that_differ_in_their_data_share_one_program(tmp_path, monkeypatch):
    c = images("random:mlp-8-6", "planted", planted_rank=(1, 2), data_seed=(0, 1), rank=(1, 2))
    c.task.n_train, c.task.examples, c.task.noise = None, 40, 0.1
    fitted, fit = [], loop.fitting.fit
    kept = lambda *given: fitted.append(fit(*given)) or fitted[-1]
    monkeypatch.setattr(loop.fitting, "fit", kept)
    together, alone = tmp_path / "together", tmp_path / "alone"
    for workdir in (together, alone):
        workdir.mkdir()
    train(together, c)
    assert len(fitted) == 1
    # The last group by itself, in a program of its own, comes to the same.
    c.sweep.planted_rank, c.sweep.data_seed = (2,), (1,)
    train(alone, c)
    assert len(fitted) == 2
    lines, files = contents(alone)
    all_lines, all_files = contents(together)
    number = {0: 3, 1: 7}  # rank is slowest, data_seed fastest
    for member, other in number.items():
        name = "adapters/{}/adapter_model.safetensors"
        assert files[name.format(member)] == all_files[name.format(other)]
    of = lambda lines, member: [x | {"member": 0} for x in lines if x["member"] == member]
    for member, other in number.items():
        assert of(lines, member) == of(all_lines, other)


def test_another_shape_or_setting_is_another_program(tmp_path, monkeypatch):
    fitted, fit = [], loop.fitting.fit
    kept = lambda *given: fitted.append(fit(*given)) or fitted[-1]
    monkeypatch.setattr(loop.fitting, "fit", kept)
    c = images("random:mlp-8-6", "planted", rank=(1,), steps=(2, 4))
    c.task.n_train, c.task.examples, c.task.rank = None, 40, 1
    train(tmp_path, c)
    assert len(fitted) == 2


def test_members_of_a_planted_task_carry_the_truth():
    c = images("random:mlp-8-6", "planted", planted_rank=(1, (2,)), noise=(0.0, 0.5))
    c.task.n_train, c.task.examples = None, 40
    rows = [
        r for g in prepare.groups(config.members(c), lambda line: None) for r in prepare.describe(g)
    ]
    assert [(len(r["planted"]["head"]), r["planted_rank"], r["noise"]) for r in rows] == [
        (1, 1, 0.0), (1, 1, 0.5), (2, (2,), 0.0), (2, (2,), 0.5),
    ]  # fmt: skip
    assert {r["planted_dim"] for r in rows} == {54} and {r["data_seed"] for r in rows} == {0}
    json.dumps(rows)


# ------------------------------------------------------- what may fail after training, and does not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eval__new_tokens=250), r"eval.generate: prompts: .* at most 208 new ones fit"),
        (dict(eval__length_penalty=1e9), "eval.generate: length_penalty: 1000000000.0 given"),
        (
            dict(eval__new_tokens=150, method__name="prefix", method__tokens=100),
            "than the 256 positions of gpt2-nano with 100 virtual tokens",
        ),
    ],
)
def test_texts_that_can_not_be_written_are_refused_before_training(members, changes, message):
    members.eval.generate = 2
    for key, value in changes.items():
        section, _, name = key.partition("__")
        members[section][name] = value
    with pytest.raises(ValueError, match=message):
        prepare.groups(config.members(members), lambda line: None)


def test_virtual_tokens_without_positions_are_refused_before_training(members):
    members.method.name, members.method.tokens = "prompt", 200
    with pytest.raises(ValueError, match="method.tokens: 200 given, but texts of 96 tokens .* 160"):
        prepare.groups(config.members(members), lambda line: None)


def test_cka_that_can_not_be_computed_is_refused_before_training(members, monkeypatch):
    members.analysis.cka = 4

    def none(*_):
        raise IndexError("no layers")

    monkeypatch.setattr("lorax.train.activations.residuals", none)
    with pytest.raises(ValueError, match="analysis.cka: 4 given, .* lora on gpt2-nano .*no layers"):
        prepare.groups(config.members(members), lambda line: None)


def test_scores_and_prompts_that_are_missing_are_said(members, monkeypatch):
    members.eval.generate = 10_000

    def missing(module, what):
        raise ImportError(f"{what}: needs a library")

    monkeypatch.setattr("lorax.tasks.metrics._library", missing)
    said = []
    prepare.groups(config.members(members), said.append)
    assert "eval.generate: without bleu: needs a library" in said
    assert any(line.startswith("eval.generate: 10000 given, the task has 5") for line in said)


def test_all_adapters_are_there_before_texts_and_cka_fail(members, tmp_path, monkeypatch):
    """And a later group is trained all the same. Where only one member fails, the others have
    texts."""
    members.train.steps = 2
    members.sweep.method = ("lora", "bitfit")
    members.eval.generate, members.eval.new_tokens, members.analysis.cka = 1, 2, 4
    there = []

    def fails(workdir, members, *_):
        there.append(sorted(p.name for p in (workdir / "adapters").iterdir()))
        if [member.index for member in members] != [1]:
            raise RuntimeError("no texts")
        return [["a text"]]

    monkeypatch.setattr("lorax.train.results.write_texts", fails)
    monkeypatch.setattr("lorax.train.activations.similarity", lambda *_: 1 / 0)
    rows, said = train(tmp_path, members)
    assert there == [["0", "1"]] * 3 + [["0", "1", "2", "3"]] * 3
    cka, no_texts = {"analysis.cka": "ZeroDivisionError: division by zero"}, "no texts"
    why = cka | {"eval.generate": no_texts}
    assert [row["failed"] for row in rows.values()] == [why, cka, why, why]
    assert ["nist" in row["scores"] for row in rows.values()] == [False, True, False, False]
    assert any("eval.generate of 2 members together: " in line for line in said)
    assert any("eval.generate of member" in line and "errors.txt)" in line for line in said)
    assert "no texts" in (tmp_path / "errors.txt").read_text()


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        (
            dict(lr=(0.0, 1e-2)),
            "train.lr: 0 in member lr=0,seed=0, lr=0,seed=1: nothing is learned",
        ),
        (dict(alpha=(0.0, 8.0)), "method.alpha: 0 in member .*: the update is multiplied by 0"),
        (dict(lr=(1e-3,)), None),
    ],
)
def test_a_member_that_can_change_nothing_is_said_to(members, axes, line):
    members.sweep.update(axes)
    said = []
    prepare.groups(config.members(members), said.append)
    found = [text for text in said if text.startswith(("train.", "method."))]
    assert len(found) == (line is not None)
    assert line is None or re.fullmatch(line, found[0])


# --------------------------------------------------------------------------------------- memory


def test_the_largest_group_is_fitted_before_anything_is_trained(tmp_path, monkeypatch):
    """And compiled once: what has no room would else show after the others are trained."""
    c = images("random:mlp-64-10", batch_size=(8, 64, 16))
    fit, sizes = loop.fitting.fit, []

    def short(stacked, base, train, *shapes):
        sizes.append(train.batch_size)
        if train.batch_size == 64 and limit:
            raise MemoryError("one member needs")
        return fit(stacked, base, train, *shapes)

    monkeypatch.setattr(loop.fitting, "fit", short)
    limit = True
    with pytest.raises(MemoryError):
        train(tmp_path, c)
    assert sizes == [64] and not (tmp_path / "metrics.jsonl").exists()
    limit = False
    train(tmp_path, c)
    assert sizes == [64, 64, 8, 16]


def test_a_base_without_room_is_refused_before_it_is_read(monkeypatch):
    free = memory.Free(1000, "are left by ulimit -v")
    monkeypatch.setattr(memory, "free", lambda: free)
    with pytest.raises(
        MemoryError, match="base: random:mlp-64-10 has 0.00 GB .* by ulimit -v; tak"
    ):
        prepare.groups(config.members(images()), lambda line: None)
