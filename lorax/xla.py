"""XLA's compiler: its options, which differ between versions, a program's memory, and the folder
that keeps what is compiled."""

import functools
import hashlib
import os
import platform
from pathlib import Path

import jax

from lorax import files

KEPT = 2_000_000_000  # bytes of a folder of compiled programs
LEAST = 0.2  # seconds of compiling from which a program is kept


def known(options: dict) -> dict:
    """The compiler options {name: value} that this version of XLA has."""
    return {name: value for name, value in options.items() if _knows(name, value)}


@functools.cache
def _knows(name: str, value) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def keep_compiled() -> None:
    """From now on, keep compiled programs in the user's cache folder ($XDG_CACHE_HOME, ~/.cache),
    where later processes find them: the same code, so the same results bit for bit.

    Each kind of processor has a folder, as a CPU's programs use the instructions that it has. What
    was used longest ago goes when a folder has more than `KEPT`. $JAX_COMPILATION_CACHE_DIR names
    another folder, which is JAX's business alone, and JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing; JAX's variables for size and least time count as well. A folder that can't be written
    to is left alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = files.cache_folder() / f"xla-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # not to be written to, or no home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        limits = {"compilation_cache_max_size": KEPT}
        limits["persistent_cache_min_compile_time_secs"] = LEAST
        for name, value in limits.items():
            if f"JAX_{name.upper()}" not in os.environ:
                jax.config.update(f"jax_{name}", value)


def _processor() -> str:
    """A name of this machine's kind of processor and of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    text = "\n".join([platform.machine(), platform.processor(), *known])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def program_bytes(compiled) -> int:
    """Peak bytes of a compiled program on one device, from XLA's buffer assignment."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
