"""Frozen weights in 4 and 8 bits: `nf4` what they are held as, `matmul` their products, `packed`,
`mosaic` and `tpu` those of accelerators."""

from lorax.quant.nf4 import CODES, Quantised, quantise, quantize
from lorax.quant.packed import placed

__all__ = ["CODES", "Quantised", "placed", "quantise", "quantize"]
