"""The README's own method: it is what the README says it is."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quick import jit

import lorax
from lorax import methods, tree

README = Path(__file__).parents[1] / "README.md"


def test_the_method_of_the_readme_runs(monkeypatch, tmp_path):
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "lora-xs" in block
    )
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 40
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    exec(compile(code, "README", "exec"), {})

    base = lorax.load("gpt2-nano")
    method = lorax.method("lora-xs", rank=3, targets=("q", "down"))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.count(base.params, base.sites) == tree.count(state.trainable) == 4 * 2 * 9
    tokens = jnp.arange(12)[None]
    run = jit(lambda params: lorax.apply(base.module, params, tokens))
    plain = run(base.params)
    np.testing.assert_array_equal(run(method.bind(*state, base.params)), plain)

    noisy = jax.tree.map(lambda x: x + 0.1, state.trainable)
    moved = methods.State(noisy, state.constants)
    bound = run(method.bind(*moved, base.params))
    merged = run(lorax.merge(method, moved, base.params))
    np.testing.assert_allclose(merged, bound, rtol=0, atol=1e-4)
    assert np.abs(bound - plain).max() > 0.01
