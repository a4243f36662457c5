"""`python -m lorax.bench gpu` as a command, with small shapes on a CPU: a file that says all."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import quick

from lorax import tree
from lorax.bench.gpu import measurements, models, schedule, sizes
from lorax.errors import reason
from lorax.models import decoder, gpt2

SMALL = sizes.SMALL
ELSEWHERE = ("not installed", "NVIDIA GPUs")


def command(tmp_path, *options):
    """(the process's end, what its file holds)."""
    flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "lorax.bench", "gpu", "--minutes=20", f"--json={file}", *options],
        env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    return done, json.loads(file.read_text())


def strange(results) -> dict:
    """What is neither measured nor for another device or library."""
    return {
        m["name"]: (m["status"], m["why"])
        for m in results["measurements"]
        if m["status"] != schedule.DONE
        and not (m["status"] == schedule.SKIPPED and m["why"].endswith(ELSEWHERE))
    }


@pytest.mark.slow  # the parts are tested beside this, without a process that imports everything
def test_the_file_and_the_page_have_what_was_measured(tmp_path):
    done, results = command(tmp_path, "--small", "--only=product 256 x 256, 16 rows")
    assert done.returncode == 0, done.stderr
    assert strange(results) == {} and results["small"]
    ours, theirs = results["measurements"]
    assert [row["path"] for row in ours["rows"]] == ["bf16", "two passes", "fused"]
    assert theirs["side"] == "torch"
    assert results["machine"]["platform"] == "cpu"
    (few,) = [path for path in results["paths"] if path["rows"] == "2-64"]
    assert few["takes"] == "fused" and list(few["fastest"]) == ["256 x 256, 16 rows"]
    assert "2-64: fused; " in done.stdout and "small shapes" in done.stdout


@pytest.mark.soak  # every program of the models is compiled, in two minutes
def test_everything_is_measured(tmp_path):
    done, results = command(tmp_path)
    assert done.returncode == 0, done.stdout
    assert strange(results) == {}
    names = [m.name for m in measurements.measurements(SMALL)]
    assert [m["name"] for m in results["measurements"]] == names
    assert all(m["rows"] for m in results["measurements"] if m["status"] == schedule.DONE)


@pytest.mark.parametrize(
    "run, given",
    [
        pytest.param(models.generation, (), marks=pytest.mark.slow),
        pytest.param(models.mixed_batch, (1,), marks=pytest.mark.slow),
        pytest.param(models.llama_generation, (), marks=pytest.mark.slow),
        pytest.param(models.llama_step, (models.NF4,), marks=pytest.mark.slow),
        pytest.param(models.sweep, (2,), marks=pytest.mark.soak),
        pytest.param(models.step, ("bfloat16",), marks=pytest.mark.soak),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_is_measured(run, given):
    rows = list(run(SMALL, *given))
    assert rows and all(0 < row["low"] <= row["ms"] <= row["high"] for row in rows)


def test_the_weights_of_a_step_are_those_of_the_models_products():
    """All linear kernels, and GPT-2's embedding, which is its head."""
    for c, module in (
        (SMALL.gpt2.config, gpt2.GPT2(SMALL.gpt2.config)),
        (SMALL.llama, decoder.Decoder(SMALL.llama)),
    ):
        example = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
        flat = tree.flatten(shapes)
        head = {path for path in flat if path == "wte/embedding"}
        linear = {path for path in flat if path.endswith("kernel")} | head
        assert models.weights(c) == sum(flat[path].size for path in linear)
    assert models.weights(sizes.FULL.llama) == 6_738_415_616 - 32_000 * 4096 - 65 * 4096


def test_names_and_cases_of_both_sizes_are_distinct():
    for each in (sizes.SMALL, sizes.FULL):
        names = [m.name for m in measurements.measurements(each)]
        assert len(set(names)) == len(names) and all(name.strip() == name for name in names)
    sides = [m.side for m in measurements.measurements(sizes.FULL)]
    starts = sum(a != b for a, b in zip(sides, sides[1:], strict=False))
    assert starts == 2  # each change of process takes time


def test_a_missing_library_is_named(monkeypatch):
    from lorax.bench.gpu import torch_models

    monkeypatch.setattr(torch_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception) as stopped:
        list(torch_models.step(SMALL, "float32"))
    assert reason(stopped.value) == "torch, peft, transformers not installed"
