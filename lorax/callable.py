"""Modules that can be called.

`lorax.run`, `lorax.plan` and `lorax.report` are commands (`python -m lorax.run`) and functions
(`lorax.run(config)`). As soon as anything imports the module, Python puts it into the package under
its name, in place of any function there. So the module itself has to be what is called.
"""

import inspect
import sys
import types
from collections.abc import Callable


def make_callable(name: str, function: Callable) -> None:
    """Let the module of this name be called as `function`."""
    called = {"__call__": staticmethod(function), "__signature__": inspect.signature(function)}
    sys.modules[name].__class__ = type("CallableModule", (types.ModuleType,), called)
