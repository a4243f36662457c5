"""Options of XLA's compiler, which differ between its versions."""

import functools

import jax


def known(options: dict) -> dict:
    """Those of the compiler options {name: value} that this version of XLA has."""
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
