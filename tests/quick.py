"""`jax.jit` for programs that run once: no optimisation, an eighth of the time to compile."""

import functools

import jax

from lorax import xla

OPTIONS = xla.known({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
