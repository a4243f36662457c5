"""lorax: an instrument for measuring rank in low-rank adaptation."""

import importlib

__version__ = "0.2.0.dev0"

# The public names, imported on first use: the command line must answer before JAX loads.
_FACE = {
    "load": "lorax.models",
    "method": "lorax.methods",
    "merge": "lorax.methods",
    "apply": "lorax.intercept",
    "sites": "lorax.intercept",
    "quantize": "lorax.models.quantised",
    "dequantize": "lorax.models.quantised",
}
_MODULES = {"runs": "lorax.analysis.runs"} | {
    name: f"lorax.{name}"
    for name in (
        *("plan", "report", "run"),  # these can be called
        *("adapters", "analysis", "config", "decode", "intercept", "interop", "leaves", "methods"),
        *("models", "ops", "tasks", "train", "tree"),
    )
}


def __getattr__(name):
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'lorax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_FACE, *_MODULES])
