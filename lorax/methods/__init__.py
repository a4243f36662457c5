"""Adaptation methods behind one contract (`lorax.methods.contract`).

`lorax.method("lora", rank=8)` returns the method with its hyperparameters filled in. To add one,
write a function of hyperparameters that returns a `Method`, in any file, and `register` it
(`lorax.catalogue`); docs/examples/peanut.py is an example with its own operator leaf.
"""

import types

from lorax.catalogue import ROWS, register
from lorax.methods.arrays import Matrix, fill, joined, key_for, matrices
from lorax.methods.build import given, hyperparameters, merge, method
from lorax.methods.contract import Method, State
from lorax.methods.targets import (
    FULL_WORDS,
    GROUPS,
    WORDS,
    Default,
    active_layers,
    adapted_matrices,
    matching,
    resolve,
    resolve_full,
    words_of,
)

#: name -> `lorax.catalogue.Row` of every registered method; `register` adds to it.
METHODS = types.MappingProxyType(ROWS)

__all__ = [
    "Default",
    "FULL_WORDS",
    "GROUPS",
    "METHODS",
    "Matrix",
    "Method",
    "State",
    "WORDS",
    "active_layers",
    "adapted_matrices",
    "fill",
    "given",
    "hyperparameters",
    "joined",
    "key_for",
    "matching",
    "matrices",
    "merge",
    "method",
    "register",
    "resolve",
    "resolve_full",
    "words_of",
]
