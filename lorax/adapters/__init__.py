"""Trained adapters of any kind, on their base: reading, writing, binding, merging, mixing.

`load` returns a `Trained` for any file and method, `save` writes one. An `Adapter` holds the
content of low-rank files, by layer; `bind`, `merge` and `mixed` take it and a base.
"""

from lorax.adapters.binding import bind, check
from lorax.adapters.files import head_fields, load, save, save_as_lora
from lorax.adapters.merging import Merged, merge, unmerge
from lorax.adapters.mixing import mixed
from lorax.adapters.task_types import check_task
from lorax.adapters.trained import Trained, from_training
from lorax.adapters.training import factored, state
from lorax.interop.adapter import Adapter, Dense, Factors

__all__ = [
    "Adapter",
    "Dense",
    "Factors",
    "Merged",
    "Trained",
    "bind",
    "check",
    "check_task",
    "factored",
    "from_training",
    "head_fields",
    "load",
    "merge",
    "mixed",
    "save",
    "save_as_lora",
    "state",
    "unmerge",
]
