"""Frozen weights in 4 and 8 bits: `nf4` what they are held as, `matmul` their products."""

from lorax.quant.nf4 import CODES, Quantised, quantise, quantize

__all__ = ["CODES", "Quantised", "quantise", "quantize"]
