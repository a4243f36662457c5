"""docs/examples/peanut.py, a method of a user's file: from its registration to its report."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from flax import linen as nn
from small import three_layers
from strangers import small, trained
from support import few

import lorax
from lorax import catalogue, config, convert, generate, methods, ops, quant, tree
from lorax.adapters import states
from lorax.planning import shapes
from lorax.report import __main__ as report
from lorax.train import prepare, stacks

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "examples" / "peanut.py"
COMMANDS = [command for where, command in pages.commands() if where.startswith("docs/methods.md")]


@pytest.fixture
def peanut(registry):
    return catalogue.read(str(FILE))


def moved(state):
    """A trained state: b away from zero."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape)
    return state._replace(trainable=jax.tree.map(noise, state.trainable))


# ----------------------------------------------------------------------------------------- formula


def products(bound, path, layer):
    """(x times one layer's leaf, x times the kernel that the leaf stands for)"""
    leaf = jax.tree.map(lambda x: x[layer], bound[path])
    x = jax.random.normal(jax.random.key(2), (3, ops.frozen(leaf).shape[0]))
    return ops.linear(x, leaf), x @ ops.matrix(leaf)


def test_the_update_is_the_dense_formula(peanut):
    base = three_layers()
    method = lorax.method("peanut", rank=3, gain=2.5, targets=("q", "down"), layers=(0, 2))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert not any(np.any(dw) for dw in method.delta(*state, base.params, base.sites).values())
    state = moved(state)
    assert method.count(base.params, base.sites) == 2 * 3 * (8 + 8 + 8 + 8)
    flat, deltas = tree.flatten(base.params), method.delta(*state, base.params, base.sites)
    bound = tree.flatten(method.bind(*state, base.params))
    merged = tree.flatten(lorax.merge(method, state, base.params, base.sites))
    assert not any(map(ops.is_operator, merged.values()))
    for path, x in methods.joined(*state).items():
        dense = 2.5 * np.maximum(np.asarray(flat[path] @ x["a"]), 0) @ np.asarray(x["b"])
        np.testing.assert_allclose(deltas[path], dense, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged[path] - flat[path], dense, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(*products(bound, path, 2), rtol=1e-4, atol=1e-5)


def test_a_leaf_of_its_own_on_a_quantised_base(peanut):
    base = three_layers()
    coded = quant.quantize(base.params, "nf4", sites=base.sites)
    method = lorax.method("peanut", rank=3)
    state = moved(method.init(jax.random.key(0), coded, base.sites))
    bound = tree.flatten(method.bind(*state, coded))
    merged = tree.flatten(lorax.merge(method, state, coded, base.sites))
    for path in methods.joined(*state):
        np.testing.assert_array_equal(ops.dense(bound[path], base.sites[path]), merged[path])
        np.testing.assert_allclose(*products(bound, path, 1), rtol=1e-4, atol=1e-5)


def test_a_leaf_of_its_own_in_any_linen_layer(peanut):
    """Kernels with head axes, found by tracing."""
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jax.random.normal(jax.random.key(5), (2, 10, 32))
    params = attention.init(jax.random.key(0), x)["params"]
    sites = lorax.sites(attention, params, x)
    method = lorax.method("peanut", rank=4, targets=("re:(query|value|out)/kernel",))
    state = moved(method.init(jax.random.key(1), params, sites))
    bound = lorax.apply(attention, method.bind(*state, params), x)
    merged = attention.apply({"params": lorax.merge(method, state, params, sites)}, x)
    np.testing.assert_allclose(merged, bound, rtol=0, atol=1e-5)
    assert np.abs(bound - attention.apply({"params": params}, x)).max() > 0.1


def test_what_a_leaf_can_not_do_is_said(peanut):
    base = three_layers()
    method = lorax.method("peanut", rank=3, targets=("embed",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    with pytest.raises(ValueError, match="embedding with a WeightAware leaf is not supported"):
        lorax.apply(base.module, method.bind(*state, base.params), jnp.arange(6)[None])


# ------------------------------------------------------------------------------------------- sweep


def swept(**axes):
    c = small("peanut")
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


def test_it_is_planned_with_the_shapes_of_the_arrays(peanut):
    members = config.members(swept(rank=(2, 4), gain=(1.0, 8.0)))
    base, shaped = shapes.shapes(members)
    stacked = stacks.stack(members, shaped.methods, lorax.load("gpt2-nano"))
    for found, want in zip(shaped[2:], stacked[2:], strict=True):
        assert found == jax.eval_shape(lambda t: t, want)
    counted = [method.count(base.params, base.sites) for method in shaped.methods]
    assert counted == [2 * 4 * r * 256 for r in (2, 2, 4, 4)]


@pytest.mark.parametrize("remat", few(["full", "dots"], ["dots"]))
def test_it_trains_with_a_quantised_base_and_remat(peanut, remat, tmp_path):
    c = swept(rank=(2, 4))
    c.quant, c.train.remat, c.train.width = "nf4", remat, 2
    run = trained(c, tmp_path / "run")
    losses = run.metrics[run.metrics["split"] == "eval"].groupby("member")["loss"]
    assert (losses.last() < losses.first()).all()


def test_what_does_not_come_from_the_trees_is_no_part_of_a_shared_program(peanut, registry):
    base = lorax.load("gpt2-nano")

    @methods.register("closed", varies=("rank", "gain", "layers"))
    def closed(rank=8, gain=1.0, layers=None):
        method = peanut.peanut(rank=rank, layers=layers)

        def bind(trainable, constants, params, key=None, sites=None):
            scale = lambda path, x: x * gain if path.endswith("/s") else x
            flat = tree.flatten(constants)
            scaled = tree.unflatten({path: scale(path, x) for path, x in flat.items()})
            return method.bind(trainable, scaled, params, key, sites)

        return method._replace(name="closed", hp=dict(rank=rank, gain=gain), bind=bind)

    def stack(**axes):
        c = swept(**axes)
        c.method.name = "closed"
        members = config.members(c)
        built = stacks.build_methods(members, base)
        return stacks.rehearse(members, built, base, stacks.padding(built, base), None, {})

    stack(rank=(2, 4), seed=(0, 1))
    with pytest.raises(
        ValueError, match="'closed': members that differ in gain can't share .*`bind`, `p"
    ):
        stack(gain=(1.0, 2.0))
    row = registry["closed"]
    short = lambda **hp: (m := closed(**hp))._replace(
        init=lambda key, params, sites=None, targets=None, pad=None, evidence=None: m.init(
            key, params, sites, targets
        )
    )
    registry["closed"] = row._replace(where=short)
    with pytest.raises(
        ValueError, match="differ in rank can't .*/a is .*2.* and .*4.*pad to the w"
    ):
        stack(rank=(2, 4))


# ---------------------------------------------------------------------------------------- commands

#: What a test changes in the study.
FEW = {
    **{"task.n_train": 64, "train.steps": 3, "train.batch_size": 2, "train.seq_len": 100},
    **{
        "train.warmup": 1,
        "train.parallel": "none",
        "eval.every": 3,
        "eval.examples": 2,
        "eval.test": 2,
    },
    "method.gain": 3.0,
}
AXES = {"rank": (2, 4), "gain": (2.0, 32), "seed": (0,)}
FLAGS = [f"--config.{key}={value}" for key, value in FEW.items()]
FLAGS += [f"--config.sweep.{axis}={values}" for axis, values in AXES.items()]


def command(*arguments, cwd, code=0):
    """What a command of a process of its own writes; to stderr where it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone in which the page's first command was run, in a few steps."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "docs").symlink_to(ROOT / "docs")
    said = command(*shlex.split(COMMANDS[0])[2:], "--workdir=runs/peanut", *FLAGS, cwd=folder)
    assert "rank (2, 4) x gain (2.0, 32)" in said and "lorax's own format" in said
    return folder


def here(main, command, monkeypatch, capsys, cwd, code=0):
    """What a command writes that runs in this process."""
    monkeypatch.chdir(cwd)
    assert main([str(word) for word in command]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_the_flags_make_columns_of_the_report(clone):
    run = lorax.runs.load(clone / "runs" / "peanut")
    assert run.members["gain"].tolist() == [2, 32, 2, 32]
    assert run.members["group"].nunique() == 1
    assert run.config["config"]["method"]["gain"] == 3
    settings = (run.directory / "analysis" / "settings.csv").read_text()
    assert settings.startswith("rank,gain,")
    assert "gain" in (run.directory / "report.html").read_text()


def test_a_member_of_the_group_is_itself_alone(clone, peanut, tmp_path):
    together = lorax.runs.load(clone / "runs" / "peanut")
    c = peanut.get_config()
    c.update_from_flattened_dict(FEW)
    for axis, value in {"rank": 2, "gain": 32.0, "seed": 0}.items():
        c.sweep[axis] = (value,)
    alone, mine = trained(c, tmp_path / "alone").delta(0), together.delta(1)
    assert mine.keys() == alone.keys()
    for path in mine:
        assert np.abs(mine[path] - alone[path]).max() < 1e-3 * np.abs(alone[path]).max(), path


def test_rank_gain_and_seed_are_one_group(peanut):
    members = config.members(swept(rank=(2, 4), gain=(1.0, 8.0), seed=(0, 1)))
    (group,) = prepare.groups(members, lambda line: None)
    assert len(group.stack.members) == 8


def test_a_run_of_it_resumes_and_mistakes_are_named(clone):
    line = COMMANDS[0].split()[2:]
    assert "is finished" in command(*line, "--workdir=runs/peanut", *FLAGS, cwd=clone)
    wrong = command(*line, "--config.method.gian=3", cwd=clone, code=2)
    assert "no key 'method.gian'; did you mean 'method.gain'" in wrong
    wrong = command(*line, "--config.method.gain=much", cwd=clone, code=2)
    assert "gain" in wrong and len(wrong.splitlines()) == 1


def test_a_file_beside_the_config_may_register_it(tmp_path):
    (tmp_path / "beside.py").write_text(FILE.read_text().replace('"peanut"', '"peanut2"'))
    (tmp_path / "study.py").write_text(
        "import beside\nfrom lorax.config import default\n\ndef get_config(arg=None):\n"
        "    c = default()\n    c.base = 'random:gpt2'\n    c.method.name = 'peanut2'\n"
        "    c.sweep.gain = (1.0, 2.0)\n    return c\n"
    )
    (tmp_path / "elsewhere").mkdir()
    wrong = command("lorax.run", "--config=../study.py", "--config.method.gian=1",
                    cwd=tmp_path / "elsewhere", code=2)  # fmt: skip
    assert "did you mean 'method.gain'" in wrong


def test_the_page_plans_merges_generates_and_reports(clone, registry, monkeypatch, capsys):
    """Its commands, one after the other, on the adapter of its run."""
    (planned,) = (c for c in COMMANDS if "lorax.plan" in c)
    assert "gain" in command(*shlex.split(planned)[2:], *FLAGS, cwd=clone)
    run = lambda main, line: here(main, shlex.split(line)[3:], monkeypatch, capsys, clone)
    said = {name: [c for c in COMMANDS if f"lorax.{name} " in c] for name in ("convert", "report")}
    (merge,) = said["convert"]
    assert "peanut merged" in run(convert.main, merge)
    (complete,) = (c for c in COMMANDS if "lorax.generate" in c)
    text = run(generate.main, f"{complete} --new-tokens 6")
    option = complete[complete.index("--prompt") :]
    merged = run(generate.main, f"python -m lorax.generate --base merged {option} --new-tokens 6")
    assert text == merged and text.startswith("name =")
    (shown,) = said["report"]
    page = (clone / run(report.main, f"{shown} --out=page").strip()).read_text()
    assert "gain=2.0" in page and "peanut" in page and "h/3/attn/v" in page


def test_an_adapter_says_what_it_is(clone, registry, monkeypatch, capsys):
    adapter = clone / "runs" / "peanut" / "adapters" / "1"
    about = json.loads((adapter / "method.json").read_text())
    assert about["name"] == "peanut" and about["hp"]["gain"] == 32 and about["file"] == "peanut.py"
    show = ["show", adapter, "--base", "gpt2-nano", "--method", FILE]
    said = here(convert.main, show, monkeypatch, capsys, clone)
    assert "h/0/attn/q" in said and "dW of every layer" in said


@pytest.mark.parametrize("name", ["convert", "generate"])
def test_a_method_that_is_not_registered_is_named(clone, name, registry, monkeypatch, capsys):
    main, line = {
        "convert": (convert.main, ["show", "runs/peanut/adapters/0", "--base", "gpt2-nano"]),
        "generate": (
            generate.main,
            ["--base", "gpt2-nano", "--adapter", "runs/peanut/adapters/0", "--prompt", "a"],
        ),
    }[name]
    said = here(main, line, monkeypatch, capsys, clone, code=2)
    assert "method.json: method 'peanut' is not registered; give --method FILE that" in said
    assert "as peanut.py did" in said and len(said.strip().splitlines()) <= 2  # and "loading"
    said = here(main, [*line, "--method", "nowhere.py"], monkeypatch, capsys, clone, code=2)
    assert "--method: 'nowhere.py' is no Python file" in said


def test_what_does_not_fit_is_named(clone, peanut, tmp_path):
    base, adapter = lorax.load("gpt2-nano"), clone / "runs" / "peanut" / "adapters" / "3"
    method, state = states.load(adapter, base)
    assert method.hp["rank"] == 4 and method.hp["gain"] == 32 and method.hp["targets"] == ("q", "v")
    states.save(tmp_path / "copy", method, state, base)
    for name in ("state.safetensors", "delta.safetensors", "method.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (adapter / name).read_bytes()
    cut = lambda x: x[..., :64] if x.ndim == 3 else x
    narrow = dataclasses.replace(base, params=jax.tree.map(cut, base.params))
    with pytest.raises(ValueError, match="state.safetensors: .*does not fit|.*has .* there"):
        states.load(adapter, narrow)
    (tmp_path / "copy" / "method.json").write_text('{"name": "peanut"}')
    with pytest.raises(ValueError, match="method.json: must have the name and the hyperparameters"):
        states.load(tmp_path / "copy", base)
