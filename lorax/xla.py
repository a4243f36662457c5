"""XLA's compiler: its options, which differ between versions, and a program's memory."""

import functools

import jax


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


def program_bytes(compiled) -> int:
    """Peak bytes of a compiled program on one device, from XLA's buffer assignment."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
