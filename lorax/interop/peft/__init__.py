"""Adapters in Hugging Face PEFT's on-disk format, read as arrays and written from arrays.

`load` and `save` are for LoRA and DoRA. `matrices` and `tokens` handle the other methods, as arrays
by PEFT's modules; `lorax.adapters.peft_methods` converts these to trained methods.
"""

from lorax.interop.adapter import Adapter, Factors
from lorax.interop.peft.config import CONFIG, WEIGHTS, read_config
from lorax.interop.peft.files import PREFIX, own_names, read_tensors
from lorax.interop.peft.lora import load, save

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "Adapter",
    "Factors",
    "load",
    "own_names",
    "read_config",
    "read_tensors",
    "save",
]
