import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lorax import xla


def test_only_options_that_this_compiler_has_are_left():
    options = {"xla_backend_optimization_level": 0, "xla_no_such_option": True}
    assert xla.known(options) == {"xla_backend_optimization_level": 0}


def test_a_wrong_value_of_an_option_that_there_is_stays_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        xla.known({"xla_backend_optimization_level": "many"})


SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


def test_programs_are_kept_in_the_users_cache_folder_unless_jax_has_one(tmp_path, monkeypatch):
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        xla.keep_compiled()  # the tests' own is set
        assert {name: getattr(jax.config, name) for name in SETTINGS} == before
        jax.config.update("jax_compilation_cache_dir", None)
        xla.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        xla.keep_compiled()
        folder = Path(jax.config.jax_compilation_cache_dir)
        assert folder.parent == tmp_path / "lorax" and folder.name.startswith("xla-")
        assert jax.config.jax_compilation_cache_max_size == xla.KEPT
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_compilation_cache_max_size", 5)  # as JAX reads the variable
        monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
        xla.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert jax.config.jax_compilation_cache_max_size == 5
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


TWICE = """
import jax, jax.numpy as jnp
from lorax import xla
xla.LEAST = 0
xla.keep_compiled()
shape = jax.ShapeDtypeStruct((64, 64), "float32")
f = lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=9)
compiled = jax.jit(f, donate_argnums=0).lower(shape, shape).compile()
x, w = jax.random.normal(jax.random.key(0), (2, 64, 64))
out, sums = compiled(x, w)
print(xla.program_bytes(compiled), out.tobytes().hex()[:4000], sums.tobytes().hex())
"""


@pytest.mark.slow
def test_a_program_that_is_read_again_is_the_one_that_was_compiled(tmp_path):
    """Its results bit for bit, and its memory, which decides how many members run together."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    run = lambda: (
        subprocess.run(
            [sys.executable, "-c", TWICE], env=env, capture_output=True, text=True, check=True
        ).stdout
    )
    first, (folder,) = run(), (tmp_path / "lorax").iterdir()
    kept = sorted(file.name for file in folder.glob("*-cache"))
    assert run() == first and len(first) > 4000
    assert kept and sorted(file.name for file in folder.glob("*-cache")) == kept
