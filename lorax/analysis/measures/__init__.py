"""Measures of arrays: singular values and ranks, overlap, amplification, intruders, CKA.

numpy in, numpy out, in float64; leading axes are batch axes. `lorax.analysis` exports all of them.
"""
