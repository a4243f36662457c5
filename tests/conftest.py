"""Strict numerics for every test: 8 CPU devices, no silent promotion, warnings are errors."""

import ctypes
import gc
import os
import shutil
import tempfile
import warnings
from pathlib import Path

# Before JAX starts. One thread for each of torch's and BLAS's pools: tests run side by side.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most programs of tests run a few steps: LLVM takes longer to optimise them than they run. The
# newest Python's part of the gate compiles as users' runs do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Tests that start a run anew compile the same programs: the second one reads the first one's.
COMPILED = (
    tempfile.mkdtemp(prefix="lorax-tests-") if "PYTEST_XDIST_WORKER" not in os.environ else ""
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402
import pytest  # noqa: E402

from lorax import catalogue, memory  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


#: Tests that only `-m slow` or only `-m soak` runs, besides those that are marked where they stand:
#: a name of `pytest --collect-only -q` a line, or that of a test without its [parameters]. Slow
#: ones take the most of the time (`--durations`), and a quicker test or parameter holds the same
#: behaviour; the gate runs them. Soak is what repeats a slow test many times or with everything:
#: ten kills, each engine, each method on each mesh. It is run before a release, and whoever changes
#: what it repeats runs the part that they touch.
TIERS = {
    name: set((Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    for name in ("soak", "slow")
}
COLLECTED = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {item.nodeid for item in items}
    for item in items:
        names = {item.nodeid, item.nodeid.partition("[")[0]}
        tier = next((tier for tier, listed in TIERS.items() if names & listed), None)
        if tier and not any(item.iter_markers("soak")):
            item.add_marker(tier)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # Other libraries' own business, each named as narrowly as it can be.
    for line in (
        "ignore:.*SwigPy.*:DeprecationWarning",
        "ignore:.*swigvarlink.*:DeprecationWarning",
        "ignore:unclosed.*<socket.*:ResourceWarning",
        "ignore:.*is_gradient_checkpointing.*:FutureWarning",
        "ignore:.*past_key_values.*is deprecated.*:FutureWarning",  # PEFT's prefixes
    ):
        config.addinivalue_line("filterwarnings", line)


MOST = 3e9  # bytes of a process


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """JAX keeps every program that it compiled: those of all modules come to 10 GB a process."""
    yield
    if memory.of_process("VmRSS") > MOST:  # on Linux
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # without it glibc keeps what JAX has freed


def pytest_unconfigure(config):
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def _warnings_stay_errors():
    # Some libraries reset the filters when imported.
    with warnings.catch_warnings():
        yield


@pytest.fixture
def collected(pytestconfig) -> set[str]:
    """The names of all tests that were collected, also of those that another tier runs."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    before = dict(catalogue.ROWS)
    yield catalogue.ROWS
    catalogue.ROWS.clear()
    catalogue.ROWS.update(before)


@pytest.fixture(scope="module")
def unoptimised():
    """Programs that a module's tests make are compiled as `quick` has it. For those that run once,
    or for a few steps: an optimised program takes seconds to compile."""
    import quick

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick.jit)
        yield
