"""Modules that can be called.

`lorax.run`, `lorax.plan` and `lorax.report` are commands (`python -m lorax.run`) and functions
(`lorax.run(config)`). As soon as anything imports such a module, Python binds the module to its
name in the package and replaces any function there. So the module itself has to be callable.
"""

import inspect
import sys
import types
from collections.abc import Callable


def make_callable(name: str, function: Callable) -> None:
    """Make the module of this name callable as `function`."""
    called = {"__call__": staticmethod(function), "__signature__": inspect.signature(function)}
    sys.modules[name].__class__ = type("CallableModule", (types.ModuleType,), called)
