"""Frozen weights in 4 and 8 bits: `nf4` has the format, `matmul` the products, `packed`, `mosaic`
and `tpu` the products on accelerators."""

from lorax.quant.nf4 import CODES, Quantised, quantise, quantize
from lorax.quant.packed import placed

__all__ = ["CODES", "Quantised", "placed", "quantise", "quantize"]
