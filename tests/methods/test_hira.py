"""docs/examples/hira.py, a method of a user's file: from its registration to its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit
from strangers import small, trained

import lorax
from lorax import catalogue, config, methods, ops, plan, quant, tree
from lorax.adapters import states
from lorax.train import prepare, stacks

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "examples" / "hira.py"
TOKENS = jnp.arange(24).reshape(2, 12)


@pytest.fixture
def hira(registry):
    catalogue.read(str(FILE))
    return sys.modules["lorax_method_hira"]


def moved(state):
    """A trained state: b away from zero."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape)
    return state._replace(trainable=jax.tree.map(noise, state.trainable))


def logits(base, params):
    return np.asarray(jit(lambda p: lorax.apply(base.module, p, TOKENS))(params))


# ----------------------------------------------------------------------------------------- formula


def test_the_update_is_the_dense_formula(hira):
    base = lorax.load("gpt2-nano")
    method = lorax.method("hira", rank=3, gain=2.5, targets=("q", "down"), layers=(0, 2))
    state = method.init(jax.random.key(0), base.params, base.sites)
    np.testing.assert_array_equal(
        logits(base, method.bind(*state, base.params)), logits(base, base.params)
    )
    state = moved(state)
    d = 128
    assert method.count(base.params, base.sites) == 2 * 3 * (d + d + 4 * d + d)
    flat, deltas = tree.flatten(base.params), method.delta(*state, base.params, base.sites)
    for path, f in methods.joined(*state).items():
        dense = 2.5 * np.asarray(flat[path]) * np.asarray(f["a"] @ f["b"])
        np.testing.assert_allclose(deltas[path], dense, rtol=1e-5, atol=1e-6)
    bound = logits(base, method.bind(*state, base.params))
    merged = lorax.merge(method, state, base.params, base.sites)
    assert not any(map(ops.is_operator, tree.flatten(merged).values()))
    np.testing.assert_allclose(logits(base, merged), bound, rtol=0, atol=1e-4)
    assert np.abs(bound - logits(base, base.params)).max() > 0.1


def test_a_leaf_of_its_own_on_a_quantised_base(hira):
    base = lorax.load("gpt2-nano")
    base = base.replace(params=quant.quantize(base.params, "nf4", sites=base.sites))
    method = lorax.method("hira", rank=3)
    state = moved(method.init(jax.random.key(0), base.params, base.sites))
    bound = method.bind(*state, base.params)
    merged = lorax.merge(method, state, base.params, base.sites)
    np.testing.assert_allclose(logits(base, merged), logits(base, bound), rtol=0, atol=1e-4)


def test_a_leaf_of_its_own_in_any_linen_layer(hira):
    """Kernels with head axes, found by tracing."""
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jax.random.normal(jax.random.key(5), (2, 10, 32))
    params = attention.init(jax.random.key(0), x)["params"]
    sites = lorax.sites(attention, params, x)
    method = lorax.method("hira", rank=4, targets=("re:(query|value|out)/kernel",))
    state = moved(method.init(jax.random.key(1), params, sites))
    bound = lorax.apply(attention, method.bind(*state, params), x)
    merged = attention.apply({"params": lorax.merge(method, state, params, sites)}, x)
    np.testing.assert_allclose(merged, bound, rtol=0, atol=1e-5)
    assert np.abs(bound - attention.apply({"params": params}, x)).max() > 0.1


def test_what_a_leaf_can_not_do_is_said(hira):
    base = lorax.load("gpt2-nano")
    method = lorax.method("hira", rank=3, targets=("embed",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    with pytest.raises(ValueError, match="embedding with a Elementwise leaf is not supported"):
        logits(base, method.bind(*state, base.params))


# ------------------------------------------------------------------------------------------- sweep


def swept(**axes):
    c = small("hira")
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


def test_rank_gain_and_seed_are_one_group_of_members_that_are_themselves_alone(hira, tmp_path):
    c = swept(rank=(2, 4), gain=(1.0, 8.0), seed=(0, 1))
    members = config.members(c)
    (group,) = prepare.groups(members, lambda line: None)
    assert len(group.stack.members) == 8
    together = trained(c, tmp_path / "together")
    assert together.members["gain"].tolist() == [1, 1, 8, 8] * 2
    for n in (2, 5):
        point = {axis: (value,) for axis, value in members[n].point.items()}
        alone = trained(swept(**point), tmp_path / f"{n}").delta(0)
        mine = together.delta(n)
        assert mine.keys() == alone.keys()
        for path in mine:
            off = np.abs(mine[path] - alone[path]).max()
            assert off < 1e-3 * np.abs(alone[path]).max(), (path, off)


def test_it_is_planned_with_the_shapes_of_the_arrays(hira):
    members = config.members(swept(rank=(2, 4), gain=(1.0, 8.0)))
    base, shaped = plan.shapes(members)
    stacked = stacks.stack(members, shaped.methods, lorax.load("gpt2-nano"))
    for found, want in zip(shaped[2:], stacked[2:], strict=True):
        assert found == jax.eval_shape(lambda t: t, want)
    counted = [method.count(base.params, base.sites) for method in shaped.methods]
    assert counted == [2 * 4 * r * 256 for r in (2, 2, 4, 4)]


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_it_trains_with_a_quantised_base_and_remat(hira, remat, tmp_path):
    c = swept(rank=(2, 4))
    c.quant, c.train.remat, c.train.width = "nf4", remat, 2
    run = trained(c, tmp_path / "run")
    losses = run.metrics[run.metrics["split"] == "eval"].groupby("member")["loss"]
    assert (losses.last() < losses.first()).all()


def test_what_does_not_come_from_the_trees_is_no_part_of_a_shared_program(hira, registry):
    base = lorax.load("gpt2-nano")

    @methods.register("closed", varies=("rank", "gain", "layers"))
    def closed(rank=8, gain=1.0, layers=None):
        method = hira.hira(rank=rank, layers=layers)

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
        return stacks.stack(members, stacks.build_methods(members, base), base)

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


def command(*arguments, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


TINY = ["--config.task.n_train=64", "--config.train.steps=2", "--config.train.batch_size=2"]
TINY += ["--config.train.warmup=1", "--config.eval.every=2", "--config.eval.examples=2"]
TINY += ["--config.train.parallel=none", "--config.sweep.rank=(2, 4)", "--config.sweep.seed=(0,)"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hira")
    said = command(
        "lorax.run", f"--config={FILE}", "--workdir=run", *TINY,
        "--config.method.gain=3", "--config.sweep.gain=(2.0, 32)", cwd=folder,
    )  # fmt: skip
    assert "rank (2, 4) x gain (2.0, 32)" in said and "lorax's own format" in said
    return folder


def test_the_flags_make_columns_of_the_report(run):
    found = lorax.runs.load(run / "run")
    assert (
        found.members["gain"].tolist() == [2, 32, 2, 32] and found.members["group"].nunique() == 1
    )
    assert found.config["config"]["method"]["gain"] == 3
    settings = (run / "run" / "analysis" / "settings.csv").read_text()
    assert settings.startswith("rank,gain,")
    assert "gain" in (run / "run" / "report.html").read_text()
    line = f"--config={FILE}", "--workdir=other"
    wrong = command("lorax.run", *line, "--config.method.gian=3", cwd=run, code=2)
    assert "no key 'method.gian'; did you mean 'method.gain'" in wrong
    wrong = command("lorax.run", *line, "--config.method.gain=much", cwd=run, code=2)
    assert "gain" in wrong and len(wrong.splitlines()) == 1


def test_a_run_of_it_resumes(run):
    again = command(
        "lorax.run", f"--config={FILE}", "--workdir=run", *TINY,
        "--config.method.gain=3", "--config.sweep.gain=(2.0, 32)", cwd=run,
    )  # fmt: skip
    assert "is finished" in again


def test_a_file_beside_the_config_may_register_it(run):
    (run / "beside.py").write_text(FILE.read_text().replace('"hira"', '"hira2"'))
    (run / "study.py").write_text(
        "import beside\nfrom lorax.config import default\n\ndef get_config(arg=None):\n"
        "    c = default()\n    c.base = 'random:gpt2'\n    c.method.name = 'hira2'\n"
        "    c.sweep.gain = (1.0, 2.0)\n    return c\n"
    )
    (run / "elsewhere").mkdir()
    wrong = command("lorax.run", "--config=../study.py", "--config.method.gian=1",
                    cwd=run / "elsewhere", code=2)  # fmt: skip
    assert "did you mean 'method.gain'" in wrong


def test_commands_read_it_back(run):
    adapter = "run/adapters/1"
    about = json.loads((run / adapter / "method.json").read_text())
    assert about["name"] == "hira" and about["hp"]["gain"] == 32 and about["file"] == "hira.py"
    with_file = ["--method", FILE]
    shown = command("lorax.convert", "show", adapter, "--base", "gpt2-nano", *with_file, cwd=run)
    assert "h/0/attn/q" in shown and "dW of every layer" in shown
    said = command("lorax.convert", "merge", "gpt2-nano", adapter, "merged", *with_file, cwd=run)
    assert "hira merged" in said and "nothing changes" not in said
    prompt = ["--prompt", "name = The", "--new-tokens", "6"]
    one = command("lorax.generate", "--base", "merged", *prompt, cwd=run)
    on = ["--base", "gpt2-nano", "--adapter", adapter]
    assert command("lorax.generate", *on, *with_file, *prompt, cwd=run) == one
    page = command("lorax.report", adapter, "--base=gpt2-nano", "--out=page", cwd=run).strip()
    text = (run / page).read_text()
    assert "gain=32.0" in text and "hira" in text and "h/3/attn/v" in text


@pytest.mark.parametrize("name", ["convert", "generate"])
def test_a_method_that_is_not_registered_is_named(run, name):
    line = {
        "convert": ["show", "run/adapters/0", "--base", "gpt2-nano"],
        "generate": ["--base", "gpt2-nano", "--adapter", "run/adapters/0", "--prompt", "a"],
    }[name]
    said = command(f"lorax.{name}", *line, cwd=run, code=2)
    assert "method.json: method 'hira' is not registered; give --method FILE that" in said
    assert "as hira.py did" in said and len(said.strip().splitlines()) <= 2  # and "loading"
    said = command(f"lorax.{name}", *line, "--method", "nowhere.py", cwd=run, code=2)
    assert "--method: 'nowhere.py' is no Python file" in said


def test_what_does_not_fit_is_named(run, hira, tmp_path):
    base = lorax.load("gpt2-nano")
    method, state = states.load(run / "run" / "adapters" / "3", base)
    assert method.hp["rank"] == 4 and method.hp["gain"] == 32 and method.hp["targets"] == ("q", "v")
    states.save(tmp_path / "copy", method, state, base)
    for name in ("state.safetensors", "delta.safetensors", "method.json"):
        one, other = (
            folder / name for folder in (tmp_path / "copy", run / "run" / "adapters" / "3")
        )
        assert one.read_bytes() == other.read_bytes()
    cut = lambda x: x[..., :64] if x.ndim == 3 else x
    narrow = base.replace(params=jax.tree.map(cut, base.params))
    with pytest.raises(ValueError, match="state.safetensors: .*does not fit|.*has .* there"):
        states.load(run / "run" / "adapters" / "3", narrow)
    (tmp_path / "copy" / "method.json").write_text('{"name": "hira"}')
    with pytest.raises(ValueError, match="method.json: must have the name and the hyperparameters"):
        states.load(tmp_path / "copy", base)
