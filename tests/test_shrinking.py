"""Smaller adapters: what is kept is the best of its rank, and what is said of it is so."""

import json
import re

import digits
import jax
import numpy as np
import pytest

import lorax
from lorax import adapters, config, convert, losses, rundir, shrinking
from lorax.analysis import runs
from lorax.interop import peft
from lorax.interop.peft import Adapter, Factors
from lorax.train import prepare
from lorax.xray import keeping

WIDTH = 16
BASE = "random:mlp-64-12-10"


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def falling(n_in, n_out, r, s):
    """Factors whose singular values fall by half each."""
    u, v = (np.linalg.qr(draw(n, r))[0] for n in (n_in, n_out))
    return Factors(u * 0.5 ** np.arange(r, dtype=np.float32), np.ascontiguousarray(v.T), s)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    sizes = dict(n_embd=WIDTH, n_head=2, n_layer=2, vocab_size=40, n_positions=12)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    base = lorax.load(f"random:{directory}")
    lorax.models.save(directory, base)
    return directory, base


FACTORS = {
    "h/0/attn/q": falling(WIDTH, WIDTH, 2, 2.0),
    "h/0/attn/v": Factors(draw(WIDTH, 4), draw(4, WIDTH), 0.5),
    "h/1/mlp/down": falling(4 * WIDTH, WIDTH, 8, 0.25),
}


def saved(base, path, lengths=False):
    own = FACTORS
    if lengths:
        own = {"h/1/mlp/down": FACTORS["h/1/mlp/down"]._replace(m=1 + draw(WIDTH) ** 2)}
    weights = {"ln_f/scale": 1 + draw(WIDTH, seed=1), "ln_f/bias": draw(WIDTH)}
    peft.save(path, Adapter(own, weights, {}), base[1].sources, "x")
    return own


def product(factors):
    return factors.s * factors.a.astype(np.float64) @ factors.b


@pytest.mark.parametrize("options", [("--energy", 0.9), ("--rank", 1)])
def test_each_layer_keeps_its_leading_directions(options, base, tmp_path, capsys):
    own = saved(base, tmp_path / "adapter")
    assert run("shrink", tmp_path / "adapter", tmp_path / "out", "--base", base[0], *options) == 0
    said = capsys.readouterr().out
    smaller = peft.load(tmp_path / "out", base[1].sources)
    np.testing.assert_array_equal(smaller.weights["ln_f/scale"], 1 + draw(WIDTH, seed=1))
    left = whole = 0
    for layer, factors in own.items():
        u, sigma, vt = np.linalg.svd(product(factors))
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        k = 1 if options[0] == "--rank" else 1 + int(np.argmax(share >= 0.9))
        assert smaller.factors[layer].a.shape[1] == k
        kept = (u[:, :k] * sigma[:k]) @ vt[:k]
        np.testing.assert_allclose(product(smaller.factors[layer]), kept, atol=1e-5)
        error = np.sqrt(np.sum(sigma[k:] ** 2) / np.sum(sigma**2))
        before, after, printed = re.search(
            rf"{layer}: rank (.+) -> (.+), relative error (.+)", said
        ).groups()
        assert (int(before), int(after)) == (factors.a.shape[1], k)
        assert float(printed) == pytest.approx(error, rel=1e-2, abs=1e-7)
        left, whole = left + np.sum(sigma[k:] ** 2), whole + np.sum(sigma**2)
    assert f"relative error {np.sqrt(left / whole):.3g} of all together" in said
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    if options[0] == "--energy":
        assert fields["rank_pattern"] and fields["alpha_pattern"]


def test_all_energy_changes_nothing_and_the_largest_values_are_the_best_of_a_number(base, tmp_path):
    svds = {k: shrinking.spectrum.factor_svd(f.a, f.b, f.s) for k, f in FACTORS.items()}
    sigmas = {layer: sigma for layer, (_, sigma, _) in svds.items()}
    whole = shrinking.cut(Adapter(FACTORS, {}, {}), svds, keeping.largest(sigmas, 14))
    assert whole.error < 1e-7
    for layer, factors in whole.adapter.factors.items():
        np.testing.assert_allclose(product(factors), product(FACTORS[layer]), atol=1e-5)
    every = np.sort(np.concatenate([sigma for _, sigma, _ in svds.values()]))[::-1]
    part = shrinking.cut(Adapter(FACTORS, {}, {}), svds, keeping.largest(sigmas, 5))
    assert sum(after for _, after in part.ranks.values()) == 5
    assert part.error == pytest.approx(np.sqrt(np.sum(every[5:] ** 2) / np.sum(every**2)))


def test_dora_keeps_its_lengths(base, tmp_path, capsys):
    own = saved(base, tmp_path / "adapter", lengths=True)
    assert run("shrink", tmp_path / "adapter", tmp_path / "out", "--base", base[0], "--rank=3") == 0
    (layer,) = own
    smaller = peft.load(tmp_path / "out", base[1].sources).factors[layer]
    assert smaller.a.shape[1] == 3 and "the columns' lengths stay" in capsys.readouterr().out
    np.testing.assert_array_equal(smaller.m, own[layer].m)


def test_no_more_is_lost_than_was_given(tmp_path, capsys):
    c = config.default()
    c.base, c.task.name, c.task.n_train = BASE, "digits", 64
    c.method.targets, c.method.rank = ("re:.*/kernel",), 8
    c.train.update(steps=12, batch_size=16, warmup=0, lr=3e-2, parallel="none")
    c.eval.update(every=12, examples=60, batch_size=25)
    trained = digits.trained(tmp_path / "run", c)

    out, member = tmp_path / "out", rundir.adapter(trained.directory, 0)
    assert run("shrink", member, out, "--base", BASE, "--loss", 0.02) == 0
    said = capsys.readouterr().out
    before, after = map(float, re.search(r"validation loss (\S+) -> (\S+) ", said).groups())
    learned = runs.summary(trained)["final_loss"][0]
    assert before == pytest.approx(learned, rel=1e-4) and after - before <= 0.021
    (group,) = prepare.groups(config.members(c), lambda line: None)
    smaller = adapters.load(out, group.base)
    total, weight, _ = losses.array_loss(group.base.module, smaller.bind(), group.task.eval)
    assert float(total / weight) == pytest.approx(after, rel=1e-4)
    kept, of = map(int, re.search(r"(\d+) of (\d+) directions", said).groups())
    assert 0 < kept < of == 16

    again = tmp_path / "elsewhere"
    (tmp_path / "alone").mkdir()
    member.rename(tmp_path / "alone/adapter")
    alone = "shrink", tmp_path / "alone/adapter", again, "--base", BASE, "--loss", 0.02
    assert run(*alone) == 2
    assert "lies in no run directory; name a run with its task by --run" in capsys.readouterr().err
    assert run(*alone, "--run", trained.directory) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (("--energy", 1.5), "--energy: 1.5 given, must be a share, above 0 and at most 1"),
        (("--rank", 0), "--rank: 0 given, must be at least 1"),
        (("--rank", 1, "--run", "x"), "--run: given without --loss"),
    ],
)
def test_a_mistake_is_one_line(options, words, base, tmp_path, capsys):
    saved(base, tmp_path / "adapter")
    assert run("shrink", tmp_path / "adapter", tmp_path / "o", "--base", base[0], *options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_method_without_factors_is_refused(base, tmp_path, capsys):
    method = lorax.method("bitfit")
    state = method.init(jax.random.key(0), base[1].params, base[1].sites)
    adapters.save(tmp_path / "adapter", adapters.from_training(base[1], method, state))
    arguments = tmp_path / "adapter", tmp_path / "o", "--base", base[0], "--rank", 1
    assert run("shrink", *arguments) == 2
    assert "bitfit has no low-rank factors to shrink" in capsys.readouterr().err
