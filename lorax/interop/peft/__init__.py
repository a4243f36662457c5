"""Adapters in Hugging Face PEFT's on-disk format: files in, arrays out, and back.

`load` and `save` are those of LoRA and DoRA. `matrices` and `tokens` have the other methods, as
arrays by PEFT's modules; `lorax.adapters.peft_methods` makes trained methods of them.
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
